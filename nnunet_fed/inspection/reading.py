"""What one file of a data set is: read once, by the class with which nnU-Net will read it. Source: ours."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES, recursive_find_reader_writer_by_name
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from nnunet_fed.inspection.formats import Whole, check_sidecar, check_whole, tiff_complaints, tiff_layout
from nnunet_fed.inspection.unfit import (
    UnfitError,
    require_lengths,
    require_picture,
    require_plain,
    require_real,
    require_volume,
)

OVERWRITE = "overwrite_image_reader_writer"
"""Key of dataset.json with the name of a reader."""
FOURTH, VECTOR = "fourth", "vector"
"""Layouts that nnU-Net's reader cannot take: channels along a fourth axis of the file, or several values in a voxel."""
MOST_VALUES = 1000
"""So many different values of a label file are kept; more than any data set has labels."""


@dataclass(frozen=True)
class FileFacts:
    """What a look needs to know of a file."""

    problem: str = ""
    """Why it cannot be read, or that it is not whole; then nothing else is known."""
    unfit: tuple[str, ...] = ()
    """Of a file that cannot be used for another reason than damage: kind of the finding, found, wanted, remedy."""
    other_reader: str = ""
    """A class of nnU-Net's that reads it, where the data set's own does not."""
    layout: str = ""
    """:data:`FOURTH`, :data:`VECTOR`, or as it should be."""
    dimensions: int = 0
    """Of the file, colours not counted."""
    planes: int = 0
    """Channels in this file; of a colour image 3, or 4 with transparency."""
    shape: tuple[int, ...] = ()
    """Along the three axes of the array, slices first."""
    spacing: tuple[float, ...] = ()
    """In mm along these axes; none: the file does not tell."""
    odd_spacing: tuple[float, ...] = ()
    """What the file says of it, where some of that is no number above 0 and the reader takes another for it."""
    origin: tuple[float, ...] = ()
    direction: tuple[float, ...] = ()
    """Direction cosines, row by row; none: the format has none."""
    values: tuple[float, ...] = ()
    """Of a label: its different values, sorted."""
    lowest: float = 0.0
    highest: float = 0.0
    not_finite: int = 0
    """Voxels that are NaN or infinite."""
    read_as_zero: int = 0
    """Further ones, for which the reader gives 0."""

    def stored(self) -> dict[str, Any]:
        """In JSON's types, without what is as usual."""
        usual = asdict(FileFacts())
        return {name: value for name, value in asdict(self).items() if value != usual[name]}

    @classmethod
    def restore(cls, stored: Mapping[str, Any]) -> FileFacts:
        """The facts of :meth:`stored`."""
        facts: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()
        }
        return cls(**facts)


def endings() -> set[str]:
    """File endings that nnU-Net's readers know, in small letters."""
    return {ending for reader in LIST_OF_IO_CLASSES for ending in reader.supported_file_endings}


def choose_reader(content: Mapping[str, Any], images: Sequence[str]) -> str:
    """Name of the class with which nnU-Net reads a data set: the first one that reads the first image.

    An image that no class can read is passed over, so that one bad file does not decide for all others.

    Args:
        content: of ``dataset.json``, with a file ending that nnU-Net knows.
        images: an image file of each case, in the order of the cases.
    """
    named = content.get(OVERWRITE, "None")
    if named != "None" and reader_class(str(named)) is not None:
        return str(named)
    ending = str(content["file_ending"]).lower()
    candidates: list[str] = [
        reader.__name__ for reader in LIST_OF_IO_CLASSES if ending in reader.supported_file_endings
    ]
    if len(candidates) > 1:
        for image in images:
            for name in candidates:
                if not _reading_problem(Path(image), name):
                    return name
    return candidates[0]


def better_reader(images: Sequence[FileFacts]) -> str:
    """Name of another class that reads most images, which the chosen one does not; none if it reads half of them."""
    others = Counter(facts.other_reader for facts in images if facts.unfit and facts.other_reader)
    (name, number), *_ = others.most_common(1) or [("", 0)]
    return name if number > len(images) / 2 else ""


