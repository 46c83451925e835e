"""Exact quantiles and moments of values that lie at several sites, out of ``sum`` alone.

Floating-point numbers are mapped to whole numbers in the same order, and the order statistics that a quantile needs are
found among these by histogram refinement: every round counts the keys that continue a known prefix by some more bits.
So the quantiles are those of the pooled values, bit for bit. Source: radix selection; the federated form is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_fed.errors import DisagreementError, FederationError
from nnunet_fed.exchange.communicator import Collectives
from nnunet_fed.exchange.keys import key_of
from nnunet_fed.exchange.payload import Array

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

BITS_PER_ROUND = 11
"""Three rounds for float32, six for float64; a histogram has 2**11 bins of 8 bytes."""
_PIECE = 2**20
"""Values that are copied to float64 at a time."""
_CACHED = 2**15
"""Values that are mapped at a time: of so many the intermediate results stay in the processor's cache."""


@dataclass(frozen=True)
class Quantiles:
    """Quantiles of each channel's pooled values."""

    count: Integers
    """Number of values at all sites, of shape (channels,)."""
    neighbours: Floats
    """The pooled values (order statistics) between which each quantile is interpolated, of shape (channels,
    probabilities, 2). Both are the quantile where no interpolation is needed. The mean of those for 0.5 is the median,
    whose last bit may differ from the quantile's, in numpy as here."""
    values: Floats
    """Quantiles, of shape (channels, probabilities)."""


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of each channel's pooled values, all of shape (channels,)."""

    count: Integers
    mean: Floats
    std: Floats
    """Of the population (``ddof`` 0), as numpy's default is."""


def quantiles(communicator: Collectives, key: str, samples: Sequence[Array], probabilities: npt.ArrayLike) -> Quantiles:
    """Quantiles of the pooled values: what ``np.quantile`` with an array of probabilities says of all sites' values.

    Bit-equal, except that a zero has no sign. As in numpy, float32 values are subtracted in float32 unless an array of
    another type takes part, be it empty. One sum agrees on types and counts, three find the order statistics (six if
    some site has values that float32 cannot represent).

    Args:
        communicator: this site's.
        key: prefix of the keys of the sums.
        samples: this site's values, one 1D array a channel; the same number of channels at every site.
        probabilities: of shape (probabilities,) or (channels, probabilities), within 0 (the minimum) and 1 (the
            maximum); the same at every site.

    Raises:
        FederationError: a value is not finite, or a channel has no values at any site.
        DisagreementError: what the coordinator says is no sum in which this site's values are.
    """
    _check_finite(communicator, key, samples)
    promoted = any(channel.dtype != np.float32 for channel in samples)
    wide = promoted and not all(_fits_float32(channel) for channel in samples)
    sizes = [len(channel) for channel in samples]
    any_promoted, any_wide, *counts = communicator.sum(
        key_of(key, "counts"), np.array([promoted, wide, *sizes], np.int64)
    )
    count = np.array(counts, dtype=np.int64)
    _check_some(key, count)
    _check_possible(key, np.array(sizes, np.int64), count)

    # numpy's definition of 'linear': a virtual index into the sorted values, between two of which it interpolates
    virtual = (count[:, None] - 1) * np.asarray(probabilities, dtype=np.float64)
    before = np.floor(virtual).astype(np.int64)
    after = np.ceil(virtual).astype(np.int64)

    kind = np.float64 if any_wide else np.float32
    keys = [_sorted_keys(channel.astype(kind, copy=False)) for channel in samples]
    found = _values(_order_statistics(communicator, key, keys, count, np.concatenate([before, after], axis=1)))
    neighbours = np.stack(np.split(found.astype(np.float64 if any_promoted else np.float32), 2, axis=1), axis=-1)
    # of two values, numpy's quantile for the fraction is numpy's own interpolation between them
    values = [
        np.quantile(pair, np.array([fraction]))[0]
        for pair, fraction in zip(neighbours.reshape(-1, 2), (virtual - before).ravel(), strict=True)
    ]
    return Quantiles(
        count,
        neighbours=neighbours.astype(np.float64),
        values=np.array(values, dtype=np.float64).reshape(virtual.shape),
    )


def moments(communicator: Collectives, key: str, samples: Sequence[Array]) -> Moments:
    """Mean and standard deviation of the pooled values, in float64 and in two passes, hence two sums.

    Arguments and errors as in :func:`quantiles`.
    """
    _check_finite(communicator, key, samples)
    local = np.array([[len(channel), _total(channel)] for channel in samples], dtype=np.float64)
    sizes, totals = communicator.sum(key_of(key, "sum"), local).T
    count = sizes.astype(np.int64)
    _check_some(key, count)
    mean: Floats = totals / sizes
    deviations = [_total(channel, centre) for channel, centre in zip(samples, mean, strict=True)]
    squares = communicator.sum(key_of(key, "squares"), np.array(deviations, dtype=np.float64))
    return Moments(count, mean, std=np.sqrt(squares / sizes))


