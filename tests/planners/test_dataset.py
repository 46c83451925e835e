"""Data sets of one site, good and bad, and the comparison of the sites' data sets."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from workers import workers_as_threads

from nnunet_fed.errors import DisagreementError, FederationError
from nnunet_fed.exchange.communicator import LocalFederation
from nnunet_fed.planners import planning
from nnunet_fed.planners.dataset import check_agreement
from nnunet_fed.planners.planning import PlanningResult, plan_and_preprocess
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.labels import LabelMap
from nnunet_fed.study.methods.fedavg_options import FedAvg

PAGE = Path(__file__).parents[2] / "docs" / "disagreement.md"


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nnU-Net's folders; analysis in threads, a thousandth of nnU-Net's samples, and no preprocessing."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
        (tmp_path / name).mkdir()
    original = DatasetFingerprintExtractor.__init__

    def few_samples(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.num_foreground_voxels_for_intensitystats = 10e4

    monkeypatch.setattr(DatasetFingerprintExtractor, "__init__", few_samples)
    workers_as_threads(monkeypatch)
    monkeypatch.setattr(planning, "preprocess_dataset", lambda *_: None)
    return tmp_path / "nnUNet_raw"


def write(
    raw: Path, number: int, cases: int, ending: str = ".nii.gz", labels: tuple[str, ...] = ("organ", "lesion")
) -> Path:
    """Cases that depend on their number only, with one MR channel."""
    folder = raw / f"Dataset{number:03d}_Test"
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for case in range(cases):
        rng = np.random.default_rng(case)
        label = np.zeros((20, 24, 22 + case), np.uint8)
        label[4:12, 4:12, 4:12], label[6:9, 6:9, 6:9] = 1, 2
        image = rng.normal(100 * label, 20).astype(np.float32)
        for file, array in ((f"imagesTr/c{case}_0000", image), (f"labelsTr/c{case}", np.minimum(label, len(labels)))):
            itk = sitk.GetImageFromArray(array)
            itk.SetSpacing((1.0, 1.0, 1.5))
            sitk.WriteImage(itk, str(folder / f"{file}{ending}"))
    content = {
        "channel_names": {"0": "MRI"},
        "labels": {name: value for value, name in enumerate(("background", *labels))},
        "numTraining": cases,
        "file_ending": ending,
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def plan(datasets: dict[str, int], maps: dict[str, LabelMap] | None = None) -> dict[str, PlanningResult]:
    study = Federation.model_validate(
        {"name": "test", "sites": list(datasets), "method": {"name": "fedavg"}, "rounds": 2}
    )
    return LocalFederation(list(datasets), deadline=60).run(
        lambda seat: plan_and_preprocess(
            seat, study, datasets[seat.site], processes=1, labels=(maps or {}).get(seat.site)
        )
    )


def fingerprint(raw: Path, name: str) -> dict[str, Any]:
    file = raw.with_name("nnUNet_preprocessed") / name / "dataset_fingerprint.json"
    content: dict[str, Any] = json.loads(file.read_text())
    return content


# ------------------------------------------------------------------------------------------------------- good data sets


def test_sites_with_other_file_endings_and_a_single_case_plan_together(raw: Path) -> None:
    endings = {"a": ".nii.gz", "b": ".mha", "c": ".nrrd"}
    for number, ending in enumerate(endings.values(), start=11):
        write(raw, number, cases=number - 10, ending=ending)
    results = plan({site: number for number, site in enumerate(endings, start=11)})
    assert len({result.plans_digest for result in results.values()}) == 1
    assert {site: result.local_cases for site, result in results.items()} == {"a": 1, "b": 2, "c": 3}
    assert {result.total_cases for result in results.values()} == {6}


def test_labels_that_nnunet_takes_for_whole_numbers_are_such_for_the_sites(raw: Path) -> None:
    written = [{"background": 0, "organ": 1, "lesion": 2}, {"background": "0", "lesion": "2", "organ": 1.0}]
    for number, labels in enumerate(written, start=11):
        path = write(raw, number, cases=2) / "dataset.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "labels": labels}))
    results = plan({"a": 11, "b": 12})
    assert results["a"].plans_digest == results["b"].plans_digest
    assert fingerprint(raw, "Dataset011_Test") == fingerprint(raw, "Dataset012_Test")


def test_a_site_maps_its_labels(raw: Path) -> None:
    write(raw, 11, cases=2, labels=("tumour",))
    write(raw, 12, cases=3)
    by_hand = write(raw, 13, cases=3, labels=("tumour",))
    for file in by_hand.glob("labelsTr/*"):
        array = sitk.GetArrayFromImage(sitk.ReadImage(str(raw / "Dataset012_Test" / "labelsTr" / file.name)))
        itk = sitk.GetImageFromArray((array == 2).astype(np.uint8))
        itk.SetSpacing((1.0, 1.0, 1.5))
        sitk.WriteImage(itk, str(file))
    with pytest.raises(DisagreementError, match="differ in labels"):
        plan({"a": 11, "b": 12})
    mapped = plan({"a": 11, "b": 12}, {"b": LabelMap(512, {"tumour": ("lesion",)})})
    assert mapped["b"].dataset_name == "Dataset512_Test_mapped"
    same = plan({"a": 11, "b": 13})
    assert mapped["b"].plans_digest == same["b"].plans_digest == mapped["a"].plans_digest
    assert fingerprint(raw, "Dataset512_Test_mapped") == fingerprint(raw, "Dataset013_Test")


# -------------------------------------------------------------------------------------------------------- bad data sets


def truncate(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 3 // 4])


def flip_bits(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


def no_image(file: Path) -> None:
    file.write_text("no image")


def not_a_number(file: Path) -> None:
    image = sitk.ReadImage(str(file))
    image[5:9, 5:9, 5:9] = float("nan")
    sitk.WriteImage(image, str(file))


@pytest.mark.parametrize(
    ("name", "ending", "spoil", "message"),
    [
        (
            "imagesTr/c1_0000",
            ".nii.gz",
            truncate,
            r"case c1, imagesTr/c1_0000.nii.gz: it cannot be read: it is cut off",
        ),
        ("imagesTr/c1_0000", ".nii.gz", flip_bits, r"case c1, imagesTr/c1_0000.nii.gz: it cannot be read: "),
        ("imagesTr/c1_0000", ".nii.gz", no_image, r"case c1, imagesTr/c1_0000.nii.gz: it cannot be read: "),
        ("imagesTr/c1_0000", ".nrrd", truncate, r"case c1, imagesTr/c1_0000.nrrd: it cannot be read: "),
        ("imagesTr/c1_0000", ".mha", truncate, r"case c1, imagesTr/c1_0000.mha: it cannot be read: "),
        ("imagesTr/c0_0000", ".nii.gz", truncate, r"case c0, imagesTr/c0_0000.nii.gz: it cannot be read: "),
        ("labelsTr/c1", ".nii.gz", truncate, r"case c1, labelsTr/c1.nii.gz: it cannot be read: it is cut off"),
        ("labelsTr/c1", ".nii.gz", no_image, r"case c1, labelsTr/c1.nii.gz: it cannot be read: "),
        ("imagesTr/c1_0000", ".mha", not_a_number, r"c1_0000.mha: 64 voxels NaN or infinite; .*\n  -> Replace"),
        ("imagesTr/c1_0000", ".nrrd", not_a_number, r"c1_0000.nrrd: 64 voxels NaN or infinite"),
    ],
)
def test_files_that_are_not_in_order(
    raw: Path, name: str, ending: str, spoil: Callable[[Path], Any], message: str
) -> None:
    spoil(write(raw, 11, cases=2, ending=ending) / f"{name}{ending}")
    with pytest.raises(FederationError, match=message):
        plan({"a": 11})


# --------------------------------------------------------------------------------------------- sites that do not agree


def descriptions() -> dict[str, dict[str, Any]]:
    """What three sites tell that agree, see ``describe``."""
    return {
        site: {
            "channels": ["CT", "MRI"],
            "labels": [["background", 0], ["organ", 1], ["lesion", 2]],
            "regions_class_order": None,
            "dimensions": 3,
            "nnunetv2": "2.8.1",
            "nnunet_fed": "0.1.0",
            "planner": "nnUNetPlannerFed",
            "training cases": cases,
        }
        for site, cases in (("charite", 41), ("mayo", 120), ("umcu", 17))
    }


@pytest.mark.parametrize(
    ("title", "changes"),
    [
        ("Swapped channels", {"mayo": {"channels": ["MRI", "CT"]}}),
        ("A missing label", {"umcu": {"labels": [["background", 0], ["organ", 1]]}}),
        ("2D against 3D", {"charite": {"dimensions": 2}}),
        ("Another version of nnU-Net", {"mayo": {"nnunetv2": "2.6.2"}}),
        ("No two sites alike", {"mayo": {"planner": "nnUNetPlannerFedResEncM"}, "umcu": {"planner": "Mine"}}),
    ],
)
def test_the_page_on_disagreement_shows_what_is_printed(title: str, changes: dict[str, dict[str, Any]]) -> None:
    told = descriptions()
    method = FedAvg(name="fedavg")
    check_agreement(told, method)
    for site, change in changes.items():
        told[site] |= change
    with pytest.raises(DisagreementError) as error:
        check_agreement(told, method)
    section = re.split(rf"^## {title}$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1]
    shown = re.findall(r"```text\n(.*?)\n```", section, flags=re.DOTALL)[0]
    assert shown == f"Error: {error.value}"