@cache
def reader_class(name: str) -> Any:
    """nnU-Net's class of this name; ``None``: there is none."""
    known = {reader.__name__: reader for reader in LIST_OF_IO_CLASSES}
    if name in known:
        return known[name]
    try:
        return recursive_find_reader_writer_by_name(name)
    except RuntimeError:
        return None


def sidecar_of(path: Path, reader: str, is_label: bool) -> Path | None:
    """The file beside a TIFF volume in which nnU-Net looks for its spacing; ``None``: the reader has none."""
    if reader != Tiff3DIO.__name__:
        return None
    stem = path.name[: -len(path.suffix)]
    return path.with_name((stem if is_label else stem[:-5]) + ".json")


def read_facts(path: Path, reader: str, is_label: bool) -> FileFacts:
    """Read a file; whatever is wrong with it stands in the answer, and nothing is raised.

    Args:
        path: of the file.
        reader: name of nnU-Net's class.
        is_label: whether its different values count.
    """
    try:
        whole = check_whole(path)
        facts, array = _read(path, reader, is_label, whole)
    except UnfitError as error:
        # a .tif may be a picture or a volume; which of them a data set has is seen of all files
        other = _other_reader(path, reader) if path.suffix.lower() == ".tif" else ""
        return FileFacts(problem=str(error), unfit=error.finding, other_reader=other)
    except PermissionError as error:
        remedy = "Make it readable for whoever runs nnU-Net (chmod +r), with all folders on the way."
        unfit = "unreadable files", f"it cannot be opened: {_words(error, path)}", "a file that may be read", remedy
        return FileFacts(problem=unfit[1], unfit=unfit)
    except Exception as error:  # the readers raise whatever their libraries do
        return FileFacts(problem=_words(error, path), other_reader=_other_reader(path, reader))
    if facts.layout or array is None:
        return facts
    return replace(facts, **_values(array, is_label))


def _read(path: Path, reader: str, is_label: bool, whole: Whole) -> tuple[FileFacts, npt.NDArray[Any] | None]:
    if reader == SimpleITKIO.__name__:
        return _by_itk(path, whole)
    if reader in (NibabelIO.__name__, NibabelIOWithReorient.__name__):
        header: Any = nibabel.load(path)
        shape = header.shape
        if len(shape) > 3:
            return FileFacts(layout=FOURTH, dimensions=len(shape), planes=shape[3], shape=shape[2::-1]), None
        require_volume(shape, f'write "{OVERWRITE}": "{SimpleITKIO.__name__}" into dataset.json, which reads them')
        require_real(header.get_data_dtype())
    spacing_known = True
    sidecar = sidecar_of(path, reader, is_label)
    if sidecar is not None:
        shape, coloured = tiff_layout(path)
        if coloured:
            return FileFacts(layout=VECTOR, dimensions=len(shape) - 1, planes=shape[-1], shape=shape[:-1]), None
        if len(shape) > 3:
            return FileFacts(layout=FOURTH, dimensions=len(shape), planes=shape[0], shape=shape[1:]), None
        may_be_pictures = path.suffix.lower() == ".tif"
        require_volume(shape, "" if may_be_pictures else 'name them .tif, with "file_ending": ".tif" in dataset.json')
        spacing_known = check_sidecar(sidecar)
    if reader == NaturalImage2DIO.__name__:
        require_plain(path, is_label)
        if path.suffix.lower() == ".tif":
            require_picture(*tiff_layout(path))
    tool = reader_class(reader)()
    with tiff_complaints():
        array, properties = tool.read_seg(str(path)) if is_label else tool.read_images((str(path),))
    origin, direction = _orientation(properties)
    spacing = tuple(map(float, properties["spacing"])) if spacing_known else ()
    require_lengths(spacing)
    dimensions = 2 if sidecar is None and not origin else 3  # what is left are pictures
    return FileFacts(
        dimensions=dimensions, planes=len(array), shape=array.shape[1:], spacing=spacing, odd_spacing=whole.odd_spacing,
        origin=origin, direction=direction,
    ), array  # fmt: skip


