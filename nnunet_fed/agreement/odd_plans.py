"""Plans that one site's odd voxel sizes have spoiled for all, told with the planner's own numbers. Source: ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nnunet_fed.agreement.fingerprint import LocalFingerprint
from nnunet_fed.agreement.quantiles import Floats
from nnunet_fed.errors import FederationError

ODD = "Before anybody trains: "
"""With this a line of a log begins that tells of odd plans."""
THIN = 4
"""A patch that has fewer voxels along an axis sees next to nothing of an image there."""
FAR = 5.0
"""So many times finer or coarser than its own voxels are, a site's images are hardly what they were."""


def thin_patches(plans: Mapping[str, Any], configurations: Sequence[str]) -> list[str]:
    """A sentence for each configuration whose patch is next to flat.

    Args:
        plans: nnU-Net's, with numbers as JSON has them.
        configurations: of which to tell.
    """
    told = []
    for name in configurations:
        content = plans["configurations"].get(name, {})
        patch = content.get("patch_size", ())
        if len(patch) and min(patch) < THIN:
            told.append(
                f"{name} has a patch of {by(patch)} voxels, so a network would see next to nothing along an axis. The "
                f"planner's numbers: voxel size {by(content['spacing'])}, median shape "
                f"{by(content['median_image_size_in_voxels'])}, from a median voxel size of "
                f"{by(plans['original_median_spacing_after_transp'])} and a median shape of "
                f"{by(plans['original_median_shape_after_transp'])} of all sites' cases. Most likely the voxel sizes "
                "of one site are not what the others' are: compare them before anybody trains. Then correct that "
                "site's files and plan again, in a new attempt, or begin another study, with "
                "'overwrite_target_spacing' in its federation.toml."
            )
    return told


def far_from_own(local: LocalFingerprint, plans: Mapping[str, Any], configurations: Sequence[str]) -> list[str]:
    """A sentence for each configuration whose voxels are far from this site's own.

    Args:
        local: this site's part of the fingerprint.
        plans: nnU-Net's.
        configurations: of which to tell.
    """
    told = []
    for name, target, own, sizes in _resampled(local, plans, configurations):
        spacing, before = np.median(own, 0), np.median(_last(local.shapes_after_crop, plans, target), 0)
        factor = np.maximum(spacing / target, target / spacing).max()
        if factor >= FAR:
            told.append(
                f"{name} has a voxel size of {by(target)}, this site's images have {by(spacing)} (medians): "
                f"{factor:.4g} times as much or as little along an axis. An image of {by(before)} voxels becomes "
                f"one of {by(np.rint(np.median(sizes, 0)))}. {_LOOK} before anybody trains."
            )
    return told


def require_voxels(site: str, local: LocalFingerprint, plans: Mapping[str, Any], wanted: Sequence[str]) -> None:
    """See that something of each image is left once it is resampled; raises :class:`FederationError`."""
    for name, target, own, sizes in _resampled(local, plans, wanted):
        empty = (np.rint(sizes) < 1).any(1)
        if empty.any():
            worst = int(np.argmin(sizes.min(1)))
            raise FederationError(
                f"Site '{site}' cannot preprocess by these plans: {name} has a voxel size of {by(target)}, and of "
                f"{int(empty.sum())} of this site's {len(sizes)} images, such as one with voxels of {by(own[worst])}, "
                f"nothing would be left ({by(sizes[worst])} voxels). Nothing is agreed yet. {_LOOK}, and correct them; "
                "then plan again: with --correct where they were corrected, and with the same command at the others. "
                "Or begin another study, with 'overwrite_target_spacing' in its federation.toml."
            )


_LOOK = "See whether the voxel sizes in this site's files, or those of the other sites, are right"


def _resampled(
    local: LocalFingerprint, plans: Mapping[str, Any], configurations: Sequence[str]
) -> Iterator[tuple[str, Floats, Floats, Floats]]:
    """Name, voxel size, and of each image its own voxel size and the shape that it will have, not rounded."""
    for name in configurations:
        target = np.asarray(plans["configurations"].get(name, {}).get("spacing", ()), float)
        if len(target):
            own = _last(local.spacings, plans, target)
            yield name, target, own, _last(local.shapes_after_crop, plans, target) * own / target


def _last(values: Any, plans: Mapping[str, Any], target: Floats) -> Floats:
    """Along the axes that a configuration has, in the planner's order."""
    ordered: Floats = np.asarray(values, float)[:, list(plans["transpose_forward"])]
    return ordered[:, -len(target) :]


def by(values: Sequence[float] | Any) -> str:
    """Numbers along axes."""
    return " x ".join(f"{float(value):.5g}" for value in values)
