"""A site with labels of its own plans and trains with those of the federation."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.planners.dataset import find_dataset, reader_of
from nnunet_fed.planners.mapping import prepare_dataset
from nnunet_fed.study.labels import LabelMap
from nnunet_fed.study.site import Site

OWN = {"background": 0, "liver": 1, "tumour": 2, "cyst": 3}
LESIONS = LabelMap(501, {"lesion": ("tumour", 3)})
MAPPED = "Dataset501_Test_mapped"


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
        (tmp_path / name).mkdir()
    return tmp_path / "nnUNet_raw"


def label_array(case: int, values: int = 4) -> Any:
    return np.random.default_rng(case).integers(0, values, (4, 6, 5)).astype(np.uint8)


def write(raw: Path, cases: int = 2, ending: str = ".nii.gz", labels: Mapping[str, Any] = OWN, **more: Any) -> Path:
    """Data set 1: oblique images with one channel."""
    folder = raw / "Dataset001_Test"
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / name).mkdir(parents=True)
    for case in range(cases):
        label = label_array(case)
        for name, array in ((f"imagesTr/c{case}_0000", label.astype(np.float32) * 9), (f"labelsTr/c{case}", label)):
            write_image(folder / f"{name}{ending}", array)
    write_image(folder / f"imagesTs/t_0000{ending}", label_array(9))
    content = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": cases, "file_ending": ending, **more}
    (folder / "dataset.json").write_text(json.dumps(content))
    (folder / "splits_final.json").write_text('[{"train": ["c0"], "val": ["c1"]}]')
    (folder / "cases.csv").write_text("case,age\nc0,50\nc1,60\n")
    return folder


def write_image(path: Path, array: Any) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((0.9, 1.1, 2.3))
    image.SetOrigin((1.25, -7.7, 300.1))
    cosine, sine = math.cos(0.3), math.sin(0.3)
    image.SetDirection((cosine, -sine, 0, sine, cosine, 0, 0, 0, 1))
    sitk.WriteImage(image, str(path))


def modified(folder: Path) -> list[int]:
    return [path.stat().st_mtime_ns for path in sorted((folder / "labelsTr").iterdir())]


# -------------------------------------------------------------------------------------------------------------- the map


@pytest.mark.parametrize(
    ("sources", "own", "labels", "values"),
    [
        ({"lesion": ("tumour", 3)}, OWN, ["background", "lesion"], [0, 0, 1, 1]),
        ({"lesion": (2,), "organ": ("liver",)}, OWN, ["background", "lesion", "organ"], [0, 2, 1, 0]),
        ({"organ": (), "lesion": (2,)}, OWN, ["background", "organ", "lesion"], [0, 0, 2, 0]),
        ({"background": (0, 1), "lesion": (2,)}, OWN, ["background", "lesion"], [0, 0, 1, 0]),
        ({"ignore": ("cyst",), "lesion": (2,)}, OWN, ["background", "lesion", "ignore"], [0, 0, 1, 2]),
        ({"ignore": (), "lesion": (2,)}, OWN, ["background", "lesion", "ignore"], [0, 0, 1, 0]),
        ({"lesion": (2,)}, {**OWN, "ignore": 4}, ["background", "lesion", "ignore"], [0, 0, 1, 0, 2]),
        ({"lesion": (2, 4)}, {**OWN, "ignore": 4}, ["background", "lesion"], [0, 0, 1, 0, 1]),
        ({"lesion": (2,), "background": ("ignore",)}, {**OWN, "ignore": 4}, ["background", "lesion"], [0, 0, 1, 0, 0]),
        ({"lesion": ("tumour", 2)}, OWN, ["background", "lesion"], [0, 0, 1, 0]),
        (
            {"lesion": ("tumour", 3)},
            {"background": "0", "liver": "1", "tumour": "2", "cyst": 3.0},
            ["background", "lesion"],
            [0, 0, 1, 1],
        ),
    ],
)
def test_numbers_of_a_map(
    sources: dict[str, tuple[int | str, ...]], own: dict[str, Any], labels: list[str], values: list[int]
) -> None:
    resolved = LabelMap(501, sources).resolve(own, "dataset.json")
    assert resolved.labels == {label: number for number, label in enumerate(labels)}
    assert resolved.values == dict(enumerate(values))


@pytest.mark.parametrize(
    ("sources", "own", "message"),
    [
        ({"lesion": ("tumor",)}, OWN, r"'lesion' names 'tumor', which the file does not have. Use liver \(1\), tumour"),
        ({"lesion": (7,)}, OWN, r"'lesion' names 7, which"),
        ({"lesion": (2,), "other": ("tumour",)}, OWN, r"lets 'tumour' become both 'lesion' and 'other'"),
        ({"lesion": (2,), "ignore": (2,)}, OWN, r"lets 2 become both 'lesion' and 'ignore'"),
        ({"lesion": ()}, OWN, r"leaves none .* but background. Name at least one of liver \(1\)"),
        ({"background": (1,)}, OWN, r"leaves none"),
        ({"lesion": ("background",)}, OWN, r"background stays background"),
        ({"lesion": (0, 2)}, OWN, r"background stays background"),
        ({"lesion": (2,)}, {"background": 0, "all": [1, 2], "x": 2}, r"the file has region-based labels"),
    ],
)
def test_maps_that_make_no_sense(sources: dict[str, tuple[int | str, ...]], own: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LabelMap(501, sources).resolve(own, "the file")


HEAD = 'name = "a"\ncoordinator = "127.0.0.1:1"\n'


@pytest.mark.parametrize(
    "text",
    [
        'mapped_dataset = 501\n[labels]\nlesion = ["tumour", 3]\nvessel = []\nliver = "liver"',
        'labels = { lesion = ["tumour", 3], vessel = [], liver = "liver" }\nmapped_dataset = 501',
    ],
)
def test_a_map_in_site_toml(tmp_path: Path, text: str) -> None:
    (tmp_path / "site.toml").write_text(HEAD + text)
    read = Site.read(tmp_path / "site.toml").label_map
    assert read == LabelMap(501, {"lesion": ("tumour", 3), "vessel": (), "liver": ("liver",)})
    assert read is not None
    assert list(read.sources) == ["lesion", "vessel", "liver"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('labels = { a = "b" }', "labels and mapped_dataset go together"),
        ("mapped_dataset = 501", "labels and mapped_dataset go together"),
        ("mapped_dataset = 501\nlabels = {}", "labels: "),
        ("mapped_dataset = 1000\nlabels = { a = 1 }", "mapped_dataset: "),
        ("mapped_dataset = 501\nlabels = { a = 1.5 }", "labels.a: use a label's name or number"),
        ("mapped_dataset = 501\nlabels = { a = [true] }", "labels.a: use a label's name or number"),
    ],
)
def test_mistakes_in_site_toml(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "site.toml").write_text(HEAD + text)
    with pytest.raises(ConfigurationError, match=message):
        Site.read(tmp_path / "site.toml")


def test_a_site_without_a_map() -> None:
    assert Site(name="a", coordinator="127.0.0.1:1").label_map is None


# ----------------------------------------------------------------------------------------------------- mapped data sets


def test_a_mapped_data_set(raw: Path) -> None:
    source = write(raw, regions_class_order=[1, 2, 3])
    made = prepare_dataset(1, LESIONS)
    assert (made.id, made.name, made.folder) == (501, MAPPED, raw / MAPPED)
    content = json.loads((source / "dataset.json").read_text())
    del content["regions_class_order"]
    provenance = made.json["provenance"]
    assert made.json == content | {"labels": {"background": 0, "lesion": 1}, "provenance": provenance}
    assert provenance["source"] == source.name
    assert provenance["values"] == {"0": 0, "1": 0, "2": 1, "3": 1}
    for case, files in made.cases.items():
        assert Path(files["images"][0]).resolve() == source / "imagesTr" / f"{case}_0000.nii.gz"
        own, new = (sitk.ReadImage(str(folder / "labelsTr" / f"{case}.nii.gz")) for folder in (source, made.folder))
        assert np.array_equal(sitk.GetArrayFromImage(new), sitk.GetArrayFromImage(own) >= 2)
        assert new.GetPixelID() == sitk.sitkUInt8
        for geometry in ("GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(new, geometry)() == getattr(own, geometry)()
    for name in ("splits_final.json", "cases.csv", "imagesTs"):
        assert (made.folder / name).resolve() == source / name
    assert sorted(path.name for path in raw.iterdir()) == [source.name, MAPPED]


@pytest.mark.parametrize(
    ("labels", "sources", "lesions"),
    [
        ({"background": 0, "liver": 1, "tumor": 2, "vessel": 3}, ("tumor",), (2,)),  # LiTS, of which only the tumor
        ({"background": 0, "necrosis": 1, "oedema": 2, "enhancing": 3}, (1, 2, 3), (1, 2, 3)),  # BraTS, all of it
        ({"background": 0, "kidney": 1, "tumor": 2, "ignore": 3}, ("tumor",), (2,)),
    ],
)
def test_one_lesion_in_many_organs(
    raw: Path, labels: dict[str, int], sources: tuple[int | str, ...], lesions: tuple[int, ...]
) -> None:
    """Invariant 24 of FedOAP's notes: background, lesion and ignore, and as many lesion voxels as there were."""
    source = write(raw, labels=labels)
    made = prepare_dataset(1, LabelMap(501, {"lesion": sources}))
    ignored = labels.get("ignore")
    assert made.json["labels"] == {"background": 0, "lesion": 1} | ({} if ignored is None else {"ignore": 2})
    for case in made.cases:
        own, new = (
            sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "labelsTr" / f"{case}.nii.gz")))
            for folder in (source, made.folder)
        )
        counts = dict(zip(*np.unique(new, return_counts=True), strict=True))
        assert set(counts) == ({0, 1} if ignored is None else {0, 1, 2})
        assert counts[1] == np.isin(own, lesions).sum()
        assert counts.get(2, 0) == (own == ignored).sum()