def _by_itk(path: Path, whole: Whole) -> tuple[FileFacts, npt.NDArray[Any] | None]:
    """As nnU-Net's SimpleITKIO takes it, without its copy in float32."""
    image = sitk.ReadImage(str(path))
    planes, dimensions = image.GetNumberOfComponentsPerPixel(), image.GetDimension()
    shape = tuple(reversed(image.GetSize()))
    spacing = tuple(abs(step) for step in reversed(image.GetSpacing()))
    place = {"origin": image.GetOrigin(), "direction": image.GetDirection()}
    if path.suffix == ".gipl" and whole.size < prod(shape) * planes * image.GetSizeOfPixelComponent():
        raise ValueError("it is cut off: there are fewer bytes than voxels")
    if dimensions > 3:
        return FileFacts(layout=FOURTH, dimensions=dimensions, planes=shape[-4], shape=shape[-3:]), None
    if "complex" in image.GetPixelIDTypeAsString():
        require_real(np.dtype(complex))
    if planes > 1:
        return FileFacts(layout=VECTOR, dimensions=dimensions, planes=planes, shape=shape, spacing=spacing), None
    require_lengths(spacing)
    if dimensions == 2:
        shape, spacing = (1, *shape), (999 * max(spacing), *spacing)
    facts = FileFacts(
        dimensions=dimensions, planes=1, shape=shape, spacing=spacing, odd_spacing=whole.odd_spacing,
        read_as_zero=whole.not_finite, **place,
    )  # fmt: skip
    return facts, sitk.GetArrayFromImage(image)


def _orientation(properties: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Origin and direction cosines in nnU-Net's properties; both empty where there are none."""
    if "sitk_stuff" in properties:
        stuff = properties["sitk_stuff"]
        return tuple(map(float, stuff["origin"])), tuple(map(float, stuff["direction"]))
    if "nibabel_stuff" in properties:
        stuff = properties["nibabel_stuff"]
        affine = np.asarray(stuff.get("reoriented_affine", stuff["original_affine"]), float)
        columns = affine[:3, :3]
        lengths = np.linalg.norm(columns, axis=0)
        cosines = columns / np.where(lengths > 0, lengths, 1)
        return tuple(affine[:3, 3].tolist()), tuple(cosines.ravel().tolist())
    return (), ()


def _values(array: npt.NDArray[Any], is_label: bool) -> dict[str, Any]:
    floating = array.dtype.kind == "f"
    with np.errstate(over="ignore"):  # nnU-Net works with float32, in which large numbers are infinite
        finite = np.isfinite(array.astype(np.float32, copy=False)) if floating else None
    bad = 0 if finite is None else int(array.size - np.count_nonzero(finite))
    good = array if not bad else array[finite]
    facts: dict[str, Any] = {"not_finite": bad}
    if good.size:
        # as nnU-Net has it: a value of float64 that float32 rounds to a whole number is one
        facts |= {"lowest": float(np.float32(good.min())), "highest": float(np.float32(good.max()))}
    if is_label:
        flat = np.ravel(good)
        # every value begins a run; labels have few of them, so that sorting the beginnings costs next to nothing
        beginnings = np.append(flat[:1], flat[1:][flat[1:] != flat[:-1]])
        facts["values"] = tuple(np.unique(beginnings.astype(np.float32))[:MOST_VALUES].tolist())
    return facts


def _reading_problem(path: Path, reader: str) -> str:
    tool = reader_class(reader)()
    try:
        check_whole(path)
        with tiff_complaints():
            tool.read_images((str(path),))
    except Exception as error:  # the readers raise whatever their libraries do
        return _words(error, path) or "it cannot be read"
    return ""


def _other_reader(path: Path, reader: str) -> str:
    name = path.name.lower()
    for other in LIST_OF_IO_CLASSES:
        fits = any(name.endswith(ending) for ending in other.supported_file_endings)
        if fits and other.__name__ != reader and not _reading_problem(path, other.__name__):
            return str(other.__name__)
    return ""


def _words(error: Exception, path: Path) -> str:
    """What an error says, in one line and without places in somebody's source code."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = text.rpartition("ERROR: ")[2].replace(str(path), path.name)
    if "File cannot be read" in text:  # ITK's, of MetaImage
        return "it is cut off or damaged: it has not the voxels of which its header speaks"
    text = re.sub(r"\w+\(0x[0-9a-f]+\): ", "", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines)[:300] or type(error).__name__
