"""Small data sets with one fault each, of every kind that a look tells."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk  # noqa: N813
import tifffile
from PIL import Image
from skimage import io

SHAPE = (6, 8, 7)
Spoil = Callable[[Path], object]


def arrays(case: int, shape: tuple[int, ...] = SHAPE) -> tuple[Any, Any]:
    """Image and label, slices first."""
    label = np.zeros(shape, np.uint8)
    label[..., 2:5, 2:5] = 1
    image = np.random.default_rng(case).normal(100, 10, shape).astype(np.float32) + 50 * label
    return image, label


def write_itk(array: Any, file: Path, spacing: tuple[float, ...] = (1.0, 1.0, 2.0), **place: Any) -> None:
    itk = sitk.GetImageFromArray(array)
    itk.SetSpacing(spacing[: itk.GetDimension()])
    for name, value in place.items():
        getattr(itk, f"Set{name.capitalize()}")(value)
    sitk.WriteImage(itk, str(file))


def make(folder: Path, ending: str = ".nii.gz", cases: int = 3, **more: Any) -> Path:
    """A good data set with one channel; in slices if its files are pictures."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for case in range(cases):
        image, label = arrays(case, SHAPE[1:] if ending == ".png" else SHAPE)
        files = folder / "imagesTr" / f"c{case}_0000{ending}", folder / "labelsTr" / f"c{case}{ending}"
        for array, file in zip((image, label), files, strict=True):
            if ending == ".png":
                io.imsave(file, array.astype(np.uint8), check_contrast=False)
            elif ending == ".tif":
                tifffile.imwrite(file, array, photometric="minisblack")
            else:
                write_itk(array, file)
        if ending == ".tif":
            for part in ("imagesTr", "labelsTr"):
                (folder / part / f"c{case}.json").write_text(json.dumps({"spacing": [2.0, 1.0, 1.0]}))
    describe(folder, numTraining=cases, file_ending=ending, channel_names={"0": "MRI"}, **more)
    return folder


def describe(folder: Path, **changes: Any) -> None:
    """Change ``dataset.json``; ``None`` removes a key."""
    path = folder / "dataset.json"
    content = json.loads(path.read_text()) if path.is_file() else {"labels": {"background": 0, "organ": 1}}
    path.write_text(json.dumps({key: value for key, value in {**content, **changes}.items() if value is not None}))


@dataclass(frozen=True)
class Fault:
    """A data set that is spoilt in one way."""

    severity: str
    kind: str
    spoil: Spoil
    ending: str = ".nii.gz"


def _image(case: int, change: Callable[[Any], Any], **options: Any) -> Spoil:
    return lambda folder: write_itk(change(arrays(case)[0]), folder / f"imagesTr/c{case}_0000.nii.gz", **options)


def _label(case: int, change: Callable[[Any], Any], **options: Any) -> Spoil:
    return lambda folder: write_itk(change(arrays(case)[1]), folder / f"labelsTr/c{case}.nii.gz", **options)


def _same(array: Any) -> Any:
    return array


def _with(value: float, dtype: type = np.float32) -> Callable[[Any], Any]:
    def change(array: Any) -> Any:
        array = array.astype(dtype)
        array[2, 3, 3] = value
        return array

    return change