def _check_finite(communicator: Collectives, key: str, samples: Sequence[Array]) -> None:
    for number, channel in enumerate(samples):
        if not np.isfinite(channel).all():
            raise FederationError(
                f"Site '{communicator.site}' has values for '{key}' that are not finite (channel {number}); "
                "replace NaN and infinity by numbers that make sense for these images."
            )


def _check_some(key: str, count: Integers) -> None:
    if not count.all():
        raise FederationError(
            f"No site has a value for '{key}' (channel {int(np.argmin(count))}); "
            "check that the labels of the training cases contain foreground. A site that corrects them plans again "
            "with --correct, the others with the same command."
        )


def _fits_float32(values: Array) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.all(values.astype(np.float32) == values))


def _sorted_keys(values: Array) -> Array:
    """Whole numbers that sort as the floating-point values do, sorted; -0.0 counts as 0.0."""
    keys = (values + 0.0).view(f"u{values.itemsize}")
    sign = _sign_bit(keys.dtype)
    for start in range(0, len(keys), _CACHED):
        piece = keys[start : start + _CACHED]
        piece ^= np.where(piece & sign, ~keys.dtype.type(0), sign)
    keys.sort()
    return keys


def _values(keys: Array) -> Array:
    """Inverse of the map in :func:`_sorted_keys`."""
    sign = _sign_bit(keys.dtype)
    return np.where(keys & sign, keys ^ sign, ~keys).view(f"f{keys.itemsize}")


def _sign_bit(dtype: np.dtype[Any]) -> Any:
    return dtype.type(1 << (8 * dtype.itemsize - 1))


def _check_possible(key: str, own: Integers, pooled: Integers, total: int | None = None) -> None:
    """See that a sum over the sites can be one: no less than this site's part and, if it is known, of this total."""
    if np.any(pooled < own) or (total is not None and np.sum(pooled) != total):
        raise DisagreementError(
            f"The coordinator's sum for '{key}' cannot be: it does not go with this site's own counts, or with the "
            "sums before it. Nothing more is told. Ask the study's operator what runs there."
        )


def _order_statistics(
    communicator: Collectives, key: str, keys: Sequence[Array], count: Integers, ranks: Integers
) -> Array:
    """The keys of given ranks among all sites' keys.

    Args:
        communicator: this site's.
        key: prefix of the keys of the sums.
        keys: this site's keys, one sorted array a channel, all of one unsigned type.
        count: number of keys at all sites, of shape (channels,).
        ranks: of shape (channels, ranks), from 0 to the channel's pooled count less 1; the same at every site.

    Returns:
        Keys of the shape of ``ranks``.

    Raises:
        DisagreementError: a sum does not go with this site's counts, or with the sums before it. A coordinator could
            otherwise lead the search to wherever this site has a value, step by step.
    """
    unsigned = keys[0].dtype.type
    ranks = ranks.copy()  # from here on: rank among the keys that share the prefix
    prefixes = np.zeros(ranks.shape, dtype=unsigned)
    totals = {(channel, unsigned(0)): int(number) for channel, number in enumerate(count)}
    unknown = 8 * keys[0].itemsize
    while unknown:
        bits = min(BITS_PER_ROUND, unknown)
        unknown -= bits
        bins = np.arange(2**bits, dtype=unsigned) << unsigned(unknown)
        # ranks that share a prefix share its histogram
        wanted = [(channel, prefix) for channel, row in enumerate(prefixes) for prefix in np.unique(row)]
        local = [_histogram(keys[channel], prefix | bins) for channel, prefix in wanted]
        pooled = communicator.sum(key_of(key, f"bits-{unknown}"), np.array(local, dtype=np.int64))
        parts, totals_before, totals = zip(wanted, local, pooled, strict=True), totals, {}
        for (channel, prefix), own, histogram in parts:
            _check_possible(key, own, histogram, totals_before[channel, prefix])
            below = np.concatenate([[0], np.cumsum(histogram)])
            here = prefixes[channel] == prefix
            chosen = np.searchsorted(below, ranks[channel, here], side="right") - 1
            ranks[channel, here] -= below[chosen]
            prefixes[channel, here] |= bins[chosen]
            totals |= {(channel, prefix | bins[bin]): int(histogram[bin]) for bin in np.unique(chosen)}
    return prefixes


def _histogram(keys: Array, starts: Array) -> Integers:
    """Number of sorted keys in each of the adjoining bins of equal width that begin at ``starts``."""
    last = starts[-1] + (starts[1] - starts[0] - starts.dtype.type(1))  # the end itself may not fit into the type
    edges = np.append(np.searchsorted(keys, starts), np.searchsorted(keys, last, side="right"))
    return np.diff(edges).astype(np.int64)


def _total(values: Array, centre: float | None = None) -> float:
    """Sum of the values, or of their squared deviations from ``centre``."""
    pieces = (values[start : start + _PIECE].astype(np.float64) for start in range(0, len(values), _PIECE))
    return math.fsum(float(np.sum(piece if centre is None else np.square(piece - centre))) for piece in pieces)
