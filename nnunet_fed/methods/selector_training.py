"""How the sites train one selector, though each has images of one label only: its own.

Source: the published code takes one Adam step a round on all local data at every site, from common weights and
moments, and averages both (``reference``). ``server_adam`` is ours: the sites average their gradients and take the same
Adam step each, which is the step that would be taken if all images lay in one place.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
import torch
from torch import nn

from nnunet_fed.errors import ConfigurationError, FederationError
from nnunet_fed.exchange.communicator import Collectives
from nnunet_fed.exchange.keys import key_of
from nnunet_fed.exchange.payload import Array
from nnunet_fed.methods.selector import Selector, SelectorCase, SelectorConfiguration
from nnunet_fed.methods.tensors import load_arrays, to_arrays

Mode = Literal["server_adam", "reference"]


def label_of(communicator: Collectives, configuration: SelectorConfiguration) -> int:
    """This site's class: its place among all sites of the study, sorted by name, whoever came first.

    Raises:
        ConfigurationError: the selector has another number of classes than the study has sites, or this site is none of
            them.
    """
    if configuration.classes != len(communicator.sites):
        raise ConfigurationError(
            f"The selector tells {configuration.classes} sites apart, but the study has {len(communicator.sites)}: "
            f"{', '.join(communicator.sites)}. Train it with the study's sites."
        )
    if communicator.site not in communicator.sites:
        raise ConfigurationError(
            f"The selector tells the sites {', '.join(communicator.sites)} apart, with which the study was planned; "
            f"site '{communicator.site}' came later, or has another name now. Open a new attempt, in which all plan."
        )
    return communicator.sites.index(communicator.site)


class SelectorTraining:
    """A selector, its optimizer, and a site's part in training it.

    The weights stay on the CPU, and the Adam step is numpy's elementwise arithmetic, which rounds alike on every
    machine: from the same mean gradient all sites get the same selector, whatever their hardware.

    Args:
        configuration: of the selector.
        seed: of its initial weights; the same at every site.
        mode: see the module.
        learning_rate: ``selector_lr``; Adam's other settings are those of its authors.
        device: where gradients are computed.
    """

    BETAS = (0.9, 0.999)
    EPSILON = 1e-8

    def __init__(
        self,
        configuration: SelectorConfiguration,
        seed: int,
        mode: Mode = "server_adam",
        learning_rate: float = 1e-2,
        device: torch.device = torch.device("cpu"),  # noqa: B008 (a constant)
    ):
        self.configuration = configuration
        self.network = Selector(configuration, seed)
        self.mode = mode
        self.learning_rate = learning_rate
        self.device = device
        self._weights = dict(self.network.named_parameters())
        self._exp_avg = {name: torch.zeros_like(weight.data) for name, weight in self._weights.items()}
        self._exp_avg_sq = {name: torch.zeros_like(weight.data) for name, weight in self._weights.items()}
        self._steps = 0

    def train(
        self, communicator: Collectives, scope: str, cases: Iterable[SelectorCase], weight: float, steps: int = 1
    ) -> list[float]:
        """A round's steps together with the other sites.

        Args:
            communicator: this site's.
            scope: first part of the round's keys.
            cases: this site's training cases; gone through once a step.
            weight: of this site in the means: 1 balances the classes, the number of cases balances the cases.
            steps: exchanges in this round (``selector_steps_per_round``).

        Returns:
            This site's mean cross-entropy before each step.

        Raises:
            ConfigurationError: as :func:`label_of`.
            FederationError: as :meth:`gradient`.
        """
        label = label_of(communicator, self.configuration)
        losses = []
        for number in range(steps):
            try:
                gradient, loss = self.gradient(cases, label)
            except FederationError as error:
                raise FederationError(f"Site '{communicator.site}', {scope}: {error}") from None
            losses.append(loss)
            key = key_of(scope, f"selector-{number}")
            if self.mode == "server_adam":
                self.step(communicator.mean(key, gradient, weight, exact=True))
            else:
                self.step(gradient)
                exchanged = self._exchanged()
                load_arrays(exchanged, communicator.mean(key, to_arrays(exchanged), weight, exact=True))
        return losses

    @torch.enable_grad()
    def gradient(self, cases: Iterable[SelectorCase], label: int) -> tuple[dict[str, Array], float]:
        """Gradient of the mean cross-entropy (over a case's patches, then over cases), and that mean.

        The mean, where the published code sums: so that a site's weight is the one it has in the exchange.

        Raises:
            FederationError: there are no cases, or the cross-entropy is not finite.
        """
        network = copy.deepcopy(self.network).to(self.device)
        weights = dict(network.named_parameters())
        loss, count = 0.0, 0
        for case in cases:
            header = None if case.header is None else case.header.to(self.device)
            logits = network(case.patches.to(self.device), header)
            of_case = nn.functional.cross_entropy(logits, torch.full((len(logits),), label, device=self.device))
            of_case.backward()  # type: ignore[no-untyped-call]
            loss, count = loss + float(of_case.detach()), count + 1
        if not count:
            raise FederationError("there are no training cases for the selector; every site needs at least one.")
        if not math.isfinite(loss):
            raise FederationError(
                "the selector's loss is not finite. Look for NaN or infinity in the images, or lower selector_lr."
            )
        gradients = {name: weight.grad for name, weight in weights.items()}
        return to_arrays({name: grad / count for name, grad in gradients.items() if grad is not None}), loss / count

    def step(self, gradient: Mapping[str, Array]) -> None:
        """One step of Adam (Kingma and Ba, ICLR 2015, Algorithm 1) on the weights, in place."""
        self._steps += 1
        first, second = self.BETAS
        rate = self.learning_rate / (1 - first**self._steps)
        correction = math.sqrt(1 - second**self._steps)
        exp_avg, exp_avg_sq = to_arrays(self._exp_avg), to_arrays(self._exp_avg_sq)
        for name, weight in to_arrays(self._weights).items():
            exp_avg[name] *= first
            exp_avg[name] += (1 - first) * gradient[name]
            exp_avg_sq[name] *= second
            exp_avg_sq[name] += (1 - second) * np.square(gradient[name])
            weight -= rate * exp_avg[name] / (np.sqrt(exp_avg_sq[name]) / correction + self.EPSILON)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Weights, moments and number of steps: all that a checkpoint, or a site that comes late, needs."""
        state = {name: tensor.detach().clone() for name, tensor in self._exchanged().items()}
        return {**state, "steps": torch.tensor(self._steps)}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from :meth:`state_dict`; raises :class:`DisagreementError` for that of another selector."""
        tensors = {**self._exchanged(), "steps": torch.tensor(0)}
        load_arrays(tensors, to_arrays(state))
        self._steps = int(tensors["steps"])

    def _exchanged(self) -> dict[str, torch.Tensor]:
        groups: dict[str, Mapping[str, torch.Tensor]] = {
            "weights": self._weights, "exp_avg": self._exp_avg, "exp_avg_sq": self._exp_avg_sq,
        }  # fmt: skip
        return {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}
