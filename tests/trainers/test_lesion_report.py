"""What a trainer leaves of its validation, lesion by lesion, from files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_fed.errors import FederationError
from nnunet_fed.trainers.parts.lesion_report import evaluate_lesions

SPACING = (2.0, 1.0, 0.5)


def trainer(folder: Path, thresholds: dict[str, Any] | None = None, rank: int = 0) -> Any:
    """Two validated cases; in the second the prediction is empty."""
    (folder / "validation").mkdir()
    (folder / "gt_segmentations").mkdir()
    reference = np.zeros((4, 6, 6), np.uint8)
    reference[0, 0, :4], reference[3, 3, 3], reference[2:, 5] = 1, 1, 2
    for case, prediction in (("a", reference), ("b", reference * 0)):
        for part, array in (("gt_segmentations", reference), ("validation", prediction)):
            sitk.WriteImage(sitk.GetImageFromArray(array), str(folder / part / f"{case}.nii.gz"))
    (folder / "validation" / "summary.json").touch()
    content = {} if thresholds is None else {"small_lesions": thresholds}

    class Dataset:
        """The images' spacing, which the label files do not have."""

        def __init__(self, folder: str, cases: list[str]):
            assert cases[0] in "ab"

        def load_case(self, case: str) -> tuple[Any, ...]:
            return None, None, None, {"spacing": SPACING}

    return SimpleNamespace(
        local_rank=rank,
        output_folder=str(folder),
        preprocessed_dataset_folder_base=str(folder),
        preprocessed_dataset_folder=str(folder),
        dataset_json={"file_ending": ".nii.gz", "labels": {"background": 0, "lesion": 1, "organ": 2}},
        dataset_class=Dataset,
        plans_manager=SimpleNamespace(plans={"federation": content}, image_reader_writer_class=SimpleITKIO),
        print_to_log_file=print,
    )


def read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "validation" / "lesions.json").read_text())
    return content


def test_each_lesion_of_each_case(tmp_path: Path) -> None:
    evaluate_lesions(trainer(tmp_path, {"lesion": 1.0, "organ": None}))
    content = read(tmp_path)
    assert content["small_lesions"] == {"lesion": 1.0, "organ": None}
    assert content["cases"]["a"]["lesion"] == {
        "lesions": [
            {"volume": 4.0, "small": False, "detected": True, "dice": 1.0},
            {"volume": 1.0, "small": True, "detected": True, "dice": 1.0},
        ],
        "false_positives": 0,
    }
    assert [lesion["detected"] for lesion in content["cases"]["b"]["lesion"]["lesions"]] == [False, False]
    assert content["lesions"]["lesion"] == {"small": 2, "large": 2, "all": 4, "false_positives": 0}
    assert content["dice_small"] == {"lesion": 0.5, "organ": None}
    assert content["dice_lesions"] == {"lesion": 0.5, "organ": 0.5}
    assert content["lesion_recall_large"] == {"lesion": 0.5, "organ": None}


def test_plans_from_before_there_were_thresholds(tmp_path: Path) -> None:
    evaluate_lesions(trainer(tmp_path))
    content = read(tmp_path)
    assert content["small_lesions"] == {"lesion": None, "organ": None}
    assert content["dice_small"] == {"lesion": None, "organ": None}
    assert content["lesion_recall"] == {"lesion": 0.5, "organ": 0.5}


def test_only_one_rank_writes(tmp_path: Path) -> None:
    evaluate_lesions(trainer(tmp_path, rank=1))
    assert not (tmp_path / "validation" / "lesions.json").exists()


def test_a_case_that_cannot_be_compared_is_named(tmp_path: Path) -> None:
    given = trainer(tmp_path)
    (tmp_path / "gt_segmentations" / "b.nii.gz").unlink()
    with pytest.raises(FederationError, match=r"prediction .*b.nii.gz cannot be compared .*gt_segmentations"):
        evaluate_lesions(given)
