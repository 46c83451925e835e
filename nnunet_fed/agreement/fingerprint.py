"""One fingerprint for all sites: nnU-Net's description of a data set, as if all cases lay in one place.

The format is that of nnU-Net's ``dataset_fingerprint.json``. Source: Isensee et al. 2021 (dataset fingerprint) and
nnunetv2's ``DatasetFingerprintExtractor``; the federated form is ours.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from nnunet_fed.agreement.quantiles import Floats, moments, quantiles
from nnunet_fed.errors import FederationError
from nnunet_fed.exchange.communicator import Collectives, LocalFederation
from nnunet_fed.exchange.keys import PLANNING, key_of
from nnunet_fed.exchange.payload import Array

PERCENTAGES = (0.5, 50.0, 99.5)
INTENSITIES = "foreground_intensity_properties_per_channel"
"""nnU-Net's key of them, in a fingerprint and in plans."""
Intensities = dict[str, dict[str, float]]
"""Properties by the number of the channel."""


@dataclass(frozen=True)
class LocalFingerprint:
    """What one site knows of its own cases; the lists over cases have the same order."""

    spacings: Sequence[Sequence[float]]
    """Voxel size in mm along the array's axes, of each case."""
    shapes_after_crop: Sequence[Sequence[int]]
    """Shape of each case's images after the crop to nonzero."""
    relative_sizes: Sequence[float]
    """Voxels after the crop to nonzero by voxels before it, of each case."""
    intensities: Sequence[Array]
    """Foreground intensities sampled from all cases: a 1D array for each channel."""
    lesion_volumes: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Volumes of the lesions of all cases by class; no part of nnU-Net's fingerprint, but read from the same files."""

    @cached_property
    def alone(self) -> dict[str, Any]:
        """The fingerprint of this site alone, found once: its hundred million intensities take seconds to sort."""
        return LocalFederation(["local"]).run(lambda communicator: harmonise(communicator, self))["local"]


@dataclass(frozen=True)
class PooledGeometry:
    """What nnU-Net's planner reads of the cases' geometry, over all sites' cases; per axis of the arrays.

    Every number equals numpy's for the pooled cases in every bit.
    """

    spacing_10: Floats
    """10th percentile of the spacings."""
    spacing_50: Floats
    """50th percentile of the spacings."""
    median_spacing: Floats
    """``np.median`` of the spacings, whose last bit may differ from the 50th percentile's."""
    median_shape: Floats
    """Median, and 50th percentile, of the shapes after the crop."""
    median_relative_size: float
    """Median of the relative sizes."""


def harmonise(
    communicator: Collectives, local: LocalFingerprint, intensities: Intensities | None = None
) -> dict[str, Any]:
    """Agree on the complete fingerprint of all sites' cases (``geometry = "lists"``).

    The geometry of each case is gathered, in an order that tells nothing of the cases' names; of the intensities only
    sums are, see :func:`pooled_intensities`.

    Args:
        communicator: this site's; all keys begin with ``planning/``.
        local: this site's part; the same number of channels at every site, unless ``intensities`` are given.
        intensities: of this site alone, see :func:`own_intensities`; ``None``: the sites agree on them.

    Returns:
        The fingerprint in plain JSON types, the same at every site but for given intensities.

    Raises:
        FederationError: no site has foreground, or an intensity is not finite.
    """
    cases = sorted(
        [[float(step) for step in spacing], [int(length) for length in shape], float(relative)]
        for spacing, shape, relative in zip(local.spacings, local.shapes_after_crop, local.relative_sizes, strict=True)
    )
    gathered = communicator.gather(key_of(PLANNING, "geometry"), cases)
    spacings, shapes, relative_sizes = zip(*sorted(case for site in gathered.values() for case in site), strict=True)
    intensities = intensities or pooled_intensities(communicator, local)
    return fingerprint_with(spacings, shapes, intensities, float(np.median(relative_sizes)))


