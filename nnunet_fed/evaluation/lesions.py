"""Results by lesion size: lesions are connected components, small ones the smallest fifth of all training lesions.

Voxels belong to one lesion if they touch, be it at a corner (26 neighbours, 8 in a single slice). A class of a data set
is a label or, where ``dataset.json`` lists several, their union; background and ``ignore`` are none.

Source: ours, after the lesion-wise Dice of the BraTS 2023 challenge, but without its dilation and its penalty for
components that are no lesion: these are counted apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cc3d
import numpy as np
import numpy.typing as npt

from nnunet_fed.agreement.quantiles import Floats, Integers, quantiles
from nnunet_fed.exchange.communicator import Collectives
from nnunet_fed.exchange.keys import key_of
from nnunet_fed.study.labels import IGNORE, in_numbers

SMALL_LESIONS = "small_lesions"
"""Key, beside the study in the plans and in results, of the largest volume of a small lesion by class."""
SMALL_SHARE = 0.2
METRICS = {
    "dice_small": ("dice", "small"),
    "dice_large": ("dice", "large"),
    "dice_lesions": ("dice", "all"),
    "lesion_recall_small": ("detected", "small"),
    "lesion_recall_large": ("detected", "large"),
    "lesion_recall": ("detected", "all"),
}
"""Means over lesions: what of a lesion is averaged, and over which lesions."""

Segmentation = npt.NDArray[Any]
"""Labels of shape (z, y, x), of any type that holds whole numbers; z is 1 for a 2D image."""
Mask = npt.NDArray[np.bool_]
Thresholds = Mapping[str, float | None]
"""Largest volume of a small lesion by class, in mm^3 (mm^2 in 2D); ``None``: no site has one to learn it from."""


@dataclass(frozen=True)
class Lesion:
    """A lesion of the reference, and what the prediction made of it."""

    volume: float
    """In mm^3; the area in mm^2 in 2D."""
    small: bool | None
    """``None``: the class has no threshold."""
    detected: bool
    """Whether a predicted voxel of the class lies in it."""
    dice: float
    """With the union of all predicted components that touch it; 0 if none does."""


@dataclass(frozen=True)
class CaseResult:
    """Lesions of one class in one case."""

    lesions: tuple[Lesion, ...]
    false_positives: int
    """Predicted components that touch no lesion."""


def foreground_classes(labels: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Values of each class.

    Args:
        labels: of ``dataset.json``: a number or a list of numbers for each name.
    """
    values = {name: tuple(value) if isinstance(value, list) else (value,) for name, value in in_numbers(labels).items()}
    return {name: of_class for name, of_class in values.items() if name != IGNORE and any(of_class)}


def lesion_volumes(
    segmentation: Segmentation, spacing: Sequence[float], labels: Mapping[str, Any]
) -> dict[str, list[float]]:
    """Volumes of the lesions of each class in mm^3, in 2D their areas in mm^2.

    Args:
        segmentation: the reference.
        spacing: of the voxels in mm, along z, y, x.
        labels: of ``dataset.json``.
    """
    unit = _voxel_volume(segmentation, spacing)
    classes = foreground_classes(labels)
    return {name: (_components(_mask(segmentation, classes[name]))[1] * unit).tolist() for name in classes}


def small_lesion_thresholds(
    communicator: Collectives, key: str, volumes: Mapping[str, Sequence[float]]
) -> dict[str, float | None]:
    """Agree on the 20th percentile of each class's volumes at all sites, out of sums alone.

    It equals ``np.quantile`` of the pooled volumes in every bit. A lesion of just that volume is a small one, so at
    least a fifth of the training lesions are, and more where many are equally large. One sum tells which classes
    have lesions; if any has, those of :func:`nnunet_fed.agreement.quantiles.quantiles` follow.

    Args:
        communicator: this site's.
        key: prefix of the keys of the sums.
        volumes: of this site's lesions by class; the same classes at every site.

    Returns:
        Thresholds, the same at every site; ``None`` for a class without a lesion anywhere.
    """
    names = sorted(volumes)  # the order in dataset.json is each site's own
    if not names:
        return {}
    present = communicator.sum(key_of(key, "present"), np.array([len(volumes[name]) > 0 for name in names], np.int64))
    known = [name for name, sites in zip(names, present, strict=True) if sites]
    found: dict[str, float | None] = dict.fromkeys(names)
    if known:
        samples = [np.asarray(volumes[name], np.float64) for name in known]
        values = quantiles(communicator, key, samples, [SMALL_SHARE]).values[:, 0]
        found.update(zip(known, values.tolist(), strict=True))
    return found


