"""What planning makes of data as hospitals have them: colours, keys of channels, folds of other cases, odd voxels."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty_data import arrays, describe, make, write_itk
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from planning_sites import OTHER, POOL, SITE_A, SITE_B, few_samples, plan, preprocessed, read, study, write_dataset
from skimage import io
from workers import workers_as_threads

from nnunet_fed.agreement.fingerprint import LocalFingerprint
from nnunet_fed.agreement.odd_plans import far_from_own, thin_patches
from nnunet_fed.agreement.plan_digest import comparable
from nnunet_fed.datasets.findings import FILE
from nnunet_fed.datasets.folds import FoldChoice, kept_folds
from nnunet_fed.errors import FederationError
from nnunet_fed.planners import planning
from nnunet_fed.planners.dataset import describe as tell
from nnunet_fed.planners.dataset import find_dataset, looked_at


def write_colours(raw: Path, number: int, cases: tuple[int, ...]) -> None:
    folder = make(raw / f"Dataset{number:03d}_Test", ".png", cases=0)
    for case in cases:
        image, label = arrays(case, (40 + 3 * case, 50))
        picture = np.stack([image, image / 2, 255 - image], -1).clip(0, 255).astype(np.uint8)
        io.imsave(folder / f"imagesTr/c{case}_0000.png", picture, check_contrast=False)
        io.imsave(folder / f"labelsTr/c{case}.png", label, check_contrast=False)
    describe(folder, numTraining=len(cases), channel_names={"0": "R", "1": "G", "2": "B"})


def test_plans_of_colours_are_those_of_the_pool(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_samples(monkeypatch)
    workers_as_threads(monkeypatch)
    monkeypatch.setattr(planning, "preprocess_dataset", lambda *_: None)
    for number, cases in ((POOL, (0, 1, 2, 3, 4)), (SITE_A, (0, 2, 4)), (SITE_B, (1, 3))):
        write_colours(raw, number, cases)
    plan({"a": SITE_A, "b": SITE_B}, configuration="2d")
    DatasetFingerprintExtractor(POOL, 1).run(overwrite_existing=True)
    ExperimentPlanner(POOL).plan_experiment()
    stock = comparable(read(POOL, "nnUNetPlans.json"))
    for channel in stock["foreground_intensity_properties_per_channel"].values():
        channel["mean"], channel["std"] = (pytest.approx(channel[key], rel=1e-6) for key in ("mean", "std"))
    assert comparable(read(SITE_A, "nnUNetFedPlans.json")) == stock
    assert len(stock["configurations"]["2d"]["normalization_schemes"]) == 3


def test_what_a_key_says_is_compared_and_planned(raw: Path, instant: list[list[str]]) -> None:
    for number in (SITE_A, SITE_B):
        write_dataset(raw, number, (0, 1))
    describe(raw / "Dataset012_Test", channel_names={"1": "MRI", "0": "CT"})
    plan({"a": SITE_A, "b": SITE_B})
    schemes = [
        read(number, "nnUNetFedPlans.json")["configurations"]["2d"]["normalization_schemes"]
        for number in (SITE_A, SITE_B)
    ]
    assert schemes == [["CTNormalization", "ZScoreNormalization"]] * 2
    assert tell(find_dataset(SITE_B), "P")["channels"] == ["CT", "MRI"]


def test_the_dimension_is_not_that_of_the_first_case(raw: Path) -> None:
    folder = make(raw / "Dataset021_Test")
    for array, file in zip(arrays(0, (1, 8, 7)), ("imagesTr/c0_0000", "labelsTr/c0"), strict=True):
        write_itk(array, folder / f"{file}.nii.gz")
    assert tell(looked_at(OTHER), "P")["dimensions"] == 3


def test_nothing_is_sent_and_all_is_told(raw: Path, instant: list[list[str]]) -> None:
    folder = make(raw / "Dataset021_Test")
    write_itk(arrays(1)[1] * 7, folder / "labelsTr/c1.nii.gz")
    describe(folder, labels={"zero": 0, "organ": 1})
    sent: list[str] = []

    class Listening:
        site = "a"

        def gather(self, key: str, value: Any) -> None:
            sent.append(key)

    with pytest.raises(FederationError, match=r"(?s)have 2 errors \(nothing was sent\).*background.*value 7"):
        planning.plan_and_preprocess(Listening(), study(["a"]), OTHER)  # type: ignore[arg-type]
    assert sent == []
    kept = json.loads((preprocessed(OTHER) / FILE).read_text())
    assert [finding["kind"] for finding in kept["findings"]] == ["background", "unknown label values"]


def write_cases(raw: Path, number: int, cases: Sequence[int]) -> Path:
    shutil.rmtree(raw / f"Dataset{number:03d}_Test", ignore_errors=True)
    return write_dataset(raw, number, cases, channels=("MRI",))


def folds_of(cases: Sequence[int], number: int) -> list[dict[str, list[str]]]:
    """A cross-validation as nnU-Net makes it."""
    names = [f"case_{case:03d}" for case in cases]
    return [
        {"train": [name for name in names if name not in names[fold::number]], "val": names[fold::number]}
        for fold in range(number)
    ]


def test_added_and_removed_cases_are_told_and_no_other_case_changes_its_fold(
    raw: Path, instant: list[list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    write_cases(raw, OTHER, range(5))
    plan({"a": OTHER})
    assert caplog.text == "", "nothing has changed yet"
    splits, before = preprocessed(OTHER) / "splits_final.json", folds_of(range(5), 5)
    splits.write_text(json.dumps(before))
    write_cases(raw, OTHER, range(8))
    plan({"a": OTHER})
    added = {"case_005", "case_006", "case_007"}
    now = read(OTHER, "splits_final.json")
    assert [set(fold["val"]) - added for fold in now] == [set(fold["val"]) for fold in before]
    assert [set(fold["train"]) - added for fold in now] == [set(fold["train"]) for fold in before]
    assert sorted(case for fold in now for case in fold["val"]) == [f"case_{case:03d}" for case in range(8)]
    assert all(len(fold["train"]) + len(fold["val"]) == 8 for fold in now)
    assert "Since the last planning of Dataset021_Test with 5 cases: 3 cases (case_005, case_006, case_007) added" in (
        caplog.text
    )
    assert "3 cases (case_005, case_006, case_007) added to the folds (validated in fold 0, 1, 2)" in caplog.text
    assert read(OTHER, "splits_final.previous.json") == before

    caplog.clear()
    write_cases(raw, OTHER, (0, 1, 2, 3, 4, 5, 7))
    os.utime(raw / "Dataset021_Test/imagesTr/case_004_0000.nii.gz", (1, 1))
    plan({"a": OTHER})
    assert sorted(case for fold in read(OTHER, "splits_final.json") for case in fold["val"]) == sorted(
        f"case_{case:03d}" for case in (0, 1, 2, 3, 4, 5, 7)
    )
    assert "1 case (case_006) taken out" in caplog.text
    assert "1 case (case_006) removed" in caplog.text
    assert "changed" in caplog.text


def test_folds_are_made_anew_if_asked_for(raw: Path, instant: list[list[str]]) -> None:
    write_cases(raw, OTHER, range(5))
    plan({"a": OTHER})
    splits = preprocessed(OTHER) / "splits_final.json"
    splits.write_text(json.dumps(folds_of(range(5), 5)))
    plan({"a": OTHER}, folds=FoldChoice.new)
    assert not splits.exists(), "nnU-Net makes them when it trains"
    assert read(OTHER, "splits_final.previous.json") == folds_of(range(5), 5)


def test_folds_that_cannot_be_kept_are_told_before_anything_is_sent(raw: Path, instant: list[list[str]]) -> None:
    write_cases(raw, OTHER, range(5))
    plan({"a": OTHER})
    splits = preprocessed(OTHER) / "splits_final.json"
    splits.write_text(json.dumps(folds_of(range(5), 5)))
    write_cases(raw, OTHER, range(3))
    sent: list[str] = []

    class Listening:
        site = "a"

        def gather(self, key: str, value: Any) -> None:
            sent.append(key)

    with pytest.raises(
        FederationError, match=r"fold 3 would have no case for validation\. Nothing was sent.*--folds new"
    ):
        planning.plan_and_preprocess(Listening(), study(["a"]), OTHER)  # type: ignore[arg-type]
    assert sent == []
    (raw / "Dataset021_Test" / "splits_final.json").write_text(json.dumps(folds_of(range(3), 3)))
    with pytest.raises(FederationError, match=r"are not those in .*Give --folds new"):
        planning.plan_and_preprocess(Listening(), study(["a"]), OTHER)  # type: ignore[arg-type]
    assert sent == []
    plan({"a": OTHER}, folds=FoldChoice.new)
    assert read(OTHER, "splits_final.json") == folds_of(range(3), 3), "they are the site's own"


def test_folds_that_are_no_cross_validation_train_on_new_cases() -> None:
    """What somebody has set apart for validation stays what it is."""
    one = [{"train": ["a", "b"], "val": ["c"]}]
    assert kept_folds(one, ["a", "b", "c", "d"]) == [{"train": ["a", "b", "d"], "val": ["c"]}]
    apart = [{"train": ["a", "b"], "val": ["c"]}, {"train": ["a"], "val": ["c"]}]
    assert kept_folds(apart, ["a", "b", "c", "d"]) == [
        {"train": ["a", "b", "d"], "val": ["c"]},
        {"train": ["a", "d"], "val": ["c"]},
    ]


# -------------------------------------------------------------------------------------------------- odd voxel sizes


def of_site(spacing: list[float], shape: list[int]) -> LocalFingerprint:
    return LocalFingerprint(
        [spacing] * 3, [shape] * 3, [0.9] * 3, [np.arange(9, dtype=np.float32)] * 2, {"organ": [2.5]}
    )


def test_voxels_that_spoil_the_plans_of_all(
    raw: Path, instant: list[list[str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One site says metres along an axis: the others' images would vanish, and preprocessing would not say why."""
    parts = {SITE_A: of_site([1.0, 1.0, 1.0], [24, 64, 64]), SITE_B: of_site([1000.0, 1.0, 1.0], [24, 64, 64])}
    monkeypatch.setattr(planning, "extract", lambda number, *_: parts[number])
    for number in parts:
        write_dataset(raw, number, (0, 1, 2), labels={"background": 0, "organ": 1, "lesion": 2})
    told = r"Site 'a' cannot preprocess by these plans: 3d_fullres has a voxel size of 500.5 x 1 x 1, and of 3 of this"
    with caplog.at_level(logging.WARNING), pytest.raises(FederationError, match=told):
        plan({"a": SITE_A, "b": SITE_B}, deadline=3)
    assert "Before anybody trains: 3d_fullres has a voxel size of 500.5 x 1 x 1, this site's images have 1 x 1 x 1" in (
        caplog.text
    )


def test_a_patch_that_is_flat_is_told_with_the_planners_numbers() -> None:
    plans: dict[str, Any] = {
        "original_median_spacing_after_transp": [999.0, 0.5, 300.0],
        "original_median_shape_after_transp": [1, 600, 400],
        "transpose_forward": [0, 1, 2],
        "configurations": {
            "2d": {"patch_size": [576, 1], "spacing": [0.5, 300.0], "median_image_size_in_voxels": [600.0, 1.0]},
            "3d_fullres": {"patch_size": [32, 64, 64], "spacing": [1.0, 1.0, 1.0], "median_image_size_in_voxels": []},
        },
    }
    (sentence,) = thin_patches(plans, ["2d", "3d_fullres", "3d_lowres"])
    assert sentence.startswith("2d has a patch of 576 x 1 voxels")
    for number in ("voxel size 0.5 x 300", "median shape 600 x 1", "999 x 0.5 x 300", "1 x 600 x 400"):
        assert number in sentence
    assert far_from_own(of_site([999.0, 0.5, 300.0], [1, 600, 400]), plans, ["2d"]) == []
    (own,) = far_from_own(of_site([999.0, 0.5, 0.5], [1, 600, 400]), plans, ["2d"])
    assert "600 times as much or as little" in own
