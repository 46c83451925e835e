"""Whether this site's cases are enough, for the study and for its fold, and what has changed about them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from nnunet_fed.agreement.fingerprint import LocalFingerprint
from nnunet_fed.datasets.findings import counted
from nnunet_fed.datasets.folds import FOLDS, FoldChoice, has_folds
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.files import free_bytes
from nnunet_fed.planners.dataset import RawDataset
from nnunet_fed.planners.leftovers import look_at_old_folds, tell_changed_cases
from nnunet_fed.study.federation import Federation, Fold

logger = logging.getLogger(__name__)
BYTES_OF_A_VOXEL = 4
"""As nnU-Net stores it; packing saves little of images."""


def check_cases(site: str, dataset: RawDataset, study: Federation, folds: FoldChoice) -> None:
    """See that the cases are enough, and what has changed since the last planning.

    Raises:
        ConfigurationError: they are fewer than the study asks for, or the folds of an earlier training cannot be kept.
    """
    tell_changed_cases(dataset)
    if len(dataset.cases) < study.min_cases:
        raise ConfigurationError(
            f"Site '{site}' has {len(dataset.cases)} training cases in {dataset.name}, but the study asks every site "
            f"for at least {study.min_cases}, since sums over few cases tell what these are. Nothing was sent; "
            "leave the site out of the study, or lower 'min_cases' in federation.toml."
        )
    look_at_old_folds(dataset, folds)
    too_few = not has_folds(len(dataset.cases), dataset.folder, dataset.preprocessed)
    if too_few and study.folds:
        logger.warning(
            "Site '%s' has %s, too few for nnU-Net's %d folds: set 'fold = \"all\"' in site.toml. It then trains each "
            "fold of the study on all of them, and validates on the cases that it trains on.",
            site, counted(len(dataset.cases), "training case"), FOLDS,
        )  # fmt: skip
    elif too_few:
        logger.warning(
            "Site '%s' has %s, too few for nnU-Net's %d folds, and trains on all of them: it gives nnUNetv2_train the "
            "fold 'all' in the place of %s. It then validates on the cases that it trains on.",
            site, counted(len(dataset.cases), "training case"), FOLDS, study.fold,
        )  # fmt: skip


def trained_fold(dataset: RawDataset, study: Federation) -> Fold:
    """The study's fold, or ``all`` at a site that has too few cases for folds, and none of its own making.

    Of several folds the first: the results of each have a folder of their own, at such a site, too.
    """
    return study.fold if study.folds or has_folds(len(dataset.cases), dataset.folder, dataset.preprocessed) else "all"


def warn_of_little_room(
    dataset: RawDataset, local: LocalFingerprint, plans: Mapping[str, Any], configurations: Sequence[str]
) -> None:
    """Say so if the disk has less room than the preprocessed cases of some configurations take unpacked."""
    needed = 0.0
    channels = len(dataset.channel_names) + 1  # and the labels
    for name in configurations:
        target = plans["configurations"][name]["spacing"]
        for shape, spacing in zip(local.shapes_after_crop, local.spacings, strict=True):
            ordered = [(shape[axis], spacing[axis]) for axis in plans["transpose_forward"]]
            scale = [1.0] * (len(ordered) - len(target))  # 2d keeps its slices
            scale += [step / new for (_, step), new in zip(ordered[len(scale) :], target, strict=True)]
            needed += math.prod(length * factor for (length, _), factor in zip(ordered, scale, strict=True)) * channels
    free = free_bytes(dataset.preprocessed)
    if free < needed * BYTES_OF_A_VOXEL:
        logger.warning(
            "%s has %.0f MB free, and %s preprocessed may take %.0f MB. Make room; if the disk fills, planning ends, "
            "and the same command goes on.",
            dataset.preprocessed, free / 1e6, ", ".join(configurations), needed * BYTES_OF_A_VOXEL / 1e6,
        )  # fmt: skip
