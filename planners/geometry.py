"""The planner of a federation with the fingerprint of all sites' cases, whose geometry is told in full or not at all.

``geometry = "private"`` finds the few medians that nnU-Net's planner reads out of sums, and hands the planner a
fingerprint of representative cases for which it plans the same. Source: ours, around nnunetv2's ``ExperimentPlanner``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

from nnunet_fed.agreement.fingerprint import (
    Intensities,
    LocalFingerprint,
    fingerprint_with,
    harmonise,
    middle_shapes,
    pooled_geometry,
    pooled_intensities,
)
from nnunet_fed.exchange.communicator import Collectives

PlannerOf = Callable[[dict[str, Any]], Any]


def harmonised_planner(
    communicator: Collectives,
    local: LocalFingerprint,
    geometry: Literal["private", "lists"],
    planner_of: PlannerOf,
    intensities: Intensities | None = None,
) -> Any:
    """Agree on a fingerprint, and make the planner that reads it.

    With ``lists`` the fingerprint is nnU-Net's own. With ``private`` it describes two cases of the target spacing, with
    the two middle shapes that all sites' cases have at that spacing: nnU-Net plans from them what it would plan from
    all cases, but for two entries that it only shows, and these are in :attr:`HarmonisedPlanner.original_medians`.

    Args:
        communicator: this site's; all keys begin with ``planning/``.
        local: this site's part.
        geometry: what the sites tell each other of the cases' spacings and shapes.
        planner_of: makes this site's planner of a fingerprint in nnU-Net's format; called twice with ``private``, the
            second time with the final fingerprint.
        intensities: of this site alone; ``None``: the sites agree on them.

    Returns:
        The planner; its ``dataset_fingerprint`` is the same at every site but for given intensities.

    Raises:
        FederationError: no site has foreground, or an intensity is not finite.
    """
    if geometry == "lists":
        return planner_of(harmonise(communicator, local, intensities))
    intensities = intensities or pooled_intensities(communicator, local)
    pooled = pooled_geometry(communicator, local)

    # of eleven values, the second smallest is the 10th percentile and the sixth is the 50th
    spacings = [pooled.spacing_10.tolist()] * 2 + [pooled.spacing_50.tolist()] * 9
    shapes = [pooled.median_shape.tolist()] * 11
    representative = fingerprint_with(spacings, shapes, intensities, pooled.median_relative_size)
    target = [float(step) for step in planner_of(representative).determine_fullres_target_spacing()]

    resampled = [
        compute_new_shape(shape, [float(step) for step in spacing], target)
        for spacing, shape in zip(local.spacings, local.shapes_after_crop, strict=True)
    ]
    middle = middle_shapes(communicator, resampled)
    planner = planner_of(fingerprint_with([target] * 2, middle, intensities, pooled.median_relative_size))
    planner.overwrite_target_spacing = target
    planner.original_medians = (pooled.median_spacing, pooled.median_shape)
    return planner