def pooled_geometry(communicator: Collectives, local: LocalFingerprint) -> PooledGeometry:
    """Agree on what the planner reads of the geometry, out of sums alone; arguments as in :func:`harmonise`."""
    columns = np.column_stack([local.spacings, local.shapes_after_crop, local.relative_sizes]).astype(np.float64)
    axes = (columns.shape[1] - 1) // 2
    # the 10th percentile of spacings only: nothing is asked that the planner does not read
    probabilities = [[0.1, 0.5]] * axes + [[0.5, 0.5]] * (axes + 1)
    order = quantiles(communicator, key_of(PLANNING, "geometry"), list(columns.T), probabilities)
    medians: Floats = np.median(order.neighbours[:, 1], axis=1)
    return PooledGeometry(
        spacing_10=order.values[:axes, 0],
        spacing_50=order.values[:axes, 1],
        median_spacing=medians[:axes],
        median_shape=medians[axes : 2 * axes],
        median_relative_size=float(medians[-1]),
    )


def middle_shapes(communicator: Collectives, shapes: Sequence[Sequence[int]]) -> list[list[int]]:
    """Two shapes with, per axis, the median of all sites' shapes: their two middle values, the smaller ones first.

    Args:
        communicator: this site's; all keys begin with ``planning/``.
        shapes: of this site's cases.
    """
    columns = np.asarray(shapes, dtype=np.float64).T
    neighbours = quantiles(communicator, key_of(PLANNING, "shapes"), list(columns), [0.5]).neighbours[:, 0]
    return [[int(length) for length in shape] for shape in neighbours.T]


def pooled_intensities(communicator: Collectives, local: LocalFingerprint) -> Intensities:
    """Agree on nnU-Net's :data:`INTENSITIES`, out of sums alone.

    Percentiles, minimum and maximum equal those of the pooled values in every bit. Mean and standard deviation are
    float64 sums, whereas nnU-Net adds up float32: there it differs in the last digits of float32. Arguments and errors
    as in :func:`harmonise`.
    """
    probabilities = np.true_divide((0.0, *PERCENTAGES, 100.0), 100)
    order = quantiles(communicator, key_of(PLANNING, "quantiles"), local.intensities, probabilities)
    moment = moments(communicator, key_of(PLANNING, "moments"), local.intensities)
    return {
        str(channel): {
            "mean": float(moment.mean[channel]),
            "median": float(median),
            "std": float(moment.std[channel]),
            "min": float(smallest),
            "max": float(largest),
            "percentile_99_5": float(high),
            "percentile_00_5": float(low),
        }
        for channel, (smallest, low, median, high, largest) in enumerate(order.values)
    }


def own_intensities(local: LocalFingerprint) -> Intensities:
    """What :func:`pooled_intensities` says of this site's cases alone; nothing is sent.

    Raises:
        FederationError: no case has foreground, or an intensity is not finite.
    """
    if not all(len(channel) for channel in local.intensities):
        raise FederationError(
            "No training case of this site has foreground, and no other site's intensities stand for those of its "
            "channels. Check the labels, or leave the site out of the study."
        )
    return LocalFederation(["local"]).run(lambda communicator: pooled_intensities(communicator, local))["local"]


def fingerprint_with(
    spacings: Sequence[Sequence[float]],
    shapes: Sequence[Sequence[float]],
    intensities: Intensities,
    relative_size: float,
) -> dict[str, Any]:
    """A fingerprint in nnU-Net's format and in plain JSON types."""
    return {
        "spacings": [list(spacing) for spacing in spacings],
        "shapes_after_crop": [list(shape) for shape in shapes],
        INTENSITIES: intensities,
        "median_relative_size_after_cropping": relative_size,
    }


def fingerprint_of(local: LocalFingerprint) -> dict[str, Any]:
    """The fingerprint of one site alone, for the caller to keep; errors as in :func:`harmonise`."""
    return copy.deepcopy(local.alone)
