"""Where fingerprints lie beside the preprocessed cases: this site's own, which nnU-Net reads, and the federation's.

nnU-Net plans from ``dataset_fingerprint.json``, whoever wrote it, and a training copies it into the results. So that
file tells of this site's cases alone, one by one, and no trainer of a federation copies it (:func:`without_cases`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_fed.agreement.fingerprint import INTENSITIES, LocalFingerprint, fingerprint_of, fingerprint_with
from nnunet_fed.files import move, write_json

OWN = "dataset_fingerprint.json"
"""nnU-Net's name of what it plans from."""
COMMON = "dataset_fingerprint_federation.json"
"""From which the sites have planned together; for people and the report."""
OWN_OF_0_1 = "dataset_fingerprint_local.json"
"""Version 0.1 kept the site's own here, and the federation's under nnU-Net's name."""


def keep_own(folder: Path, local: LocalFingerprint) -> None:
    """Leave this site's own fingerprint where nnU-Net looks for one; without foreground it has no intensities.

    Args:
        folder: of the data set in ``nnUNet_preprocessed``.
        local: what is known of this site's cases.
    """
    if all(len(channel) for channel in local.intensities):
        own = fingerprint_of(local)
    else:  # nnU-Net finds none either, and ends; the others' are not this site's
        spacings = [[float(step) for step in spacing] for spacing in local.spacings]
        shapes = [[int(length) for length in shape] for shape in local.shapes_after_crop]
        own = fingerprint_with(spacings, shapes, {}, float(np.median(local.relative_sizes)))
    write_json(folder / OWN, own, indent=4)
    (folder / OWN_OF_0_1).unlink(missing_ok=True)


def put_own_in_place(folder: Path) -> None:
    """Lay the fingerprints of a folder that version 0.1 planned in as this version does; others are left alone."""
    own, common = folder / OWN_OF_0_1, folder / OWN
    if not own.is_file() or not common.is_file():
        return
    if _spacings(own) == _spacings(common):  # somebody has let nnU-Net extract it again
        own.unlink()
        return
    write_json(folder / COMMON, json.loads(common.read_text(encoding="utf-8")), indent=4)
    move(own, common)


def common_file(folder: Path) -> Path:
    """The federation's fingerprint, whichever version has planned."""
    return folder / COMMON if (folder / COMMON).is_file() else folder / OWN


def own_file(folder: Path) -> Path:
    """This site's own fingerprint, whichever version has planned; in a folder of 0.1 there may be none."""
    return folder / OWN if (folder / COMMON).is_file() else folder / OWN_OF_0_1


def without_cases(plans: Mapping[str, Any]) -> dict[str, Any]:
    """A fingerprint in nnU-Net's format that tells what plans tell: medians, and of no single case."""
    back = plans["transpose_backward"]
    spacing, shape = (plans[f"original_median_{what}_after_transp"] for what in ("spacing", "shape"))
    return {
        "spacings": [[spacing[axis] for axis in back]],
        "shapes_after_crop": [[shape[axis] for axis in back]],
        INTENSITIES: plans[INTENSITIES],
    }


def _spacings(path: Path) -> Any:
    return sorted(json.loads(path.read_text(encoding="utf-8"))["spacings"])
