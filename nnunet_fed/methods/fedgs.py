"""Federated gradient scaling (FedGS): what a site uploads counts the steps on patches with small lesions more.

Source: Schutte, Corbetta, Beets-Tan, Silva (arXiv 2408.11701). Only the abstract of the paper was read; the formulas
are those of its official code, which is complete. docs/methods.md says what is the source's and what is ours.

In the symbols of the source: a step factor eta = 1 + strength * mean(delta) of a batch multiplies the change that the
optimizer's step made, in what the site uploads, not in what it trains on. Since these changes add up to omega - theta,
the upload is omega + R with R = sum (eta - 1) * change, and the server does plain federated averaging.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nnunet_fed.exchange.payload import Array, Tensors
from nnunet_fed.methods.lesion_classes import Floats

HISTOGRAM_BINS = 80
HISTOGRAM_END = 8.0
"""Calibration counts log10 of inverse areas in equal bins from 0 to here."""
CALIBRATION_QUANTILE = 0.8
"""Share of the lesions that do not count as small: the source's LiTS threshold is the 79.7th percentile."""


def difficulty(inverse_areas: Floats, thresholds: Floats, log_bases: Floats) -> Floats:
    """The source's delta of each sample: tanh((log_l a^-1)^2) where a^-1 is at least the threshold, else 0.

    Args:
        inverse_areas: (samples, classes), see :meth:`~nnunet_fed.methods.lesion_classes.LesionClasses.inverse_areas`.
        thresholds: tau of each class, at least 1.
        log_bases: l of each class, above 1.

    Returns:
        (samples,), from 0 to 1: the mean over the classes that are present (ours; the source has one class), 0 where
        there is none.
    """
    present = ~np.isnan(inverse_areas)
    small = np.where(present, inverse_areas, 0.0) >= thresholds
    logarithms = np.log(np.where(small, inverse_areas, 1.0)) / np.log(log_bases)
    per_class = np.where(small, np.tanh(logarithms**2), 0.0)
    mean: Floats = per_class.sum(axis=1) / np.maximum(present.sum(axis=1), 1)
    return mean


def histogram_of(inverse_areas: Floats) -> npt.NDArray[np.int64]:
    """Counts of log10 of the inverse areas that may be small lesions: (classes, bins), whole numbers."""
    logarithms = [np.log10(column[np.nan_to_num(column) >= 1]) for column in inverse_areas.T]
    edges = np.linspace(0, HISTOGRAM_END, HISTOGRAM_BINS + 1)
    clipped = [np.minimum(column, HISTOGRAM_END) for column in logarithms]
    return np.array([np.histogram(column, edges)[0] for column in clipped], dtype=np.int64)


def calibrated_thresholds(histogram: npt.NDArray[np.int64]) -> Floats:
    """The 80th percentile of the inverse areas of each class (notes' proposal); infinite for a class without any.

    Args:
        histogram: (classes, bins), the sum over the sites.
    """
    width = HISTOGRAM_END / HISTOGRAM_BINS
    thresholds = []
    for counts in histogram:
        rank, reached = CALIBRATION_QUANTILE * counts.sum(), np.cumsum(counts)
        if rank == 0:
            thresholds.append(np.inf)
            continue
        bin_ = int(np.searchsorted(reached, rank))
        within = 1 - (reached[bin_] - rank) / counts[bin_]
        thresholds.append(10 ** (width * (bin_ + within)))
    return np.array(thresholds)


def strength_in_round(strength: float, warm_down: float, number: int, rounds: int) -> float:
    """The source's lambda, which falls linearly to 0 over the last share ``warm_down`` of the rounds (ours).

    Args:
        strength: of all other rounds.
        warm_down: from 0 (never falls) to below 1.
        number: of the round, from 0.
        rounds: of the study.
    """
    falling = round(warm_down * rounds)
    return strength * min(1.0, (rounds - 1 - number) / falling) if falling else strength


