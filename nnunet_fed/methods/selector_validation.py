"""How good and how sure the selector is, over the validation cases of all sites, out of sums.

Source: temperature scaling is Guo et al., *On Calibration of Modern Neural Networks*, ICML 2017; its federated form and
the gate are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from nnunet_fed.errors import FederationError
from nnunet_fed.exchange.communicator import Collectives
from nnunet_fed.exchange.keys import key_of
from nnunet_fed.methods.fedsm import GLOBAL, route
from nnunet_fed.methods.selector import tempered

TEMPERATURES = tuple(2.0 ** (step / 4) for step in range(21))
"""From 1 to 32. None below 1: where a few validation cases are told apart without error, there would be no end to
sharpening, and images of unknown sites would pass every threshold."""


@dataclass(frozen=True)
class SelectorValidation:
    """The selector on the validation cases of all sites."""

    sites: tuple[str, ...]
    temperature: float
    confusion: tuple[tuple[int, ...], ...]
    """Number of cases by true site (row) and likeliest site (column)."""
    routed_to_global: tuple[int, ...]
    """Number of cases by true site whose probability is not above gamma."""

    @property
    def accuracy(self) -> float:
        """Share of all cases whose site is the likeliest."""
        counts = np.array(self.confusion)
        return float(np.trace(counts) / counts.sum())

    @property
    def accuracy_by_site(self) -> dict[str, float | None]:
        """The same of each site's cases; ``None`` for a site without any."""
        return {
            site: row[number] / sum(row) if sum(row) else None
            for number, (site, row) in enumerate(zip(self.sites, self.confusion, strict=True))
        }

    @property
    def share_routed_to_global(self) -> float:
        """Share of all cases that gamma gives to the global model."""
        return float(sum(self.routed_to_global) / np.sum(self.confusion))


def validate_selector(
    communicator: Collectives, scope: str, log_probabilities: torch.Tensor, gamma: float
) -> SelectorValidation:
    """Choose the temperature and count right and wrong decisions, over the federation: two sums.

    Args:
        communicator: this site's.
        scope: first part of the keys.
        log_probabilities: of this site's validation cases, float64 of shape (cases, sites); see
            :func:`nnunet_fed.methods.selector.case_log_probabilities`.
        gamma: threshold of the super model.

    Raises:
        FederationError: the selector has other classes than the study has sites, a value is not finite, or no site has
            a validation case.
    """
    sites = communicator.sites
    if log_probabilities.shape[1:] != (len(sites),) or not torch.isfinite(log_probabilities).all():
        raise FederationError(
            f"Site '{communicator.site}': the selector's log-probabilities must be finite and of the shape (cases, "
            f"{len(sites)}) for the sites {', '.join(sites)}; they are of {tuple(log_probabilities.shape)}."
        )
    label = sites.index(communicator.site)
    losses = [-float(tempered(log_probabilities, temperature)[:, label].sum()) for temperature in TEMPERATURES]
    pooled = communicator.sum(key_of(scope, "selector-temperature"), np.array([len(log_probabilities), *losses]))
    if not pooled[0] > 0:
        raise FederationError("No site has a validation case on which the selector could be judged.")
    temperature = TEMPERATURES[int(np.argmin(pooled[1:]))]

    counts = np.zeros((len(sites), len(sites) + 1), dtype=np.int64)
    for probabilities in tempered(log_probabilities, temperature).exp().tolist():
        counts[label, int(np.argmax(probabilities))] += 1
        counts[label, -1] += route(dict(zip(sites, probabilities, strict=True)), gamma).choice == GLOBAL
    counts = communicator.sum(key_of(scope, "selector-validation"), counts)
    return SelectorValidation(
        sites,
        temperature,
        confusion=tuple(tuple(int(number) for number in row) for row in counts[:, :-1]),
        routed_to_global=tuple(int(number) for number in counts[:, -1]),
    )
