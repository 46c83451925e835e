"""What the libraries of the formats do not tell by themselves: files that are cut off, and colours taken for an axis.

Source: the NIfTI-1 header is nifti1.h's; else ours.
"""

from __future__ import annotations

import gzip
import json
import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path

import numpy as np
import tifffile

_NIFTI_HEADER = 348
_FLOATING = {16: "f4", 64: "f8"}
"""Types of voxels by their number in NIfTI."""


@dataclass(frozen=True)
class Whole:
    """What a file's bytes tell."""

    size: int
    """Unpacked."""
    not_finite: int = 0
    """Voxels of a NIfTI file that are NaN or infinite, for which ITK reads 0."""


def check_whole(path: Path) -> Whole:
    """See that a file can be opened, and that NIfTI files and compressed ones are whole: ITK would fill in zeros.

    Raises:
        OSError, EOFError, ValueError, zlib.error: it is not.
    """
    with path.open("rb") as raw:
        start = raw.read(2)
    if not start:
        raise ValueError("it is empty")
    is_nifti = path.name.lower().endswith((".nii", ".nii.gz"))
    if start == b"\x1f\x8b":
        with gzip.open(path) as packed:
            unpacked = packed.read()
        return Whole(len(unpacked), _check_nifti(unpacked) if is_nifti else 0)
    if is_nifti:
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            return Whole(len(content), _check_nifti(content))
    return Whole(path.stat().st_size)


def _check_nifti(content: bytes | mmap) -> int:
    """See that a NIfTI-1 file has the voxels of which its header speaks; returns how many of them are not finite."""
    order = next((order for order in "<>" if content[:4] == struct.pack(f"{order}i", _NIFTI_HEADER)), None)
    if order is None or len(content) < _NIFTI_HEADER:
        return 0  # of another version, or none: its library will say
    number, *sizes = struct.unpack_from(f"{order}8h", content, 40)
    kind, bits = struct.unpack_from(f"{order}2h", content, 70)
    offset = int(struct.unpack_from(f"{order}f", content, 108)[0])
    voxels = int(prod(sizes[: max(0, number)]))
    if len(content) < offset + voxels * bits // 8:
        told = offset + voxels * bits // 8
        raise ValueError(f"it is cut off: it has {len(content)} bytes, and its header speaks of {told}")
    if kind not in _FLOATING:
        return 0
    values = np.frombuffer(content, f"{order}{_FLOATING[kind]}", voxels, offset)
    return voxels - int(np.count_nonzero(np.isfinite(values)))


def check_sidecar(path: Path) -> bool:
    """See that a TIFF's spacing can be used; false: there is no such file. Raises :class:`ValueError`."""
    if not path.is_file():
        return False
    wanted = f'its spacing file {path.name} must hold {{"spacing": [z, y, x]}} with three numbers above 0'
    try:
        spacing = json.loads(path.read_text(encoding="utf-8"))["spacing"]
        good = len(spacing) == 3 and all(float(step) > 0 and np.isfinite(step) for step in spacing)
    except (ValueError, KeyError, TypeError, OSError):
        raise ValueError(f"{wanted}, and cannot be read so") from None
    if not good:
        raise ValueError(f"{wanted}, not {spacing}")
    return True


def tiff_colours(path: Path) -> tuple[int, ...] | None:
    """Shape of a TIFF whose last axis are colours, which nnU-Net's reader for volumes takes for one of space."""
    with tiff_complaints(), tifffile.TiffFile(path) as file:
        series = file.series[0]
        return tuple(series.shape) if series.axes.endswith("S") else None


@contextmanager
def tiff_complaints() -> Iterator[None]:
    """Raise what ``tifffile`` only logs: it gives back what it has of a file that is cut off."""
    heard: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    logger, listener = logging.getLogger("tifffile"), Listener(logging.WARNING)
    logger.addHandler(listener)
    propagates, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.removeHandler(listener)
        logger.propagate = propagates
    cut = [text for text in heard if "invalid page offset" in text or "failed to reshape" in text]
    if cut:
        raise ValueError(f"it is cut off or damaged: {cut[0]}")
