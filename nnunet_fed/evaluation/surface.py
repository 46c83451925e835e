"""Dice, HD95 and NSD of a case, class by class; the last two by MONAI (``pip install 'nnunet-fed[compare]'``).

* **Dice**: twice the common voxels over the sum of both; as in nnU-Net, undefined where both are empty.
* **HD95**: 95th percentile of the distances between the surfaces in mm, the larger of the two directions (MONAI's
  ``compute_hausdorff_distance``). Undefined where reference or prediction is empty: a distance to nothing is none.
* **NSD**: share of both surfaces that lies within a tolerance of the other one (Nikolov et al. 2021,
  arXiv:1809.04430; MONAI's ``compute_surface_dice`` with the area of each element of the surface). 0 where just one
  is empty, undefined where both are.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.evaluation.lesions import Mask, Segmentation, foreground_classes
from nnunet_fed.study.labels import IGNORE

PERCENTILE = 95.0


@dataclass(frozen=True)
class Scores:
    """How a prediction agrees with the reference; ``None``: undefined."""

    dice: float | None
    hd95: float | None
    """In mm."""
    nsd: float | None


def require_monai() -> None:
    """See that MONAI is installed, before hours of training; raises :class:`ConfigurationError`."""
    if find_spec("monai") is None:
        raise ConfigurationError("HD95 and NSD need MONAI: install it with  pip install 'nnunet-fed[compare]'.")


def evaluate_surfaces(
    reference: Segmentation,
    prediction: Segmentation,
    spacing: Sequence[float],
    labels: Mapping[str, Any],
    tolerance: float,
) -> dict[str, Scores]:
    """Compare a case's prediction with its reference, class by class.

    What is predicted where the reference says ``ignore`` is left out.

    Args:
        reference: what is right, of shape (z, y, x); z is 1 for a 2D image, which has outlines instead of surfaces.
        prediction: of the same shape.
        spacing: of the voxels in mm, along z, y, x.
        labels: of ``dataset.json``.
        tolerance: of NSD in mm.
    """
    considered = reference != labels[IGNORE] if IGNORE in labels else np.ones(reference.shape, bool)
    return {
        name: _scores(
            np.isin(reference, values), np.isin(prediction, values) & considered, [float(s) for s in spacing], tolerance
        )
        for name, values in foreground_classes(labels).items()
    }


def _scores(reference: Mask, prediction: Mask, spacing: list[float], tolerance: float) -> Scores:
    total = int(reference.sum()) + int(prediction.sum())
    if not total:
        return Scores(None, None, None)
    dice = 2 * int((reference & prediction).sum()) / total
    if not reference.any() or not prediction.any():
        return Scores(dice, None, 0.0)

    # MONAI brings torch with it
    import torch
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    if reference.shape[0] == 1:
        reference, prediction, spacing = reference[0], prediction[0], spacing[1:]
    predicted, right = (torch.from_numpy(mask)[None, None] for mask in (prediction, reference))
    settings: dict[str, Any] = {"include_background": True, "spacing": spacing}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI's own of what it will change
        hd95 = compute_hausdorff_distance(predicted, right, percentile=PERCENTILE, **settings)
        nsd = compute_surface_dice(predicted, right, class_thresholds=[tolerance], use_subvoxels=True, **settings)
    return Scores(dice, _finite(hd95), _finite(nsd))


def _finite(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
