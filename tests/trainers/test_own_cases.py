"""Sites with few cases, and folds of cases that are not there: told before a site joins, and nobody waits for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import in_process
import pytest
from in_process import InProcess
from tiny import DATASET, tiny_plans

from nnunet_fed.study.federation import Federation
from nnunet_fed.trainers.nnUNetTrainerFedAvg import nnUNetTrainerFedAvg
from nnunet_fed.trainers.nnUNetTrainerFedSM import nnUNetTrainerFedSM
from nnunet_fed.trainers.parts.training_record import RECORD

FEDAVG = {"name": "fedavg"}


def refused(sites: InProcess, capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence with which the training ends at a site, before it has joined."""
    trainers = sites.make(nnUNetTrainerFedAvg, sites.study(method=FEDAVG))
    with pytest.raises(SystemExit) as ended:
        sites.run(trainers)
    assert all(trainer._membership is None for trainer in trainers.values()), "it has not joined"
    return str(ended.value)


@pytest.mark.parametrize("cases", [1, 2, 4])
def test_a_numbered_fold_of_few_cases_is_refused_with_what_to_do(
    cases: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sites = InProcess(tmp_path, monkeypatch, {"a": cases})
    (tmp_path / "a" / "preprocessed" / DATASET / "splits_final.json").unlink()
    sentence = refused(sites, capsys)
    number = "1 case" if cases == 1 else f"{cases} cases"
    assert f"{DATASET} has {number}, too few for folds" in sentence
    assert f"nnUNetv2_train {DATASET} 2d all -tr nnUNetTrainerFedAvg -p nnUNetFedPlans" in sentence


@pytest.mark.parametrize("cases", [1, 3])
def test_few_cases_take_part_with_all(cases: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = InProcess(tmp_path, monkeypatch, {"a": cases, "b": 6}, folds={"a": "all"})
    (tmp_path / "a" / "preprocessed" / DATASET / "splits_final.json").unlink()
    trained = sites.train(nnUNetTrainerFedAvg, sites.study(method=FEDAVG))
    assert [trained[site].site_weight for site in "ab"] == [cases, 5]
    folder = Path(trained["a"].output_folder)
    assert folder.name == "fold_all"
    assert json.loads((folder / RECORD).read_text())["training_cases"] == cases, "the weight is what is trained on"


def test_the_selector_of_fedsm_learns_from_a_single_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FedSM's selector needs training and validation cases of its own."""
    sites = InProcess(tmp_path, monkeypatch, {"a": 1, "b": 6}, folds={"a": "all"})
    trained = sites.train(nnUNetTrainerFedSM, sites.study(method={"name": "fedsm", "selector_patches": 1}))
    for site in "ab":
        assert (Path(trained[site].output_folder) / "checkpoint_final.pth").is_file()


def test_cases_that_are_gone_and_cases_in_no_fold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sites = InProcess(tmp_path, monkeypatch, {"a": 6})
    dataset = tmp_path / "a" / "preprocessed" / DATASET
    folds = json.loads((dataset / "splits_final.json").read_text())
    folds[0]["train"] += ["case_6", "case_7"]
    (dataset / "splits_final.json").write_text(json.dumps(folds))
    sentence = refused(sites, capsys)
    assert "2 cases (case_6, case_7) of which nothing is preprocessed" in sentence
    assert "nnunet_fed plan_and_preprocess" in sentence

    folds[0]["train"] = ["case_1", "case_2"]
    (dataset / "splits_final.json").write_text(json.dumps(folds))
    (trainer,) = sites.train(nnUNetTrainerFedAvg, sites.study(method=FEDAVG)).values()
    assert "3 cases (case_3, case_4, case_5) of 6 in no fold" in Path(trainer.log_file).read_text()
    assert trainer.site_weight == 2


def test_preprocessing_that_was_killed_does_not_look_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sites = InProcess(tmp_path, monkeypatch, {"a": 5})
    dataset = tmp_path / "a" / "preprocessed" / DATASET
    (dataset / "tiny").rename(dataset / "nnUNetFed_tiny")

    def of_planning(study: Federation) -> dict[str, Any]:
        plans = tiny_plans(study)
        plans["configurations"]["2d"]["data_identifier"] = "nnUNetFed_tiny"
        return plans

    monkeypatch.setattr(in_process, "tiny_plans", of_planning)
    assert "is not preprocessed, or not completely" in refused(sites, capsys)
    (dataset / "nnUNetFed_tiny.complete.json").write_text("{}")
    sites.train(nnUNetTrainerFedAvg, sites.study(method=FEDAVG))
    shutil.rmtree(dataset / "nnUNetFed_tiny")
    assert "Give the command 'nnunet_fed plan_and_preprocess' again" in refused(sites, capsys)