def _cut(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return spoil


def _sheared(folder: Path) -> None:
    affine = np.eye(4)
    affine[0, 1] = 0.2
    for file in ("imagesTr/c1_0000.nii.gz", "labelsTr/c1.nii.gz"):
        array = arrays(1)[0 if "images" in file else 1]
        nibabel.save(nibabel.Nifti1Image(array.T, affine), folder / file)


def _fourth(folder: Path) -> None:
    file = folder / "imagesTr/c1_0000.nii.gz"
    image = sitk.ReadImage(str(file))
    sitk.WriteImage(sitk.JoinSeries([image, image]), str(file))


def _vector(folder: Path) -> None:
    image = sitk.GetImageFromArray(np.stack([arrays(1)[0]] * 3, -1), isVector=True)
    sitk.WriteImage(image, str(folder / "imagesTr/c1_0000.nrrd"))


def _coloured(name: str, planes: int) -> Spoil:
    def spoil(folder: Path) -> None:
        picture = io.imread(folder / name)
        io.imsave(folder / name, np.stack([picture] * planes, -1), check_contrast=False)

    return spoil


def _grey_with_transparency(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        grey = Image.open(folder / name)
        Image.merge("LA", (grey, Image.new("L", grey.size, 255))).save(folder / name)

    return spoil


def _palette(folder: Path) -> None:
    picture = Image.open(folder / "labelsTr/c1.png")
    picture.putpalette([0, 0, 0, 128, 0, 0])
    picture.save(folder / "labelsTr/c1.png")


def _slice_tiff(folder: Path) -> None:
    tifffile.imwrite(folder / "imagesTr/c1_0000.tif", arrays(1)[0][0])


def _repack(change: Callable[[bytearray], object], name: str = "imagesTr/c1_0000.nii.gz") -> Spoil:
    def spoil(folder: Path) -> None:
        content = bytearray(gzip.decompress((folder / name).read_bytes()))
        change(content)
        (folder / name).write_bytes(gzip.compress(content))

    return spoil


def _voxel_size(step: float) -> Callable[[bytearray], object]:
    """Write the NIfTI header's voxel size along the second axis."""
    return lambda content: content.__setitem__(slice(84, 88), np.float32(step).tobytes())


def _unpacked_voxel_size(folder: Path) -> None:
    path = folder / "imagesTr/c1_0000.nii"
    content = bytearray(path.read_bytes())
    _voxel_size(np.nan)(content)
    path.write_bytes(content)


def _flat_nii(folder: Path) -> None:
    for array, file in zip(arrays(1, SHAPE[1:]), ("imagesTr/c1_0000.nii", "labelsTr/c1.nii"), strict=True):
        nibabel.save(nibabel.Nifti1Image(array.T, np.eye(4)), folder / file)


def _complex(folder: Path) -> None:
    image = nibabel.Nifti1Image(arrays(1)[0].T.astype(np.complex64), np.diag([-1, -1, 2, 1]))
    nibabel.save(image, folder / "imagesTr/c1_0000.nii.gz")


def _packed_nii(folder: Path) -> None:
    path = folder / "imagesTr/c1_0000.nii"
    path.write_bytes(gzip.compress(path.read_bytes()))


def _second_channel(folder: Path) -> None:
    for case in range(3):
        write_itk(arrays(case)[0], folder / f"imagesTr/c{case}_0001.nii.gz")
    write_itk(arrays(1)[0], folder / "imagesTr/c1_0001.nii.gz", (1.00004, 1.0, 2.0))
    describe(folder, channel_names={"0": "T1", "1": "T2"})


def _not_utf8(folder: Path) -> None:
    name = os.fsencode(folder / "imagesTr/c1_0000.nii.gz")
    os.rename(name, name.replace(b"c1", b"c\xe4"))  # noqa: PTH104 - Path has no bytes


def _flat(folder: Path) -> None:
    for array, file in zip(arrays(1, (1, *SHAPE[1:])), ("imagesTr/c1_0000.nii.gz", "labelsTr/c1.nii.gz"), strict=True):
        write_itk(array, folder / file)


def _flat_elsewhere(folder: Path) -> None:
    for case in range(3):
        for array, file in zip(arrays(case), (f"imagesTr/c{case}_0000", f"labelsTr/c{case}"), strict=True):
            write_itk(array[:, :, 3:4], folder / f"{file}.nii.gz")


def _slice_file(folder: Path) -> None:
    for array, file in zip(arrays(1, SHAPE[1:]), ("imagesTr/c1_0000.nii.gz", "labelsTr/c1.nii.gz"), strict=True):
        write_itk(array, folder / file)


def _rename(old: str, new: str) -> Spoil:
    return lambda folder: (folder / old).rename(folder / new)


def _rename_case(folder: Path) -> None:
    (folder / "imagesTr/c1_0000.nii.gz").rename(folder / "imagesTr/c1_seg_0000.nii.gz")
    (folder / "labelsTr/c1.nii.gz").rename(folder / "labelsTr/c1_seg.nii.gz")


def _no_foreground(folder: Path) -> None:
    for case in range(3):
        _label(case, np.zeros_like)(folder)


def _listed(**entries: Any) -> Spoil:
    return lambda folder: describe(folder, dataset=entries)


def _labels(**labels: Any) -> Spoil:
    more = {"regions_class_order": labels.pop("order")} if "order" in labels else {}
    return lambda folder: describe(folder, labels=labels, **more)


def _copy_label(new: str) -> Spoil:
    return lambda folder: shutil.copy(folder / "labelsTr/c1.nii.gz", folder / "labelsTr" / new)


def _link(folder: Path) -> None:
    (folder / "imagesTr/c1_0000.nii.gz").unlink()
    (folder / "imagesTr/c1_0000.nii.gz").symlink_to(folder / "not there")


def _folds(folder: Path) -> None:
    (folder / "splits_final.json").write_text(json.dumps([{"train": ["c0", "c1", "c9"], "val": ["c2"]}]))


def _zeros(folder: Path) -> None:
    image = arrays(1)[0]
    image[:2] = np.nan
    nibabel.save(nibabel.Nifti1Image(image.T, np.diag([-1, -1, 2, 1])), folder / "imagesTr/c1_0000.nii.gz")
    _label(1, _same)(folder)
    write_itk(arrays(1)[1], folder / "labelsTr/c1.nii.gz")


DATASET_JSON = (
    Fault("error", "no dataset.json", lambda folder: (folder / "dataset.json").unlink()),
    Fault("error", "no dataset.json", lambda folder: (folder / "dataset.json").write_text('{"labels": ')),
    Fault("error", "no dataset.json", lambda folder: (folder / "dataset.json").write_bytes(
        (folder / "dataset.json").read_text().encode("utf-16"))),
    Fault("warning", "repeated keys", lambda folder: (folder / "dataset.json").write_text(
        (folder / "dataset.json").read_text().replace('"organ": 1', '"organ": 2, "organ": 1'))),
    Fault("error", "missing keys", lambda folder: describe(folder, numTraining=None)),
    Fault("error", "channel_names", lambda folder: describe(folder, channel_names={"MRI": 0})),
    Fault("error", "channel_names", lambda folder: describe(folder, channel_names={"1": "T2"})),
    Fault("error", "channel_names", lambda folder: describe(folder, modality={"0": "T1", "1": "T2"})),
    Fault("error", "labels", _labels(background=0, organ=1.5)),
    Fault("warning", "labels", _labels(background="0", organ="1")),
    Fault("error", "background", _labels(zero=0, organ=1)),
    Fault("error", "background", _labels(background=1, organ=2)),
    Fault("error", "label values with a gap", _labels(background=0, organ=1, lesion=3)),
    Fault("error", "ignore", _labels(background=0, ignore=1, organ=2)),
    Fault("error", "regions_class_order", _labels(background=0, all=[1, 2], core=2)),
    Fault("warning", "regions_class_order", _labels(background=0, core=2, all=[1, 2], order=[2, 1])),
    Fault("error", "file_ending", lambda folder: describe(folder, file_ending="nii.gz")),
    Fault("error", "numTraining", lambda folder: describe(folder, numTraining=4)),
    Fault("error", "overwrite_image_reader_writer", lambda folder: describe(
        folder, overwrite_image_reader_writer="NibableIO")),
    Fault("error", "folds", _folds),
    Fault("error", "folds", lambda folder: (folder / "splits_final.json").write_text(
        '[{"train": [0, 1], "val": [2]}]')),
    Fault("error", "folds", lambda folder: (folder / "splits_final.json").write_text(
        '[{"train": ["c0", "c1", "c2"], "val": []}]')),
)  # fmt: skip
NAMES = (
    Fault("error", "missing folder", lambda folder: shutil.rmtree(folder / "labelsTr")),
    Fault("error", "no cases", lambda folder: describe(folder, file_ending=".mha")),
    Fault("error", "missing files", lambda folder: (folder / "labelsTr/c1.nii.gz").unlink()),
    Fault("error", "missing files", _link),
    Fault("error", "missing files", _rename("imagesTr/c1_0000.nii.gz", "imagesTr/c1_0001.nii.gz")),
    Fault("error", "list of files", _listed(c0={"images": "imagesTr/c0_0000.nii.gz"})),
    Fault("error", "hidden files", lambda folder: (folder / "imagesTr/._c1_0000.nii.gz").write_text("of macOS")),
    Fault("error", "names", _rename("imagesTr/c1_0000.nii.gz", "imagesTr/c1.nii.gz")),
    Fault("error", "names", _rename("labelsTr/c1.nii.gz", "labelsTr/c1_0000.nii.gz")),
    Fault("error", "names", _rename("labelsTr/c1.nii.gz", "labelsTr/C1.nii.gz")),
    Fault("error", "names", _not_utf8),
    Fault("error", "names", _rename_case),
    Fault("warning", "hidden files", lambda folder: (folder / "labelsTr/._c1.nii.gz").write_text("of macOS")),
    Fault("warning", "label without image", _copy_label("c7.nii.gz")),
    Fault("warning", "other endings", lambda folder: (folder / "imagesTr/c7_0000.nii").write_text("")),
)
FILES = (
    Fault("error", "unreadable files", _cut("imagesTr/c1_0000.nii.gz")),
    Fault("error", "unreadable files", lambda folder: (folder / "labelsTr/c1.nii.gz").write_text("no image")),
    Fault("error", "unreadable files", _cut("imagesTr/c1_0000.png"), ".png"),
    Fault(
        "error", "unreadable files", lambda folder: (folder / "imagesTr/c1.json").write_text('{"spacing": 1}'), ".tif"
    ),
    Fault("error", "unreadable files", _packed_nii, ".nii"),
    Fault("warning", "no spacing", lambda folder: (folder / "imagesTr/c1.json").unlink(), ".tif"),
    Fault("error", "another reader", _sheared),
    Fault("error", "channels", lambda folder: describe(folder, channel_names={"0": "T1", "1": "T2"})),
    Fault("error", "planes", _coloured("imagesTr/c1_0000.png", 3), ".png"),
    Fault("error", "planes", _coloured("imagesTr/c1_0000.png", 4), ".png"),
    Fault("error", "planes", _grey_with_transparency("imagesTr/c1_0000.png"), ".png"),
    Fault("error", "planes", _vector, ".nrrd"),
    Fault("error", "planes of a label", _coloured("labelsTr/c1.png", 3), ".png"),
    Fault("error", "planes of a label", _palette, ".png"),
    Fault("error", "fourth dimension", _fourth),
    Fault("error", "complex numbers", _complex),
    Fault("error", "dimensions", _slice_file),
    Fault("error", "dimensions", _flat_nii, ".nii"),
    Fault("error", "dimensions", _slice_tiff, ".tif"),
    Fault("warning", "one slice", _flat),
    Fault("warning", "one slice", _flat_elsewhere),
)
VOXELS = (
    Fault("error", "shape", _label(1, lambda label: label[:, :, :-1])),
    Fault("error", "spacing", _label(1, _same, spacing=(1.0, 1.0, 3.0))),
    Fault("error", "spacing", _second_channel),
    Fault("error", "spacing", _unpacked_voxel_size, ".nii"),
    Fault("warning", "spacing", _repack(_voxel_size(0))),
    Fault("warning", "origin", _label(1, _same, origin=(0.0, 0.0, 40.0))),
    Fault("warning", "direction", _label(1, _same, direction=(1, 0, 0, 0, -1, 0, 0, 0, 1))),
    Fault("error", "unknown label values", _label(1, _with(7))),
    Fault("error", "rounding noise", _label(1, _with(1.0000002))),
    Fault("error", "NaN or infinite", lambda folder: write_itk(
        _with(np.inf)(arrays(1)[0]), folder / "imagesTr/c1_0000.mha"), ".mha"),
    Fault("error", "NaN or infinite", _image(1, _with(1e300, np.float64))),
    Fault("warning", "NaN or infinite", _zeros),
    Fault("warning", "constant images", _image(1, lambda image: np.full_like(image, 5))),
    Fault("warning", "empty images", _image(1, np.zeros_like)),
    Fault("warning", "no foreground", _no_foreground),
)  # fmt: skip
FAULTS = {"dataset.json": DATASET_JSON, "Names and lists": NAMES, "Files": FILES, "Voxels": VOXELS}