def evaluate(
    reference: Segmentation,
    prediction: Segmentation,
    spacing: Sequence[float],
    labels: Mapping[str, Any],
    thresholds: Thresholds,
) -> dict[str, CaseResult]:
    """Compare a case's prediction with its reference, lesion by lesion.

    A predicted component that touches several lesions counts for each of them, with all its voxels. What is predicted
    where the reference says ``ignore`` is left out before components are formed.

    Args:
        reference: what is right.
        prediction: of the same shape.
        spacing: of the voxels in mm, along z, y, x.
        labels: of ``dataset.json``.
        thresholds: lesions of up to this volume are small; a class that is not in it has none.

    Returns:
        A result for each class.
    """
    unit = _voxel_volume(reference, spacing)
    considered = reference != labels[IGNORE] if IGNORE in labels else np.ones(reference.shape, bool)
    return {
        name: _compare(_mask(reference, values), _mask(prediction, values) & considered, unit, thresholds.get(name))
        for name, values in foreground_classes(labels).items()
    }


def aggregate(cases: Iterable[Mapping[str, CaseResult]]) -> dict[str, dict[str, Any]]:
    """Means over the lesions of all cases: by metric (:data:`METRICS`), then by class.

    Returns:
        The means, ``None`` where there is no lesion, and under ``lesions`` how many there are (``small``, ``large``,
        ``all``) and how many ``false_positives``. Lesions of a class without a threshold are neither small nor large.
    """
    lesions: dict[str, list[Lesion]] = {}
    false_positives: dict[str, int] = {}
    for case in cases:
        for name, result in case.items():
            lesions.setdefault(name, []).extend(result.lesions)
            false_positives[name] = false_positives.get(name, 0) + result.false_positives
    strata = {
        name: {
            "small": [lesion for lesion in found if lesion.small],
            "large": [lesion for lesion in found if lesion.small is False],
            "all": found,
        }
        for name, found in lesions.items()
    }
    counts = {
        name: {**{stratum: len(found) for stratum, found in of_class.items()}, "false_positives": false_positives[name]}
        for name, of_class in strata.items()
    }
    means = {
        metric: {
            name: _mean([getattr(lesion, figure) for lesion in of_class[stratum]]) for name, of_class in strata.items()
        }
        for metric, (figure, stratum) in METRICS.items()
    }
    return {"lesions": counts, **means}


def combined(sites: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """What :func:`aggregate` says of all sites' lesions together, from what it says of each site's."""
    names = list(dict.fromkeys(name for site in sites for name in site["lesions"]))
    counts = {
        name: {
            kind: sum(site["lesions"][name][kind] for site in sites if name in site["lesions"])
            for kind in ("small", "large", "all", "false_positives")
        }
        for name in names
    }
    means = {
        metric: {
            name: _mean(
                [site[metric][name] for site in sites if site[metric].get(name) is not None],
                [site["lesions"][name][stratum] for site in sites if site[metric].get(name) is not None],
            )
            for name in names
        }
        for metric, (_, stratum) in METRICS.items()
    }
    return {"lesions": counts, **means}


def _voxel_volume(segmentation: Segmentation, spacing: Sequence[float]) -> float:
    """In mm^3; in 2D in mm^2, since nnU-Net's readers make a thickness up for a single slice."""
    steps = spacing[1:] if segmentation.shape[0] == 1 else spacing
    # in ascending order: the last bit of a product depends on the order, which differs between readers
    return math.prod(sorted(float(step) for step in steps))


def _mask(segmentation: Segmentation, values: Sequence[int]) -> Mask:
    mask: Mask = np.logical_or.reduce([segmentation == value for value in values])
    return mask


def _components(mask: Mask) -> tuple[npt.NDArray[Any], Integers]:
    """Connected components, numbered from 1, and the number of voxels of each."""
    components, number = cc3d.connected_components(mask, connectivity=26, return_N=True)
    return components, np.bincount(components[mask], minlength=number + 1)[1:]


def _compare(reference: Mask, prediction: Mask, unit: float, threshold: float | None) -> CaseResult:
    lesions, sizes = _components(reference)
    predicted, predicted_sizes = _components(prediction)
    both = reference & prediction
    # pairs of a lesion and a predicted component that share voxels, as one number each
    width = len(predicted_sizes) + 1
    pairs, shared = np.unique(lesions[both].astype(np.int64) * width + predicted[both], return_counts=True)
    lesion, component = pairs // width - 1, pairs % width - 1
    overlap = _sums(lesion, shared, len(sizes))
    dice = 2 * overlap / (sizes + _sums(lesion, predicted_sizes[component], len(sizes)))
    return CaseResult(
        tuple(
            Lesion(volume, None if threshold is None else volume <= threshold, voxels > 0, value)
            for volume, voxels, value in zip((sizes * unit).tolist(), overlap.tolist(), dice.tolist(), strict=True)
        ),
        false_positives=len(predicted_sizes) - len(np.unique(component)),
    )


def _sums(places: Integers, values: Integers, length: int) -> Floats:
    return np.bincount(places, weights=values, minlength=length).astype(np.float64)


def _mean(values: Sequence[float], weights: Sequence[int] | None = None) -> float | None:
    if not values:
        return None
    weights = weights or [1] * len(values)
    return math.fsum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
