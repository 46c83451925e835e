"""Scoring what nnU-Net's validation left in the folder of an arm."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from rich.console import Console

from nnunet_fed.errors import FederationError
from nnunet_fed.evaluation.case_scores import scores_of_run

CUBE = np.zeros((8, 8, 8), np.uint8)
CUBE[2:5, 2:5, 2:5] = 1


def left_by_validation(run: Path, site: str, case: str, fold: str = "fold_0", all_cases: bool = False) -> Path:
    """A site whose model predicts a voxel too far along z; returns the prediction."""
    file = run / "summary.json"
    summary = json.loads(file.read_text()) if file.is_file() else {"sites": {}}
    summary["sites"][site] = {"fold": "all" if all_cases or fold == "fold_all" else 0}
    file.write_text(json.dumps(summary))
    place = run / "sites" / site
    model = place / "nnUNet_results" / "Dataset001_x" / "T__P__3d_fullres"
    validation, preprocessed = model / fold / "validation", place / "nnUNet_preprocessed" / "Dataset001_x"
    for folder in (validation, preprocessed / "cases", preprocessed / "gt_segmentations"):
        folder.mkdir(parents=True, exist_ok=True)
    plans = {"image_reader_writer": "SimpleITKIO", "configurations": {"3d_fullres": {"data_identifier": "cases"}}}
    (model / "plans.json").write_text(json.dumps(plans))
    labels = {"background": 0, "organ": 1, "lesion": 2}
    (model / "dataset.json").write_text(json.dumps({"labels": labels, "file_ending": ".nii.gz"}))
    lesions = [{"dice": 0.2, "small": True}, {"dice": 0.4, "small": True}, {"dice": 0.9, "small": None}]
    found = {"cases": {case: {"organ": {"lesions": lesions}, "lesion": {"lesions": []}}}}
    (validation / "lesions.json").write_text(json.dumps(found))
    prediction = validation / f"{case}.nii.gz"
    for path, array in ((preprocessed / "gt_segmentations" / prediction.name, CUBE), (prediction, np.roll(CUBE, 1, 0))):
        sitk.WriteImage(sitk.GetImageFromArray(array), str(path))
    (preprocessed / "cases" / f"{case}.pkl").write_bytes(pickle.dumps({"spacing": [3.0, 1.0, 1.0]}))
    return prediction


def quiet() -> Console:
    return Console(file=io.StringIO())


def test_each_class_of_each_case_with_the_spacing_of_the_image(tmp_path: Path) -> None:
    left_by_validation(tmp_path, "b", "x")
    left_by_validation(tmp_path, "a", "y")
    left_by_validation(tmp_path, "c", "z", "fold_all")
    left_by_validation(tmp_path, "d", "z", "fold_1", all_cases=True)
    rows = scores_of_run(tmp_path, "fedavg", 3, 3.0, quiet())
    assert [(row.site, row.case, row.label) for row in rows] == [
        ("a", "y", "organ"), ("a", "y", "lesion"), ("b", "x", "organ"), ("b", "x", "lesion"),
    ]  # fmt: skip
    organ, lesion = rows[:2]
    assert (organ.method, organ.seed, organ.dice, organ.hd95, organ.nsd) == (
        "fedavg",
        3,
        pytest.approx(2 / 3),
        3.0,
        1.0,
    )
    assert (organ.small_dice, organ.large_dice) == (pytest.approx(0.3), None)
    assert (lesion.dice, lesion.nsd) == (None, None)


def test_the_cases_of_all_folds_are_scored(tmp_path: Path) -> None:
    for number in (0, 3):
        left_by_validation(tmp_path, "a", f"x{number}", f"fold_{number}")
    rows = scores_of_run(tmp_path, "fedavg", 0, 3.0, quiet())
    assert {row.case for row in rows} == {"x0", "x3"}


def test_cases_are_scored_once_for_a_tolerance(tmp_path: Path) -> None:
    prediction = left_by_validation(tmp_path, "a", "x")
    first = scores_of_run(tmp_path, "local", 0, 3.0, quiet())
    stricter = scores_of_run(tmp_path, "local", 0, 0.5, quiet())
    assert first[0].nsd == 1.0
    assert stricter[0].nsd is not None
    assert stricter[0].nsd < 1.0
    prediction.unlink()
    assert scores_of_run(tmp_path, "local", 0, 0.5, quiet()) == stricter
    with pytest.raises(FederationError, match=r"x\.nii\.gz cannot be compared with its reference"):
        scores_of_run(tmp_path, "local", 0, 3.0, quiet())


def test_cases_of_pooled_data_go_back_to_their_sites(tmp_path: Path) -> None:
    left_by_validation(tmp_path, "pooled", "b@x")
    rows = scores_of_run(tmp_path, "pooled", 0, 1.0, quiet(), {"b@x": ("b", "x")})
    assert {(row.site, row.case) for row in rows} == {("b", "x")}