class GradientScaler:
    """Accumulates R around the steps of an optimizer, and counts them.

    The hooks enclose the real step: after unscaling and clipping, and not at all when ``GradScaler`` skips it. Nothing
    is copied for a step of factor 1. Weights, gradients and the optimizer's state are never touched.

    Args:
        optimizer: whose steps count.
        parameters: the trainable parameters by name, each once.
        accumulate: whether R is wanted; without it steps and factors are only counted.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor], accumulate: bool):
        self.parameters = dict(parameters)
        self._accumulate = accumulate
        self._before: dict[str, torch.Tensor] = {}
        self._residual: dict[str, torch.Tensor] = {}
        self.factor = 1.0
        """eta of the next step."""
        self.normaliser = 1.0
        """What every factor is divided by in R, but not in the counts."""
        self.restart()
        self._hooks = (
            optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
        )

    def restart(self) -> None:
        """Begin a round: R is 0."""
        self._residual.clear()
        self.steps = 0
        self.scaled_steps = 0
        self.factor_sum = 0.0

    def release(self) -> None:
        """Count no further step, and give the memory back."""
        for hook in self._hooks:
            hook.remove()
        self._before.clear()
        self.restart()

    @property
    def mean_factor(self) -> float:
        """Mean of eta over the steps of the round, 1 before the first."""
        return self.factor_sum / self.steps if self.steps else 1.0

    @property
    def scaled_share(self) -> float:
        """Share of the round's steps with a factor above 1."""
        return self.scaled_steps / self.steps if self.steps else 0.0

    @property
    def _excess(self) -> float:
        return self.factor / self.normaliser - 1 if self._accumulate else 0.0

    @torch.no_grad()
    def _before_step(self) -> None:
        if self._excess == 0:
            return
        if not self._before:
            self._before = {name: torch.empty_like(tensor) for name, tensor in self.parameters.items()}
        for name, tensor in self.parameters.items():
            self._before[name].copy_(tensor)

    @torch.no_grad()
    def _after_step(self) -> None:
        self.steps += 1
        self.scaled_steps += self.factor > 1
        self.factor_sum += self.factor
        if self._excess == 0:
            return
        if not self._residual:
            self._residual = {
                name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in self.parameters.items()
            }
        for name, tensor in self.parameters.items():
            change = self._before[name].sub_(tensor)  # before - after: no third set of tensors
            self._residual[name].add_(change, alpha=-self._excess)

    @torch.no_grad()
    def surrogate(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors with R added: what is uploaded in place of the weights.

        Args:
            tensors: of the network, as ``named_parameters`` or ``state_dict(keep_vars=True)`` give them. Several
                names of one parameter get one and the same tensor; whatever is no parameter is returned as it is.
        """
        residual = {id(self.parameters[name]): tensor for name, tensor in self._residual.items()}
        added: dict[int, torch.Tensor] = {}
        for tensor in tensors.values():
            if id(tensor) in residual and id(tensor) not in added:
                added[id(tensor)] = tensor.detach() + residual[id(tensor)]
        return {name: added.get(id(tensor), tensor.detach()) for name, tensor in tensors.items()}

    def state_dict(self) -> dict[str, Any]:
        """R, the counts and the normaliser."""
        counts = {name: getattr(self, name) for name in self._COUNTS}
        return {"residual": dict(self._residual), **counts}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._residual = {
            name: tensor.to(self.parameters[name].device, copy=True) for name, tensor in state["residual"].items()
        }
        for name in self._COUNTS:
            setattr(self, name, state[name])

    _COUNTS = ("steps", "scaled_steps", "factor_sum", "normaliser")


def with_gain(start: Tensors, trained: Tensors, gain: float) -> dict[str, Array]:
    """The trained weights, moved on from the round's start: start + gain * (trained - start).

    A control (ours): a larger step, whatever the lesions. Tensors that ``start`` does not have are returned as they
    are. A gain of 1 gives the trained weights bit for bit.
    """
    return {
        name: array + array.dtype.type(gain - 1) * (array - start[name]) if name in start else array
        for name, array in trained.items()
    }


def against_plain(start: Tensors, trained: Tensors, uploaded: Tensors) -> tuple[float, float]:
    """How far the upload is a plain update of another length (notes 6.3).

    Args:
        start: weights at the round's start (theta).
        trained: weights after it (omega).
        uploaded: what is sent in their place (omega + R), all float32 arrays of the same names and shapes.

    Returns:
        The scalar s for which s * (trained - start) comes nearest to uploaded - start, and what remains, relative to
        the length of the plain update. 1 and 0 where nothing was trained.
    """
    sums = sum(_products(start, trained, uploaded), np.zeros(3))
    plain_plain, plain_sent, sent_sent = sums.tolist()
    if plain_plain == 0:
        return 1.0, 0.0
    scalar = plain_sent / plain_plain
    return scalar, float(np.sqrt(max(0.0, sent_sent - scalar * plain_sent) / plain_plain))


def _products(start: Tensors, trained: Tensors, uploaded: Tensors) -> Iterator[Floats]:
    for name, origin in start.items():
        plain = (trained[name] - origin).ravel().astype(np.float64)
        sent = (uploaded[name] - origin).ravel().astype(np.float64)
        yield np.array([plain @ plain, plain @ sent, sent @ sent])
