"""Means over cases with confidence intervals: percentile bootstrap, in which every site counts the same. Source: ours.

The interval is that of ``scipy.stats.bootstrap`` with ``method="percentile"`` (Efron & Tibshirani 1993, chapter 13).
Cases are drawn with replacement within each site. The seeds of a training are no cases: they are averaged before.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from nnunet_fed.agreement.quantiles import Floats

LEVEL = 0.95
"""Of the intervals."""
RESAMPLES = 10_000
_BATCH = 1000
"""Resamples that are held in memory together."""


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval; ``None`` where there are no cases, or too few for an interval."""

    mean: float | None
    low: float | None
    high: float | None


def interval(sites: Sequence[Sequence[float]], resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The mean of the sites' means, and its percentile interval over cases.

    The order of a site's values changes nothing.

    Args:
        sites: a value for each case of each site; sites without values do not count.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        Mean and interval; the interval is ``None`` if a site has a single value, whose spread nobody knows.
    """
    samples = [np.sort(np.asarray(values, np.float64)) for values in sites if len(values)]
    if not samples:
        return Interval(None, None, None)
    mean = float(_mean_of_means(*samples))
    if any(len(sample) < 2 for sample in samples):
        return Interval(mean, None, None)
    found = bootstrap(
        samples, _mean_of_means, n_resamples=resamples, batch=_BATCH, vectorized=True, confidence_level=LEVEL,
        method="percentile", random_state=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Interval(mean, float(found.low), float(found.high))


def paired(
    first: Sequence[Mapping[str, float]],
    second: Sequence[Mapping[str, float]],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """How much two methods differ on the same cases: :func:`interval` of first minus second.

    Args:
        first: by site, then by case: a value of the one method.
        second: the same sites, of the other method. A case that has a value of one method only does not count.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    both = [
        [ours[case] - theirs[case] for case in ours if case in theirs]
        for ours, theirs in zip(first, second, strict=True)
    ]
    return interval(both, resamples, seed)


def deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation; ``None`` of fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def _mean_of_means(*samples: Floats, axis: int = -1) -> Any:
    return np.mean([np.mean(sample, axis=axis) for sample in samples], axis=0)
