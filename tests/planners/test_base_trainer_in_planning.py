"""A base trainer that a study names, while the sites plan: it is compared, and no other's results are overwritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from planning_sites import SITE_A, SITE_B, read, study, write_dataset

from nnunet_fed.errors import ConfigurationError, DisagreementError
from nnunet_fed.exchange.communicator import LocalCommunicator, LocalFederation
from nnunet_fed.planners.joining import join_and_preprocess
from nnunet_fed.planners.planning import PlanningResult, plan_and_preprocess

DATASETS = {"a": SITE_A, "b": SITE_B}
DA5 = "nnUNetTrainerDA5"


@pytest.fixture
def two(raw: Path, instant: list[list[str]]) -> None:
    for number in DATASETS.values():
        write_dataset(raw, number, range(2))


def plan(trainers: dict[str, str | None], **settings: Any) -> dict[str, PlanningResult]:
    """Plan at both sites, each with its own file of the trainer."""
    agreed = study("ab", **settings)

    def at(seat: LocalCommunicator) -> PlanningResult:
        return plan_and_preprocess(seat, agreed, DATASETS[seat.site], None, 1, base_trainer=trainers[seat.site])

    return LocalFederation("ab", deadline=60).run(at)


def test_the_plans_carry_it(two: None) -> None:
    plan({"a": f"{DA5} 12", "b": f"{DA5} 12"}, trainer=DA5)
    assert read(SITE_A, "nnUNetFedPlans.json")["federation"]["study"]["trainer"] == DA5


def test_sites_with_other_files_of_it_are_told_before_anything_else_is_sent(two: None) -> None:
    sent: list[str] = []

    def at(seat: LocalCommunicator) -> str:
        gather = seat.gather
        seat.gather = lambda key, value: sent.append(key) or gather(key, value)  # type: ignore[method-assign,func-returns-value]
        seat.sum = lambda key, array: sent.append(key)  # type: ignore[method-assign,assignment,return-value,func-returns-value]
        told = f"{DA5} {seat.site}"
        with pytest.raises(DisagreementError) as disagreement:
            plan_and_preprocess(seat, study("ab", trainer=DA5), DATASETS[seat.site], None, 1, base_trainer=told)
        return str(disagreement.value)

    for sentence in LocalFederation("ab", deadline=60).run(at).values():
        assert sentence.startswith("The sites' data sets differ in base trainer:")
        assert f"{DA5} a *" in sentence
        assert f"{DA5} b *" in sentence
    assert set(sent) == {"planning/dataset"}


def test_without_a_name_nothing_is_told_of_it(two: None) -> None:
    told: list[Any] = []

    def at(seat: LocalCommunicator) -> None:
        gather = seat.gather
        seat.gather = lambda key, value: told.append(value) or gather(key, value)  # type: ignore[method-assign,func-returns-value]
        plan_and_preprocess(seat, study("ab"), DATASETS[seat.site], None, 1)

    LocalFederation("ab", deadline=60).run(at)
    assert all("base trainer" not in value for value in told[:2])


def leave_results(folder: Path, plans_name: str, **of_study: Any) -> Path:
    """The folder of a training at site a."""
    place = folder / "nnUNet_results" / f"Dataset{SITE_A:03d}_Test" / f"nnUNetTrainerFedAvg__{plans_name}__3d_fullres"
    place.mkdir(parents=True)
    carried = study("ab", **of_study)
    (place / "plans.json").write_text(json.dumps({"federation": {"study": {**carried.stored(), "name": "earlier"}}}))
    return place


def test_results_of_another_base_are_not_mixed(two: None, tmp_path: Path) -> None:
    left = leave_results(tmp_path, "nnUNetFedPlans", trainer="nnUNetTrainerBN")
    sentence = r"the study 'earlier', whose base trainer is nnUNetTrainerBN, .* builds on nnUNetTrainer.*'plans_name'"
    for trainer in (None, DA5):
        settings = {} if trainer is None else {"trainer": trainer}
        seat = LocalFederation("a").communicator("a")
        with pytest.raises(ConfigurationError, match=sentence) as told:
            plan_and_preprocess(seat, study("a", **settings), SITE_A, None, 1, base_trainer=trainer)
        assert str(told.value).startswith(str(left))
        with pytest.raises(ConfigurationError, match=sentence):
            join_and_preprocess(seat, study("a", **settings), SITE_A, None, 1, base_trainer=trainer)  # type: ignore[arg-type]


def test_results_of_the_same_base_or_under_another_name_stay(two: None, tmp_path: Path) -> None:
    leave_results(tmp_path, "nnUNetFedPlans", trainer=DA5)
    leave_results(tmp_path, "OtherPlans")
    (tmp_path / "nnUNet_results" / f"Dataset{SITE_A:03d}_Test" / "nnUNetTrainer__nnUNetFedPlans__2d").mkdir()
    plan({"a": DA5, "b": DA5}, trainer=DA5)


def test_results_of_plain_nnunet_are_no_study(two: None, tmp_path: Path) -> None:
    place = leave_results(tmp_path, "nnUNetFedPlans")
    (place / "plans.json").write_text("{}")
    plan({"a": DA5, "b": DA5}, trainer=DA5)
