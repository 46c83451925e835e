"""FedOAP's perturbed boundary loss: noise on the logits of voxels that are clearly wrong, in the fine-tuning.

Source: see :mod:`nnunet_fed.methods.fedoap`; E12 to E15, reconstructed from the public code. No boundary is extracted
there: the name relies on large errors lying at margins. With the published constants the loss hardly differs from its
base (on synthetic logits the notes measured 7e-6 +- 5e-5 at a loss of 0.52). More than two classes, ignored voxels and
deep supervision are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from nnunet_fed.errors import ConfigurationError


class PerturbedBoundaryLoss(nn.Module):
    """E15: (1 - lambda) base(z, Y) + lambda base(z + sigma noise M, Y), M where the error exceeds tau.

    The error (E12, E13) is 1 minus the probability of the true class; of regions, |sigmoid(z) - Y| for each of them,
    which for two classes is the same. Selection and noise carry no gradient; it reaches the logits through both terms.
    Without gradients, as in validation, the value is the base loss.

    Args:
        base: takes logits of (B, C, ...) and a target, see below.
        tau: an error above it is perturbed; from 1 on none is.
        sigma: standard deviation of the noise on a region's logit, and on the difference of two classes' logits.
        weight: the source's lambda. An attribute that may change; at 0 the value is that of the base loss, bit for bit,
            and nothing else is computed.
        softmax: the target is (B, 1, ...) of labels; otherwise it is (B, C, ...) of regions, binary.
        ignore_label: label of ignored voxels, which are never selected; of regions only whether there is one matters:
            then the target has one more channel, which says where.
        generator: of the noise, on the logits' device; ``None``: one is made there, see :meth:`reseed`. The global
            generator is never drawn from.

    Raises:
        ConfigurationError: a number is outside its bounds.
    """

    def __init__(
        self,
        base: nn.Module,
        tau: float = 0.75,
        sigma: float = 0.1,
        weight: float = 0.1,
        *,
        softmax: bool,
        ignore_label: int | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if not (tau >= 0 and sigma >= 0 and 0 <= weight <= 1):
            raise ConfigurationError(
                f"The perturbed boundary loss has tau {tau:g}, sigma {sigma:g} and weight {weight:g}: tau and sigma "
                "must be at least 0, and the weight between 0 and 1."
            )
        self.base = base
        self.tau = tau
        self.sigma = sigma
        self.weight = weight
        self.softmax = softmax
        self.ignore_label = ignore_label
        self._seed = 0
        self.generator = generator

    def reseed(self, seed: int) -> None:
        """Let the noise depend on ``seed`` only: on the study's seed, the site and the epoch, mixed by the caller."""
        self._seed = seed
        if self.generator is not None:
            self.generator.manual_seed(seed)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of one resolution, a scalar.

        Args:
            logits: (B, C, ...) of any floating-point type, also under autocast.
            target: as nnU-Net's losses take it.
        """
        clean: torch.Tensor = self.base(logits, target)
        if self.weight == 0 or not torch.is_grad_enabled():
            return clean
        perturbed: torch.Tensor = self.base(self.perturb(logits, target), target)
        return (1 - self.weight) * clean + self.weight * perturbed

    def perturb(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """E14: the logits with noise where they are selected, float32 so that half precision does not round it away."""
        if self.generator is None:
            self.generator = torch.Generator(logits.device).manual_seed(self._seed)
        noise = torch.randn(logits.shape, generator=self.generator, device=logits.device)
        # of two independent logits the difference has twice the variance
        noise *= self.sigma / math.sqrt(2) if self.softmax else self.sigma
        return logits + noise.mul_(self.selection(logits, target))

    @torch.no_grad()
    def selection(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """E13: the mask M, boolean of shape (B, 1, ...) for softmax and (B, C, ...) for regions.

        An error e above tau is a cross-entropy -log(1 - e) above -log(1 - tau).
        """
        logits = logits.detach().float()
        threshold = math.inf if self.tau >= 1 else -math.log1p(-self.tau)
        if self.softmax:
            ignored = -100 if self.ignore_label is None else self.ignore_label
            # an ignored voxel gets 0, which is above no threshold
            entropy = cross_entropy(logits, target[:, 0].long(), reduction="none", ignore_index=ignored)
            return (entropy > threshold).unsqueeze(1)
        regions = target if self.ignore_label is None else target[:, :-1]
        mask = binary_cross_entropy_with_logits(logits, regions.float(), reduction="none") > threshold
        return mask if self.ignore_label is None else mask & ~target[:, -1:].bool()


def with_perturbed_boundary(loss: nn.Module, make: Callable[[nn.Module], PerturbedBoundaryLoss]) -> nn.Module:
    """Put the perturbation into a loss of nnU-Net: inside its deep supervision, so that E15 holds at each resolution.

    Args:
        loss: as ``nnUNetTrainer._build_loss`` returns it.
        make: makes the perturbed loss of its base.

    Returns:
        What takes the place of ``loss``: the same object with deep supervision.
    """
    inner = getattr(loss, "loss", None)
    if not (isinstance(inner, nn.Module) and hasattr(loss, "weight_factors")):
        return make(loss)
    loss.loss = make(inner)
    return loss
