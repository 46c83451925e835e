"""One fingerprint for all sites: nnU-Net's description of a data set, as if all cases lay in one place.

The format is that of nnU-Net's ``dataset_fingerprint.json``. Source: Isensee et al. 2021 (dataset fingerprint) and
nnunetv2's ``DatasetFingerprintExtractor``; the federated form is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunet_fed.communicator import Collectives, LocalFederation
from nnunet_fed.payload import Array
from nnunet_fed.statistics import moments, quantiles

PERCENTAGES = (0.5, 50.0, 99.5)


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


def harmonise(communicator: Collectives, local: LocalFingerprint) -> dict[str, Any]:
    """Agree on the fingerprint of all sites' cases.

    The geometry of each case is gathered, in an order that tells nothing of the cases' names; of the intensities only
    sums are. Percentiles, minimum and maximum equal those of the pooled values in every bit. Mean and standard
    deviation are float64 sums, whereas nnU-Net adds up float32: there it differs in the last digits of float32.

    Args:
        communicator: this site's seat; all keys begin with ``planning/``.
        local: this site's part; the same number of channels at every site.

    Returns:
        The fingerprint in plain JSON types, the same at every site.

    Raises:
        FederationError: no site has foreground, or an intensity is not finite.
    """
    cases = sorted(
        [[float(step) for step in spacing], [int(length) for length in shape], float(relative)]
        for spacing, shape, relative in zip(local.spacings, local.shapes_after_crop, local.relative_sizes, strict=True)
    )
    gathered = communicator.gather("planning/geometry", cases)
    spacings, shapes, relative_sizes = zip(*sorted(case for site in gathered.values() for case in site), strict=True)

    order = quantiles(communicator, "planning/quantiles", local.intensities, np.true_divide(PERCENTAGES, 100))
    moment = moments(communicator, "planning/moments", local.intensities)
    return {
        "spacings": list(spacings),
        "shapes_after_crop": list(shapes),
        "foreground_intensity_properties_per_channel": {
            str(channel): {
                "mean": float(moment.mean[channel]),
                "median": float(median),
                "std": float(moment.std[channel]),
                "min": float(order.minimum[channel]),
                "max": float(order.maximum[channel]),
                "percentile_99_5": float(high),
                "percentile_00_5": float(low),
            }
            for channel, (low, median, high) in enumerate(order.values)
        },
        "median_relative_size_after_cropping": float(np.median(relative_sizes)),
    }


def fingerprint_of(local: LocalFingerprint) -> dict[str, Any]:
    """The fingerprint of one site alone; errors as in :func:`harmonise`."""
    return LocalFederation(["local"]).run(lambda communicator: harmonise(communicator, local))["local"]
