"""GCML's deep contrast mutual learning: two models that train on the same patches, each with the other as its teacher.

Source: Chen and Yuan, *Decentralized Personalization for Federated Medical Image Segmentation via Gossip Contrastive
Mutual Learning*, IEEE TMI 2025 (arXiv 2503.03883). Only its abstract was read, and the official repository has no
federated code: the printed equations are unknown to us. What is here is the reconstruction GCML-R of our notes (1.4,
1.5, 5.2, 5.3), *ours* throughout; docstrings name the candidates V0 to V4 by the notes' numbers.

Symbols: t the teacher, s the student, z logits, q probabilities, y the reference; d(v) = KL(q_t(v) || q_s(v)) at a
voxel v; gamma (``contrast_weight``), m (``margin``), tau (``temperature``), lambda (the weight of D).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

from nnunet_fed.errors import ConfigurationError

ContrastName = Literal["full", "region", "foreground_background", "correctness", "agreement"]
Roi = Literal["union", "reference"]
Heads = Literal["full_resolution", "all"]
Mix = Literal["additive", "convex"]
Plan = Literal["simultaneous", "two_pass"]

Outputs = torch.Tensor | Sequence[torch.Tensor]
"""Of a network or for a loss: one tensor, or with deep supervision several, full resolution first."""

PLAN_HEADROOM = 1.2
"""The notes' factor on the measured memory of a step (5.3)."""