def test_copies_where_links_are_not_allowed(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("a required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    write(raw)
    made = prepare_dataset(1, LESIONS)
    files = [path for path in made.folder.rglob("*") if path.is_file()]
    assert len(files) == 8
    assert not any(path.is_symlink() for path in made.folder.rglob("*"))


def test_files_listed_in_dataset_json(raw: Path) -> None:
    source = write(raw)
    (source / "labelsTr").rename(source / "elsewhere")
    (source / "splits_final.json").unlink()
    listed = {"x": {"images": ["imagesTr/c0_0000.nii.gz"], "label": "elsewhere/c0.nii.gz"}}
    content = json.loads((source / "dataset.json").read_text()) | {"dataset": listed, "numTraining": 1}
    (source / "dataset.json").write_text(json.dumps(content))
    made = prepare_dataset(1, LESIONS)
    assert made.cases["x"]["label"] == str(made.folder / "labelsTr" / "x.nii.gz")
    assert Path(made.cases["x"]["images"][0]).resolve() == source / "imagesTr" / "c0_0000.nii.gz"
    assert "dataset" not in made.json


@pytest.mark.parametrize(
    ("ending", "reader"),
    [
        (".mha", "SimpleITKIO"),
        (".nrrd", "SimpleITKIOWithReorient"),
        (".nii.gz", "NibabelIO"),
        (".nii.gz", "NibabelIOWithReorient"),
        (".png", "NaturalImage2DIO"),
        (".tif", "Tiff3DIO"),
    ],
)
def test_every_reader_writes_what_it_reads(raw: Path, ending: str, reader: str) -> None:
    if ending in (".png", ".tif"):
        write_plain(raw, ending, reader)
    else:
        write(raw, ending=ending, overwrite_image_reader_writer=reader)
    made = prepare_dataset(1, LESIONS)
    assert reader_of(made).__name__ == reader
    own, new = (find_dataset(number) for number in (1, 501))
    for case in own.cases:
        before, geometry = reader_of(own)().read_seg(own.cases[case]["label"])
        after, new_geometry = reader_of(new)().read_seg(new.cases[case]["label"])
        assert np.array_equal(after, before >= 2)
        assert new_geometry["spacing"] == pytest.approx(geometry["spacing"], rel=1e-6)  # NIfTI has 32 bits
        images = [reader_of(data)().read_images(data.cases[case]["images"]) for data in (own, new)]
        assert np.array_equal(images[0][0], images[1][0])
        assert images[0][1]["spacing"] == images[1][1]["spacing"]


def write_plain(raw: Path, ending: str, reader: str) -> None:
    """Formats without a geometry; the TIFF reader finds the spacing in a file beside the image."""
    source = write(raw, overwrite_image_reader_writer=reader)
    for path in [*source.rglob("*.nii.gz")]:
        array = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).astype(np.uint8)
        array = array[0] if ending == ".png" else array
        sitk.WriteImage(sitk.GetImageFromArray(array), str(path).replace(".nii.gz", ending))
        path.unlink()
    if ending == ".tif":
        for path in (source / "labelsTr").glob("*.tif"):
            for folder in ("imagesTr", "labelsTr"):
                (source / folder / f"{path.stem}.json").write_text('{"spacing": [2.5, 1.0, 1.0]}')
    content = json.loads((source / "dataset.json").read_text()) | {"file_ending": ending}
    (source / "dataset.json").write_text(json.dumps(content))


def test_built_again_only_when_something_changed(raw: Path) -> None:
    source = write(raw)
    folder = prepare_dataset(1, LESIONS).folder
    states = [modified(folder)]

    def again(label_map: LabelMap = LESIONS) -> bool:
        states.append(modified(prepare_dataset(1, label_map).folder))
        return states[-1] != states[-2]

    assert not again()
    write_image(source / "imagesTs" / "u_0000.nii.gz", label_array(8))
    assert not again()
    assert (folder / "imagesTs" / "u_0000.nii.gz").is_file()
    os.utime(source / "labelsTr" / "c0.nii.gz", (1, 1))
    assert again()
    assert again(LabelMap(501, {"lesion": ("tumour",)}))
    assert not again(LabelMap(501, {"lesion": (2,)}))
    (folder / "imagesTr" / "c0_0000.nii.gz").unlink()
    assert again(LabelMap(501, {"lesion": (2,)}))
    assert not [path for path in raw.iterdir() if path.name.startswith(".")]


def test_an_unfinished_build_does_not_count(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(raw)
    stock = SimpleITKIO.write_seg

    def no_space(self: Any, seg: Any, file: str, properties: Any) -> None:
        if "c1" in Path(file).name:
            raise OSError(28, "No space left on device")
        stock(self, seg, file, properties)

    with monkeypatch.context() as patch:
        patch.setattr(SimpleITKIO, "write_seg", no_space)
        with pytest.raises(ConfigurationError, match=r"Dataset501_Test_mapped cannot be built: .*No space left"):
            prepare_dataset(1, LESIONS)
        assert not (raw / MAPPED).exists()
    old = prepare_dataset(1, LESIONS)
    with monkeypatch.context() as patch:
        patch.setattr(SimpleITKIO, "write_seg", no_space)
        with pytest.raises(ConfigurationError, match=r"No space left"):
            prepare_dataset(1, LabelMap(501, {"lesion": (2,)}))
        assert find_dataset(501) == old  # the old one stands


@pytest.mark.parametrize(
    ("folder", "provenance", "message"),
    [
        ("nnUNet_raw/Dataset501_Other", None, r"Dataset501_Other has the number 501 and was not made from Dataset001"),
        ("nnUNet_preprocessed/Dataset501_Other", None, r"Dataset501_Other has the number 501"),
        ("nnUNet_results/Dataset501_Other", None, r"Dataset501_Other has the number 501"),
        (f"nnUNet_raw/{MAPPED}", None, r"Dataset501_Test_mapped has the number 501"),
        (f"nnUNet_raw/{MAPPED}", "by hand", r"Dataset501_Test_mapped has the number 501"),
        (f"nnUNet_raw/{MAPPED}", {"source": "Dataset002_Test"}, r"Dataset501_Test_mapped has the number 501"),
    ],
)
def test_nothing_else_is_overwritten(raw: Path, folder: str, provenance: Any, message: str) -> None:
    write(raw)
    other = raw.parent / folder
    other.mkdir()
    (other / "dataset.json").write_text(json.dumps({} if provenance is None else {"provenance": provenance}))
    with pytest.raises(ConfigurationError, match=rf"{message}.*Set mapped_dataset .* that is free"):
        prepare_dataset(1, LESIONS)
    assert [path.name for path in other.iterdir()] == ["dataset.json"]


def test_the_mapped_data_set_is_no_source(raw: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"501 is mapped_dataset in site.toml.*Plan with the number of that"):
        prepare_dataset(501, LESIONS)


# ---------------------------------------------------------------------------------------------------- label files


def spoil(value: float) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        array = sitk.GetArrayFromImage(sitk.ReadImage(str(file))).astype(np.float32)
        array[1, 2, 3] = value
        write_image(file, array)

    return change


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


@pytest.mark.parametrize("label_map", [None, LESIONS])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            spoil(7),
            r"case c1, labelsTr/c1.mha: voxels of value 7; wanted: only 0, 1, 2, 3, as dataset.json",
        ),
        (spoil(1.5), r"c1.mha: voxels of value 1.5; wanted"),
        (spoil(-1), r"c1.mha: voxels of value -1; wanted"),
        (spoil(float("nan")), r"c1.mha: 1 voxel NaN"),
        (lambda file: file.write_text("no image"), r"case c1, labelsTr/c1.mha: it cannot be read: "),
        (truncate, r"case c1, labelsTr/c1.mha: it cannot be read: "),
    ],
)
def test_label_files_that_are_not_in_order(
    raw: Path, change: Callable[[Path], None], message: str, label_map: LabelMap | None
) -> None:
    source = write(raw, ending=".mha")
    change(source / "labelsTr" / "c1.mha")
    with pytest.raises(ConfigurationError, match=message):
        prepare_dataset(1, label_map)
    assert not (raw / MAPPED).exists()


def test_all_bad_label_files_are_counted(raw: Path) -> None:
    source = write(raw, cases=4, labels={"background": 0, "a": 1, "b": 2})
    (source / "labelsTr" / "c0.nii.gz").unlink()
    shutil.copy(source / "labelsTr" / "c1.nii.gz", source / "labelsTr" / "c0.nii.gz")
    with pytest.raises(ConfigurationError, match=r"have 4 errors"):
        prepare_dataset(1)


@pytest.mark.parametrize("label_map", [None, LESIONS])
def test_whole_numbers_in_floating_point_are_labels(raw: Path, label_map: LabelMap | None) -> None:
    source = write(raw)
    spoil(2.0)(source / "labelsTr" / "c1.nii.gz")
    made = prepare_dataset(1, label_map)
    assert (made.id, len(made.cases)) == (1 if label_map is None else 501, 2)


def test_values_in_regions_and_ignore_are_known(raw: Path) -> None:
    write(raw, labels={"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, regions_class_order=[1, 2])
    assert prepare_dataset(1).id == 1
