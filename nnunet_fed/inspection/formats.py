"""What the libraries of the formats do not tell by themselves: files that are cut off, and colours taken for an axis.

Source: the NIfTI-1 header is nifti1.h's; else ours.
"""

from __future__ import annotations

import json
import logging
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path
from string import printable

import numpy as np
import tifffile

from nnunet_fed.inspection.unfit import UnfitError

_NIFTI_HEADER = 348
_FLOATING = {16: "f4", 64: "f8"}
"""Types of voxels by their number in NIfTI."""
_TEXT, _TEXT_FIRST = 24, (".nrrd", ".mha")
"""A file that begins with so many printable bytes is a text; endings of formats that do so."""


@dataclass(frozen=True)
class Whole:
    """What a file's bytes tell."""

    size: int
    """Unpacked."""
    not_finite: int = 0
    """Voxels of a NIfTI file that are NaN or infinite, for which ITK reads 0."""
    odd_spacing: tuple[float, ...] = ()
    """Voxel size in a NIfTI file's header, slices first, where some of it is no number above 0."""


def check_whole(path: Path) -> Whole:
    """See that a file can be opened, and that NIfTI files and compressed ones are whole: ITK would fill in zeros.

    Raises:
        OSError, EOFError, ValueError: it is not.
    """
    with path.open("rb") as raw:
        start = raw.read(_TEXT)
    if not start:
        raise ValueError("it is empty")
    name = path.name.lower()
    if not set(start) - set(printable.encode()) and not name.endswith(_TEXT_FIRST):
        raise ValueError("it holds text, such as a web page or a pointer of Git LFS, and no image")
    is_nifti = name.endswith((".nii", ".nii.gz"))
    if start[:2] == b"\x1f\x8b":
        if name.endswith(".nii"):
            found = "it is packed (gzip), which the ending .nii does not say, so that nnU-Net cannot read it"
            remedy = 'Name it .nii.gz, with "file_ending": ".nii.gz" in dataset.json; or unpack it (gunzip).'
            raise UnfitError("unreadable files", found, "an unpacked file, or .nii.gz", remedy)
        unpacked = _unpack(path.read_bytes())
        return _check_nifti(unpacked) if is_nifti else Whole(len(unpacked))
    if is_nifti:
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            return _check_nifti(content)
    return Whole(path.stat().st_size)


def _unpack(packed: bytes) -> bytes:
    """As ``gzip`` does it, but what follows is passed over if it is not packed, as ITK does."""
    parts = []
    while packed[:2] == b"\x1f\x8b":
        member = zlib.decompressobj(wbits=31)
        try:
            parts.append(member.decompress(packed))
        except zlib.error as error:
            raise ValueError(f"its packed content is damaged ({str(error).rpartition(': ')[2]})") from None
        if not member.eof:
            raise EOFError("it is cut off: the packed content has no end")
        packed = member.unused_data
    return b"".join(parts) if len(parts) > 1 else parts[0]


def _check_nifti(content: bytes | mmap) -> Whole:
    """See that a NIfTI-1 file has the voxels of which its header speaks, and what these and the voxel size are."""
    order = next((order for order in "<>" if content[:4] == struct.pack(f"{order}i", _NIFTI_HEADER)), None)
    if order is None or len(content) < _NIFTI_HEADER:
        return Whole(len(content))  # of another version, or none: its library will say
    number, *sizes = struct.unpack_from(f"{order}8h", content, 40)
    kind, bits = struct.unpack_from(f"{order}2h", content, 70)
    offset = int(struct.unpack_from(f"{order}f", content, 108)[0])
    voxels = int(prod(sizes[: max(0, number)]))
    if len(content) < offset + voxels * bits // 8:
        told = offset + voxels * bits // 8
        raise ValueError(f"it is cut off: it has {len(content)} bytes, and its header speaks of {told}")
    steps = struct.unpack_from(f"{order}{min(3, max(0, number))}f", content, 80)[::-1]
    odd = () if all(np.isfinite(step) and step != 0 for step in steps) else steps
    if kind not in _FLOATING:
        return Whole(len(content), 0, odd)
    values = np.frombuffer(content, f"{order}{_FLOATING[kind]}", voxels, offset)
    return Whole(len(content), voxels - int(np.count_nonzero(np.isfinite(values))), odd)


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


def tiff_layout(path: Path) -> tuple[tuple[int, ...], bool]:
    """Shape of a TIFF, and whether its last axis are colours, which a reader of volumes takes for one of space."""
    with tiff_complaints(), tifffile.TiffFile(path) as file:
        series = file.series[0]
        return tuple(series.shape), series.axes.endswith("S")


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