class _Divergence(torch.autograd.Function):
    """d(v), and its gradient q_s - q_t in closed form (1.5).

    So the gradient of equal logits is exactly 0, and a peer that is a copy trains bit for bit like nnU-Net alone;
    through log_softmax it would only be 0 up to rounding. One tensor of float32 is kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, temperature: float, softmax: bool
    ) -> torch.Tensor:
        ctx.temperature, ctx.softmax, ctx.dtype = temperature, softmax, student.dtype
        student, teacher = student.float() / temperature, teacher.float() / temperature
        if softmax:
            log_student, log_teacher = student.log_softmax(1), teacher.log_softmax(1)
            probability = log_teacher.exp()
            ctx.save_for_backward(log_student.exp() - probability)
            return (probability * (log_teacher - log_student)).sum(1)
        probability = teacher.sigmoid()
        ctx.save_for_backward(student.sigmoid() - probability)
        present = probability * (logsigmoid(teacher) - logsigmoid(student))
        return present + (-teacher).sigmoid() * (logsigmoid(-teacher) - logsigmoid(-student))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (difference,) = ctx.saved_tensors
        if ctx.softmax:
            gradient = gradient.unsqueeze(1)
        return (gradient * difference / ctx.temperature).to(ctx.dtype), None, None, None


def divergence(
    teacher: torch.Tensor, student: torch.Tensor, *, softmax: bool, temperature: float = 1.0
) -> torch.Tensor:
    """d = KL(q_t || q_s) of each voxel in nats, in float32; only the student receives a gradient.

    Args:
        teacher: logits (B, C, ...) of any floating-point type.
        student: logits of the same shape.
        softmax: categorical over C; otherwise a Bernoulli divergence for each of C regions.
        temperature: divides both logits. There is no factor tau^2, so that the margin is in nats at any tau.

    Returns:
        (B, ...) for softmax, (B, C, ...) for regions; at least 0 up to rounding.
    """
    value: torch.Tensor = _Divergence.apply(student, teacher.detach(), temperature, softmax)
    return value


@dataclass(frozen=True)
class Contrast:
    """D(t -> s), where a student follows its teacher and where it keeps off: one number for a batch.

    ========================= == =================================================================
    ``full``                  V0 mean d over all voxels (DML, FML)
    ``region``                V1 mean d over the reference's foreground (GML's regional KL)
    ``foreground_background`` V2 that, plus ``background_weight`` times the mean over the background
    ``correctness``           V3 mean d where the teacher is right, plus gamma mean [m - d]_+ where it is wrong
    ``agreement``             V4 mean d where both say the same, plus gamma mean [m - d]_+ where they do not
    ========================= == =================================================================

    V3 and V4 look at the region of interest only. All means are over sets of voxels, so that lambda depends neither on
    the patch nor on the number of classes; an empty set gives 0. Of regions each is a problem of its own: sets and
    means are a region's, and D is the mean over the regions. Ignored voxels are in no set.

    What repels is bounded by the margin (1.5): a raw -KL has no lower end, and in the notes' toy runs it destroyed both
    models. Nothing here waits for the device.

    Raises:
        ConfigurationError: a number is outside its bounds.
    """

    softmax: bool
    """The target is (B, 1, ...) of labels; otherwise (B, C, ...) of regions, binary."""
    contrast: ContrastName = "correctness"
    contrast_weight: float = 0.1
    """gamma, of V3 and V4; at least 0."""
    margin: float = 2.0
    """m, in nats: whoever is at least so far from a wrong teacher is left in peace; above 0."""
    background_weight: float = 0.1
    """Of V2. A negative one repels, bounded as in V3: gamma is its absolute value."""
    temperature: float = 1.0
    """tau, of both models; above 0. What counts as right does not depend on it."""
    roi: Roi = "union"
    """Region of interest of V3 and V4: the foreground of the reference and of both predictions, or of the reference."""
    class_mean: bool | None = None
    """For softmax: every class of the reference that a set contains weighs the same in the set's mean, so that a small
    one counts; ``None``: with more than two classes."""
    ignore_label: int | None = None
    """Label of ignored voxels; of regions only whether there is one matters: then the target has one more channel."""

    def __post_init__(self) -> None:
        numbers = (self.contrast_weight, self.margin, self.background_weight, self.temperature)
        if not (
            all(map(math.isfinite, numbers)) and self.contrast_weight >= 0 and self.margin > 0 and self.temperature > 0
        ):
            raise ConfigurationError(
                f"The contrast has contrast_weight {self.contrast_weight:g}, margin {self.margin:g}, background_weight "
                f"{self.background_weight:g} and temperature {self.temperature:g}: all must be finite, contrast_weight "
                "at least 0, margin and temperature above 0."
            )

    def __call__(self, teacher: torch.Tensor, student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """D of one resolution, a scalar in float32; only the student receives a gradient.

        Args:
            teacher: logits (B, C, ...) of any floating-point type, also under autocast.
            student: logits of the same shape, of the same augmented patches.
            target: as nnU-Net's losses take it.
        """
        distance = divergence(teacher, student, softmax=self.softmax, temperature=self.temperature)
        with torch.no_grad():
            labels, valid = self._reference(target)
            attracts, others = self._sets(teacher, student, labels, valid)
            near = self._shares(attracts, labels, student.shape[1])
        value = (distance * near).sum()
        weight = self.background_weight if self.contrast == "foreground_background" else -self.contrast_weight
        if others is None or weight == 0:
            return value
        with torch.no_grad():
            far = self._shares(others, labels, student.shape[1])
        if weight < 0:
            distance = (self.margin - distance).clamp(min=0)
        return value + abs(weight) * (distance * far).sum()

    def _decided(self, logits: torch.Tensor) -> torch.Tensor:
        """What a model says: (B, ...) of labels, or (B, C, ...), whether a voxel belongs to a region."""
        return logits.argmax(1) if self.softmax else logits > 0

    def _reference(self, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The reference in the same form, and which of its voxels are not ignored (``None``: all)."""
        if self.softmax:
            labels = target[:, 0].long()
            valid = None if self.ignore_label is None else labels != self.ignore_label
            return (labels if valid is None else labels * valid), valid
        if self.ignore_label is None:
            return target.bool(), None
        return target[:, :-1].bool(), ~target[:, -1:].bool()

    def _sets(
        self, teacher: torch.Tensor, student: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Voxels of the first mean, and of the second if there is one, out of both models' logits."""
        foreground = labels != 0
        second: torch.Tensor | None = None
        if self.contrast == "full":
            first = torch.ones_like(foreground)
        elif self.contrast == "region":
            first = foreground
        elif self.contrast == "foreground_background":
            first, second = foreground, ~foreground
        else:
            teacher, student = self._decided(teacher), self._decided(student)
            roi = foreground | (teacher != 0) | (student != 0) if self.roi == "union" else foreground
            same = teacher == (labels if self.contrast == "correctness" else student)
            first, second = roi & same, roi & ~same
        if valid is None:
            return first, second
        return first & valid, None if second is None else second & valid

    def _shares(self, voxels: torch.Tensor, labels: torch.Tensor, channels: int) -> torch.Tensor:
        """Weight of each voxel in the mean over a set: 0 outside; their sum is 1, or 0 of an empty set."""
        if not self.softmax:
            counts = voxels.sum((0, *range(2, voxels.ndim)), keepdim=True)
            return voxels / (counts.clamp(min=1) * channels)
        if not (channels > 2 if self.class_mean is None else self.class_mean):
            return voxels / voxels.sum().clamp(min=1)
        counts = torch.stack([(voxels & (labels == label)).sum() for label in range(channels)])
        present = (counts > 0).sum().clamp(min=1)
        return voxels * (1 / (counts.clamp(min=1) * present))[labels]


class MutualLoss(nn.Module):
    """L_seg + lambda D, around a whole loss of nnU-Net: its deep supervision stays inside, as it is.

    Called without a teacher, as nnU-Net's own steps and validation do, or with ``weight`` 0, it is the loss of nnU-Net,
    bit for bit, and nothing else is computed. Predictions of both models must be those *before* either model's step;
    then the order of the two does not matter.

    Args:
        base: L_seg, as ``nnUNetTrainer._build_loss`` returns it.
        contrast: D.
        heads: whether D is of the full resolution only, or of all resolutions with the weights of L_seg. The notes
            take the first (A5): of the coarse ones the sets are tiny and noisy.
        mix: ``additive``, or ``convex``: (1 - lambda) L_seg + lambda D (A2).
    """

    def __init__(self, base: nn.Module, contrast: Contrast, *, heads: Heads = "full_resolution", mix: Mix = "additive"):
        super().__init__()
        self.base = base
        self.contrast = contrast
        self.heads = heads
        self.mix = mix
        self.weight = 0.0
        """lambda of the next step, see :func:`ramped_weight`."""

    def forward(self, outputs: Outputs, targets: Outputs, teacher: Outputs | None = None) -> torch.Tensor:
        """The loss of the student, a scalar.

        Args:
            outputs: the student's logits, as nnU-Net hands them to its loss.
            targets: likewise.
            teacher: what :meth:`lesson` gave of the other model's outputs; ``None``: there is none.
        """
        segmentation: torch.Tensor = self.base(outputs, targets)
        if teacher is None or self.weight == 0:
            return segmentation
        if self.mix == "convex":
            segmentation = (1 - self.weight) * segmentation
        return segmentation + self.weight * self._contrasted(teacher, outputs, targets)

    def lesson(self, outputs: Outputs) -> Outputs:
        """What a model's outputs teach, detached: the resolutions that D needs, so that others need not be kept."""
        if isinstance(outputs, torch.Tensor):
            return outputs.detach()
        return [output.detach() for output in (outputs if self.heads == "all" else outputs[:1])]

    def _contrasted(self, teacher: Outputs, outputs: Outputs, targets: Outputs) -> torch.Tensor:
        deep = self.heads == "all" and not isinstance(outputs, torch.Tensor)
        weights: Any = self.base.weight_factors if deep else (1.0,)
        levels = zip(weights, _levels(teacher), _levels(outputs), _levels(targets), strict=False)
        return torch.stack([float(weight) * self.contrast(*level) for weight, *level in levels if weight != 0]).sum()


def _levels(tensors: Outputs) -> Sequence[torch.Tensor]:
    return [tensors] if isinstance(tensors, torch.Tensor) else tensors


def ramped_weight(step: int, weight: float, ramp_steps: int) -> float:
    """lambda of a step: from 0 linearly to ``weight`` (1.5).

    Args:
        step: optimizer steps since this incoming model arrived, from 0.
        weight: at the end of the ramp.
        ramp_steps: its length; 0: there is none.
    """
    return weight if step >= ramp_steps else weight * step / ramp_steps


def execution_plan(free_bytes: int, step_bytes: int) -> Plan:
    """How a mutual step runs: both graphs at once (twice the compute of a plain step), or one after the other (2.33).

    A second model in training needs what the first one does: weights, gradients, momentum, activations. So it fits
    beside it if that is free, with a headroom (5.3).

    Args:
        free_bytes: what the device has left beside all that plain training has reserved.
        step_bytes: peak of the memory allocated in a plain training step, all that training holds included.
    """
    return "simultaneous" if free_bytes >= PLAN_HEADROOM * step_bytes else "two_pass"
