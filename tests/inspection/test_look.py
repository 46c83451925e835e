"""Every kind of fault is found by one look, alone and among others, and docs/data.md shows what is said of it."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import tifffile
from faulty_data import DATASET_JSON, FAULTS, FILES, NAMES, SHAPE, VOXELS, Fault, arrays, describe, make, write_itk
from rich.console import Console
from skimage import io

from nnunet_fed.datasets.findings import SHOWN, DataError, Finding, require
from nnunet_fed.inspection.look import look_at
from nnunet_fed.inspection.reading import FileFacts
from nnunet_fed.inspection.workers import Readers
from nnunet_fed.study.labels import LabelMap

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
PICTURE = PAGE.with_name("data_check.svg")
WRITE = "NNUNET_FED_WRITE_DOCS"
"""With this variable the page is written anew instead of compared."""


def findings(folder: Path, **options: Any) -> tuple[Finding, ...]:
    return look_at(folder, "Dataset001_Own", **options).report.findings


def kinds(folder: Path, **options: Any) -> list[tuple[str, str]]:
    return [(finding.severity.value, finding.kind) for finding in findings(folder, **options)]


def spoilt(folder: Path, fault: Fault) -> Path:
    fault.spoil(make(folder, fault.ending))
    return folder


ALL = [fault for faults in FAULTS.values() for fault in faults]


@pytest.mark.parametrize("number", range(len(ALL)), ids=[f"{fault.kind}-{fault.severity}" for fault in ALL])
def test_a_fault_is_found(tmp_path: Path, number: int) -> None:
    fault = ALL[number]
    found = findings(spoilt(tmp_path / "data", fault))
    assert (fault.severity, fault.kind) in {(finding.severity.value, finding.kind) for finding in found}
    for finding in found:
        assert finding.found
        assert finding.remedy.endswith((".", "-delete", ".)"))


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha", ".tif", ".png"])
def test_good_data(tmp_path: Path, ending: str) -> None:
    make(tmp_path / "data", ending)
    report = look_at(tmp_path / "data", "own").report
    assert (report.findings, report.cases, report.dimensions) == ((), 3, 2 if ending == ".png" else 3)


def test_ten_faults_are_found_in_one_run_and_put_right_before_the_second(tmp_path: Path) -> None:
    folder = make(tmp_path / "data", cases=12)
    names = ("imagesTr/c{}_0000.nii.gz", "labelsTr/c{}.nii.gz")
    good = {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    write_itk(arrays(0)[1][:, :, :-1], folder / names[1].format(0))
    write_itk(arrays(1)[1], folder / names[1].format(1), (1.0, 1.0, 9.0))
    write_itk(arrays(2)[1] * 5, folder / names[1].format(2))
    write_itk(arrays(3)[1] * np.float32(1.0000002), folder / names[1].format(3))
    (folder / names[0].format(4)).write_bytes(good[folder / names[0].format(4)][:300])
    image = sitk.ReadImage(str(folder / names[0].format(5)))
    sitk.WriteImage(sitk.JoinSeries([image, image]), str(folder / names[0].format(5)))
    (folder / names[1].format(6)).unlink()
    (folder / "imagesTr" / "._c7_0000.nii.gz").write_text("")
    describe(folder, labels={"zero": 0, "organ": 1})
    describe(folder, numTraining=99)
    report = look_at(folder, "own").report
    assert {finding.kind for finding in report.errors} == {
        "shape", "spacing", "unknown label values", "rounding noise", "unreadable files", "fourth dimension",
        "missing files", "hidden files", "background", "numTraining",
    }  # fmt: skip
    for path, content in good.items():
        path.write_bytes(content)
    (folder / "imagesTr" / "._c7_0000.nii.gz").unlink()
    assert findings(folder) == ()


def test_all_of_a_kind_are_in_the_json_and_some_in_the_text(tmp_path: Path) -> None:
    folder = make(tmp_path / "data", cases=9)
    for case in range(9):
        write_itk(arrays(case)[1] * 7, folder / f"labelsTr/c{case}.nii.gz")
    look = look_at(folder, "own")
    look.write(tmp_path / "kept.json")
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert [finding["case"] for finding in kept["findings"]] == [f"c{case}" for case in range(9)]
    with pytest.raises(DataError, match=r"own have 9 errors .nothing was sent") as told:
        require([look.report])
    assert str(told.value).count("voxels of value 7") == SHOWN
    assert "and so in 4 more: c5, c6, c7, c8." in str(told.value)


# ------------------------------------------------------------------------------------------- what nnU-Net takes


def test_colours_as_nnunet_documents_them(tmp_path: Path) -> None:
    folder = make(tmp_path / "data", ".png")
    for path in (folder / "imagesTr").iterdir():
        io.imsave(path, np.stack([io.imread(path)] * 3, -1), check_contrast=False)
    describe(folder, channel_names={"0": "R", "1": "G", "2": "B"})
    assert findings(folder) == ()


def test_a_list_of_files_and_keys_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "data", licence="CC0", reference="nobody")
    (folder / "imagesTr").rename(tmp_path / "scans")
    (folder / "labelsTr").rename(folder / "rater1")
    monkeypatch.setenv("SCANS", str(tmp_path / "scans"))
    table = {
        f"c{case}": {"images": [f"$SCANS/c{case}_0000.nii.gz"], "label": f"rater1/c{case}.nii.gz"} for case in range(3)
    }
    describe(folder, dataset=table)
    assert findings(folder) == ()
    (tmp_path / "scans" / "c1_0000.nii.gz").unlink()
    assert [finding.found for finding in findings(folder)] == ["the file is not there"]


def test_regions_with_ignore_last(tmp_path: Path) -> None:
    folder = make(tmp_path / "data")
    describe(folder, labels={"background": 0, "all": [1, 2], "core": [2], "ignore": 3}, regions_class_order=[1, 2])
    assert findings(folder) == ()


@pytest.mark.parametrize("labels", [{"background": "0", "organ": "1"}, {"background": 0.0, "organ": 1.0}])
def test_labels_that_nnunet_takes_for_whole_numbers(tmp_path: Path, labels: dict[str, Any]) -> None:
    folder = make(tmp_path / "data")
    describe(folder, labels=labels)
    assert kinds(folder) == [("warning", "labels")]
    assert kinds(folder, label_map=LabelMap(501, {"lesion": ("organ",)})) == [("warning", "labels")]
    describe(folder, labels={**labels, "ignore": "2"})
    assert kinds(folder) == [("error", "labels")]
    describe(folder, labels={**labels, "all": [1, 2], "core": 2}, regions_class_order=[1, 2])
    assert ("error", "labels") in kinds(folder)


def test_channels_in_any_order_of_the_keys(tmp_path: Path) -> None:
    folder = make(tmp_path / "data")
    for case in range(3):
        shutil.copy(folder / f"imagesTr/c{case}_0000.nii.gz", folder / f"imagesTr/c{case}_0001.nii.gz")
    describe(folder, channel_names={"1": "T2", "0": "T1"})
    assert findings(folder) == ()


def test_noise_below_float32_and_small_differences_of_geometry_are_none(tmp_path: Path) -> None:
    folder = make(tmp_path / "data", ".mha")
    write_itk(arrays(1)[1] * 1.000000000001, folder / "labelsTr/c1.mha")
    write_itk(arrays(2)[1], folder / "labelsTr/c2.mha", (1.00001, 1.0, 2.0), origin=(1e-3, 0, 0))
    assert findings(folder) == ()


def test_a_label_map_takes_other_values_and_noise(tmp_path: Path) -> None:
    folder = make(tmp_path / "data")
    describe(folder, labels={"background": 0, "organ": 1, "lesion": 4})
    write_itk(arrays(1)[1] * np.float32(3.9999998), folder / "labelsTr/c1.nii.gz")
    assert kinds(folder) == [("error", "label values with a gap"), ("error", "rounding noise")]
    assert findings(folder, label_map=LabelMap(501, {"lesion": ("lesion",)})) == ()
    assert kinds(folder, label_map=LabelMap(501, {"lesion": ("tumour",)})) == [("error", "label map")]


@pytest.mark.parametrize("odd", [0, 2])
def test_axes_that_itk_refuses_whatever_the_order(tmp_path: Path, odd: int) -> None:
    folder = make(tmp_path / "data")
    affine = np.eye(4)
    affine[0, 1] = 0.2
    for array, file in zip(arrays(odd), (f"imagesTr/c{odd}_0000", f"labelsTr/c{odd}"), strict=True):
        nibabel.save(nibabel.Nifti1Image(array.T, affine), folder / f"{file}.nii.gz")
    found = findings(folder)  # nnU-Net reads all with the class that reads the first
    assert [finding.kind for finding in found] == ([] if odd == 0 else ["another reader"] * 2)
    describe(folder, overwrite_image_reader_writer="NibabelIO")
    assert findings(folder) == ()


def test_one_slice_does_not_make_a_data_set_flat(tmp_path: Path) -> None:
    folder = make(tmp_path / "data")
    for array, file in zip(arrays(0, (1, 8, 7)), ("imagesTr/c0_0000", "labelsTr/c0"), strict=True):
        write_itk(array, folder / f"{file}.nii.gz")
    report = look_at(folder, "own").report
    assert (report.dimensions, [finding.kind for finding in report.findings]) == (3, ["one slice"])


def test_a_coloured_tiff_is_no_volume(tmp_path: Path) -> None:
    folder = make(tmp_path / "data", ".tif")
    for case in range(3):
        for file in (f"imagesTr/c{case}_0000", f"labelsTr/c{case}"):
            shutil.move(folder / f"{file}.tif", folder / f"{file}.tiff")
    describe(folder, file_ending=".tiff")
    assert findings(folder) == ()
    tifffile.imwrite(folder / "imagesTr/c1_0000.tiff", np.zeros((8, 7, 3), np.uint8), photometric="rgb")
    assert [finding.kind for finding in findings(folder)] == ["planes"]


def test_a_compressed_tiff_that_is_cut_off(tmp_path: Path) -> None:
    folder = make(tmp_path / "data", ".tif")
    path = folder / "imagesTr/c1_0000.tif"
    tifffile.imwrite(path, arrays(1)[0], compression="zlib", photometric="minisblack")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    assert kinds(folder) == [("error", "unreadable files")]


@pytest.mark.parametrize("odd", [0, 2])
def test_a_picture_among_tiff_volumes_is_told_whatever_the_order(tmp_path: Path, odd: int) -> None:
    folder = make(tmp_path / "data", ".tif")
    for array, file in zip(arrays(odd, SHAPE[1:]), (f"imagesTr/c{odd}_0000", f"labelsTr/c{odd}"), strict=True):
        tifffile.imwrite(folder / f"{file}.tif", array)
    found = findings(folder)
    assert {(finding.kind, finding.case) for finding in found} == {("dimensions", f"c{odd}")}


def test_a_volume_among_pictures_is_told_whatever_the_order(tmp_path: Path) -> None:
    folder = make(tmp_path / "data", ".png")
    for path in list(folder.rglob("*.png")):
        tifffile.imwrite(path.with_suffix(".tif"), io.imread(path))
        path.unlink()
    describe(folder, file_ending=".tif")
    assert findings(folder) == ()
    tifffile.imwrite(folder / "imagesTr/c0_0000.tif", arrays(0)[0], photometric="minisblack")
    assert [(finding.kind, finding.case) for finding in findings(folder)] == [("dimensions", "c0")]


def test_more_labels_than_forty_are_compared(tmp_path: Path) -> None:
    folder = make(tmp_path / "data")
    describe(folder, labels={"background": 0, **{f"part {value}": value for value in range(1, 60)}})
    label = np.arange(336, dtype=np.uint8).reshape(6, 8, 7) % 60
    write_itk(label, folder / "labelsTr/c1.nii.gz")
    assert findings(folder) == ()
    label[0, 0, 0] = 99
    write_itk(label, folder / "labelsTr/c1.nii.gz")
    assert [finding.found for finding in findings(folder)] == ["voxels of value 99"]


def test_what_follows_a_packed_file_is_passed_over_as_itk_does(tmp_path: Path) -> None:
    folder = make(tmp_path / "data")
    path = folder / "imagesTr/c1_0000.nii.gz"
    whole = path.read_bytes()
    path.write_bytes(whole + b"something")
    assert findings(folder) == ()
    path.write_bytes(gzip.compress(gzip.decompress(whole)[:500]) + gzip.compress(gzip.decompress(whole)[500:]))
    assert findings(folder) == ()
    path.write_bytes(whole[:-4])
    assert kinds(folder) == [("error", "unreadable files")]


def test_a_text_is_no_image(tmp_path: Path) -> None:
    folder = make(tmp_path / "data")
    (folder / "imagesTr/c1_0000.nii.gz").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    assert "pointer of Git LFS" in findings(folder)[0].found


def test_a_missing_channel_is_told_once(tmp_path: Path) -> None:
    folder = make(tmp_path / "data")
    for case in range(3):
        shutil.copy(folder / f"imagesTr/c{case}_0000.nii.gz", folder / f"imagesTr/c{case}_0001.nii.gz")
    describe(folder, channel_names={"0": "T1", "1": "T2"})
    (folder / "imagesTr/c1_0000.nii.gz").unlink()
    assert [finding.place for finding in findings(folder)] == ["case c1, imagesTr/c1_0000.nii.gz"]


def test_an_accent_that_is_stored_in_another_way(tmp_path: Path) -> None:
    folder = make(tmp_path / "data")
    (folder / "imagesTr/c1_0000.nii.gz").rename(folder / "imagesTr/p\xe4t_0000.nii.gz")
    (folder / "labelsTr/c1.nii.gz").rename(folder / "labelsTr/pa\u0308t.nii.gz")
    [finding] = findings(folder)
    assert (finding.kind, "an accent" in finding.found) == ("names", True)


@pytest.mark.parametrize("name", ["a b", "a.1", "p\xe4tient", "c_0000_x", "c1_0000", "c", "c[1]", "c*", "[bold]c"])
def test_names_that_nnunet_takes(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "data")
    (folder / "imagesTr/c1_0000.nii.gz").rename(folder / f"imagesTr/{name}_0000.nii.gz")
    (folder / "labelsTr/c1.nii.gz").rename(folder / f"labelsTr/{name}.nii.gz")
    assert findings(folder) == ()


def test_the_numbers_of_the_channels_are_told_as_they_should_be(tmp_path: Path) -> None:
    folder = make(tmp_path / "data")
    describe(folder, channel_names={"0000": "T1", "0002": "T2"})
    assert '{"0": "T1", "1": "T2"}' in findings(folder)[0].remedy


@pytest.mark.parametrize("text", ["[" * 100000, "{'labels': 1}", '{"labels": 1,}', "[]", "\ufeff{}", ""])
def test_whatever_stands_in_dataset_json(tmp_path: Path, text: str) -> None:
    folder = make(tmp_path / "data")
    (folder / "dataset.json").write_text(text, encoding="utf-8")
    assert kinds(folder) == [("error", "no dataset.json")]


@pytest.mark.parametrize(
    "text",
    ["[" * 100000, "{'a'}", "null", '{"train": []}', '[{"train": [["c0"]], "val": ["c1"]}]',
     '[{"train": "c0", "val": "c1"}]', "[1]"],
)  # fmt: skip
def test_whatever_stands_in_the_folds(tmp_path: Path, text: str) -> None:
    folder = make(tmp_path / "data")
    (folder / "splits_final.json").write_text(text)
    assert kinds(folder) == [("error", "folds")]


@pytest.mark.parametrize(
    ("place", "kind"),
    [("dataset.json", "no dataset.json"), ("imagesTr", "missing folder"), ("labelsTr", "missing folder"),
     ("imagesTr/c1_0000.nii.gz", "unreadable files")],
)  # fmt: skip
def test_what_may_not_be_read(tmp_path: Path, place: str, kind: str) -> None:
    folder = make(tmp_path / "data")
    (folder / place).chmod(0)
    if os.access(folder / place, os.R_OK):
        pytest.skip("whoever may read everything finds nothing")
    try:
        [finding] = findings(folder)
    finally:
        (folder / place).chmod(0o755)
    assert finding.kind == kind
    assert "denied" in finding.found or "may not be read" in finding.found


def test_an_unpacked_nifti_that_is_cut_off(tmp_path: Path) -> None:
    folder = make(tmp_path / "data", ".nii")
    path = folder / "imagesTr/c1_0000.nii"
    path.write_bytes(path.read_bytes()[:-100])
    assert [finding.kind for finding in findings(folder)] == ["unreadable files"]


# --------------------------------------------------------------------------------------------------- kept looks


def test_a_second_look_reads_what_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, kept = make(tmp_path / "data"), tmp_path / "kept.json"
    read: list[str] = []
    original = Readers.read_all

    def noting(self: Readers, jobs: Any, *others: Any) -> dict[Any, FileFacts]:
        read.extend(Path(file).name for file, _ in jobs)
        return original(self, jobs, *others)

    monkeypatch.setattr(Readers, "read_all", noting)
    look_at(folder, "own", kept).write(kept)
    assert len(read) == 6
    write_itk(arrays(1)[1] * 3, folder / "labelsTr/c1.nii.gz")
    second = look_at(folder, "own", kept)
    assert read[6:] == ["c1.nii.gz"]
    assert [finding.kind for finding in second.report.findings] == ["unknown label values"]
    (moved := tmp_path / "moved").symlink_to(folder)  # a simulation's link to the data
    second.write(kept)
    assert look_at(moved, "own", kept).report.findings == second.report.findings
    kept.write_text("{")
    look_at(folder, "own", kept)
    assert len(read) == 13


# ------------------------------------------------------------------------------------------------- the document


def rows(tmp_path: Path) -> Iterator[str]:
    for number, (title, faults) in enumerate(FAULTS.items()):
        yield f"\n### {title}\n\n| | finding | what is said of it | what to do |\n|---|---|---|---|\n"
        for place, fault in enumerate(faults):
            folder = spoilt(tmp_path / f"{number}_{place}", fault)
            finding = next(
                found
                for found in findings(folder)
                if (found.severity.value, found.kind) == (fault.severity, fault.kind)
            )
            sentence = finding.sentence.partition(f"{finding.kind}: ")[2]
            texts = [text.replace(str(folder), "DATASET").replace("|", r"\|") for text in (sentence, finding.remedy)]
            yield f"| {fault.severity} | {fault.kind} | {texts[0]} | {texts[1]} |\n"


def test_the_page_shows_what_is_said(tmp_path: Path) -> None:
    table = "".join(rows(tmp_path))
    page = PAGE.read_text(encoding="utf-8")
    begin, end = "<!-- findings: made by tests/inspection/test_look.py -->\n", "<!-- end -->"
    if os.environ.get(WRITE):
        page = re.sub(f"{begin}.*?{end}", lambda _: f"{begin}{table}{end}", page, flags=re.DOTALL)
        PAGE.write_text(page, encoding="utf-8")
        PICTURE.write_text(picture(tmp_path / "shown"), encoding="utf-8")
    shown = re.findall(f"{begin}(.*?){end}", page, flags=re.DOTALL)
    assert shown == [table], f"write it anew: {WRITE}=1 pytest {Path(__file__).name}"
    assert "unknown&#160;label&#160;values" in PICTURE.read_text(encoding="utf-8")


def picture(folder: Path) -> str:
    make(folder, cases=4)
    for fault in (VOXELS[7], DATASET_JSON[10]):
        fault.spoil(folder)
    write_itk(arrays(2)[1], folder / "labelsTr/c2.nii.gz", (1.0, 1.0, 3.0))
    write_itk(arrays(3)[1], folder / "labelsTr/c3.nii.gz", direction=(1, 0, 0, 0, -1, 0, 0, 0, 1))
    FILES[0].spoil(folder)
    NAMES[6].spoil(folder)
    console = Console(record=True, width=150, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    report = look_at(folder, "Dataset001_Own").report
    console.print(report.table())
    drawn = console.export_svg(title="nnunet_fed check -d 1 --data", unique_id="data").replace(str(folder), "DATASET")
    return re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL)  # which would be fetched from elsewhere
