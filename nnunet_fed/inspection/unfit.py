"""Files that are whole, and that nnU-Net cannot use all the same: what each is, and what to do. Source: ours."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

GREY = "Save it with one grey value a pixel (mode 'L', without colours, palette or transparency)."
INDICES = (
    "Save it with one number a pixel, the label's, without colours or transparency. Of a palette that is the index: "
    "Image.fromarray(np.array(Image.open(file))).save(file) in Python, with PIL, keeps just that."
)


class UnfitError(ValueError):
    """A file that nnU-Net cannot use, though it may be whole.

    Args:
        kind: of the finding.
        found: what the file is.
        wanted: what it should be.
        remedy: what to do.
    """

    def __init__(self, kind: str, found: str, wanted: str, remedy: str):
        super().__init__(found)
        self.finding = kind, found, wanted, remedy


def require_volume(shape: Sequence[int], remedy: str) -> None:
    """See that an array has three axes; ``remedy`` is for a data set of slices. Raises :class:`UnfitError`."""
    if len(shape) < 3:
        found, wanted = f"the file has {len(shape)} dimensions", "3 dimensions"
        if_all, other = f"If all cases are slices, {remedy}. Else r" if remedy else "R", "replace it by a volume"
        raise UnfitError("dimensions", found, wanted, f"{if_all}{other[1:]}, or remove the case.")


def require_real(kind: np.dtype[Any]) -> None:
    """See that voxels are real numbers. Raises :class:`UnfitError`."""
    if kind.kind == "c":
        found, remedy = "its voxels are complex numbers", "Save what is meant, such as the magnitude: np.abs(array)."
        raise UnfitError("complex numbers", f"{found}, of which nnU-Net drops a part", "real numbers", remedy)


def require_picture(shape: Sequence[int], coloured: bool) -> None:
    """See that an array is no volume. Raises :class:`UnfitError`."""
    if len(shape) > 2 + coloured and shape[-1] not in (3, 4):
        remedy = "Replace it by a file of 2 dimensions, or remove the case."
        raise UnfitError("dimensions", f"a file of {len(shape) - coloured} dimensions", "2 dimensions", remedy)


def require_plain(path: Path, is_label: bool) -> None:
    """See that a picture has not grey values and transparency, which nnU-Net cannot take.

    Raises :class:`UnfitError`.
    """
    planes: tuple[str, ...] = ()
    with suppress(OSError, ValueError), Image.open(path) as picture:  # what is no picture is told by the reader
        planes = picture.getbands()
    if planes == ("L", "A"):
        kind, remedy = ("planes of a label", INDICES) if is_label else ("planes", GREY)
        raise UnfitError(kind, "2 planes (grey and transparency)", "1 plane", remedy)


def require_lengths(spacing: Sequence[float]) -> None:
    """See that a voxel size can be one. Raises :class:`UnfitError`."""
    if not all(np.isfinite(step) and step > 0 for step in spacing):
        found = f"voxel size {' x '.join(f'{step:g}' for step in spacing)} (slices first)"
        remedy = "Export the file anew, or write the right voxel size into its header."
        raise UnfitError("spacing", found, "three numbers above 0", remedy)
