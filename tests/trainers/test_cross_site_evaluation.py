"""Each site's model at each site: what travels, what is evaluated where, and what happens when a site is away."""

from __future__ import annotations

import json
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from in_process import InProcess, Killed, LocalSession, same_arrays, weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from serving import Serve, make_study, together

from nnunet_fed.errors import DisagreementError
from nnunet_fed.exchange.cross_site_matrix import DICE, matrix, model_key
from nnunet_fed.methods.tensors import shared_tensors, to_arrays
from nnunet_fed.report.gather import Run
from nnunet_fed.trainers import nnUNetTrainerFedSM
from nnunet_fed.trainers.nnUNetTrainerDitto import nnUNetTrainerDitto
from nnunet_fed.trainers.nnUNetTrainerFedAvg import nnUNetTrainerFedAvg
from nnunet_fed.trainers.nnUNetTrainerFedOAP import nnUNetTrainerFedOAP
from nnunet_fed.trainers.nnUNetTrainerLocal import nnUNetTrainerLocal
from nnunet_fed.trainers.parts import (
    connected_trainer,
    cross_site_evaluation,
    further_validation,
    sentences,
    study_trainer,
)
from nnunet_fed.trainers.parts.checkpoint import network_weights
from nnunet_fed.trainers.parts.coordinator_session import Membership
from nnunet_fed.trainers.parts.study_trainer import SKIP_VALIDATION_VARIABLE

FEDSM = nnUNetTrainerFedSM.nnUNetTrainerFedSM
METHODS: list[tuple[type[Any], dict[str, Any]]] = [
    (nnUNetTrainerLocal, {"name": "local"}),
    (nnUNetTrainerFedAvg, {"name": "fedavg"}),
    (nnUNetTrainerFedAvg, {"name": "fedavg", "finetune_epochs": 1}),
    (nnUNetTrainerDitto, {"name": "ditto"}),
    (FEDSM, {"name": "fedsm", "familiarity_gate": False}),
    (nnUNetTrainerFedOAP, {"name": "fedoap", "finetune_epochs": 1}),
]


def score(network: torch.nn.Module, cases: int) -> float:
    """In the place of a Dice: another one for each model and site."""
    return float(np.mean([np.abs(array).mean() for array in weights(network).values()])) / cases


class Validations:
    """Stands for nnU-Net's validation; knows what was validated where."""

    def __init__(self, cases: dict[str, int]):
        self.cases = cases
        self.done: list[tuple[str, str]] = []

    def __call__(self, trainer: Any, save_probabilities: bool = False) -> None:
        folder = Path(trainer.output_folder)
        site = next(part for part in folder.parts if part in self.cases)
        model = folder.name if folder.parent.name == cross_site_evaluation.FOLDER else folder.name.partition("_")[0]
        self.done.append((site, model))
        dice = score(trainer.bare(trainer.network), self.cases[site])
        (folder / "validation").mkdir(parents=True, exist_ok=True)
        (folder / "validation" / "summary.json").write_text(json.dumps({"foreground_mean": {"Dice": dice}}))


@pytest.fixture
def sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InProcess:
    sites = InProcess(tmp_path, monkeypatch)
    monkeypatch.delenv(SKIP_VALIDATION_VARIABLE)
    monkeypatch.setenv(sentences.DEBUG_VARIABLE, "1")  # errors as they are
    for module in (study_trainer, further_validation):
        monkeypatch.setattr(module, "evaluate_lesions", lambda trainer: None)
    monkeypatch.setattr(nnUNetTrainerFedSM, "validate_global_and_super", lambda trainer, save: None)
    return sites


@pytest.fixture
def validations(sites: InProcess, monkeypatch: pytest.MonkeyPatch) -> Validations:
    validations = Validations(sites.cases)
    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", lambda *given: validations(*given))
    return validations


def trained(sites: InProcess, trainer: type[Any], study: Any) -> dict[str, Any]:
    trainers = sites.make(trainer, study)
    sites.run(trainers, validate=True)
    return trainers


def recorded(trainer: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(trainer.output_folder) / "federation.json").read_text())["cross_site"]
    return found


def again(sites: InProcess, trainer: type[Any], study: Any, flag: str) -> dict[str, Any]:
    """What nnU-Net makes of ``--c`` or ``--val`` after the end."""
    trainers = {site: sites.trainer(trainer, study, site) for site in sites.cases}
    for one in trainers.values():
        one.logger.resume = flag == "--c"
        one.load_checkpoint(str(Path(one.output_folder) / "checkpoint_final.pth"))
    return trainers


@pytest.mark.parametrize(("trainer", "method"), METHODS)
def test_every_model_is_evaluated_everywhere(
    sites: InProcess, validations: Validations, trainer: type[Any], method: dict[str, Any]
) -> None:
    trainers = trained(sites, trainer, sites.study(method=method, cross_site=True))
    expected = {
        model: {at: score(one.bare(one.network), cases) for at, cases in sites.cases.items()}
        for model, one in trainers.items()
    }
    for site, one in trainers.items():
        assert recorded(one)["matrix"] == expected
        final = network_weights(Path(one.output_folder) / "checkpoint_final.pth")
        own = one.bare(one.network).state_dict()
        assert all(torch.equal(final[name], own[name]) for name in own), "the site has its own model again"
        sent = sites.rooms.means[model_key(site)]
        assert same_arrays(sent, weights(one.network)), "all tensors of the deployed model, private ones too"
    personal = method["name"] not in ("fedavg",) or "finetune_epochs" in method
    assert personal == (expected["a"] != expected["b"]), "otherwise there is but one model"


def test_nobody_leaves_before_all_is_evaluated(
    sites: InProcess, validations: Validations, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    for name in ("leave", "part"):
        monkeypatch.setattr(LocalSession, name, lambda *given: left.append(len(validations.done)), raising=False)
    trained(sites, nnUNetTrainerFedAvg, sites.study(method={"name": "fedavg", "finetune_epochs": 1}, cross_site=True))
    assert left == [len(validations.done)] * 2


def test_what_was_killed_goes_on_and_evaluates_nothing_twice(sites: InProcess, validations: Validations) -> None:
    study = sites.study(method={"name": "local"}, cross_site=True)
    calm = recorded(trained(sites, nnUNetTrainerLocal, study)["a"])
    for key in (model_key("a"), model_key("b"), DICE):
        killed = sites.make(nnUNetTrainerLocal, study)
        validations.done.clear()
        sites.rooms.kill_before = key
        with pytest.raises(Killed):
            sites.run(killed, validate=True)
        sites.rooms.kill_before = None
        resumed = again(sites, nnUNetTrainerLocal, study, "--c")
        sites.run(resumed, validate=True)
        assert [recorded(one) for one in resumed.values()] == [calm, {**calm, "evaluated_here": calm_at(calm, "b")}]
        assert validations.done.count(("b", "a")) == validations.done.count(("a", "b")) == 1
        sites.run(again(sites, nnUNetTrainerLocal, study, "--c"), validate=True)
        assert validations.done.count(("b", "a")) == 1, "it is complete"


def calm_at(record: dict[str, Any], site: str) -> dict[str, float]:
    return {model: row[site] for model, row in record["matrix"].items()}


def test_after_the_end_nobody_is_needed(
    sites: InProcess, validations: Validations, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = sites.study(method={"name": "fedavg"}, cross_site=True)
    trained(sites, nnUNetTrainerFedAvg, study)
    monkeypatch.setattr(connected_trainer, "CoordinatorSession", lambda *given, **named: pytest.fail("joins"))
    sites.run(again(sites, nnUNetTrainerFedAvg, study, "--c"), validate=True)
    for one in again(sites, nnUNetTrainerFedAvg, study, "--val").values():
        (Path(one.output_folder) / "federation.json").unlink()  # as if it had not come to the evaluation
        one.perform_actual_validation()
    assert ("a", "fold") in validations.done


def test_a_training_anew_in_the_same_folder_evaluates_anew(sites: InProcess, validations: Validations) -> None:
    study = sites.study(method={"name": "local"}, cross_site=True)
    first = trained(sites, nnUNetTrainerLocal, study)
    longer = study.model_copy(update={"rounds": 3})
    sites._runs -= 1
    second = trained(sites, nnUNetTrainerLocal, longer)
    assert first["a"].output_folder == second["a"].output_folder
    assert validations.done.count(("a", "b")) == 2


def test_only_with_the_consent_of_the_plans(sites: InProcess, validations: Validations) -> None:
    off, on = (sites.study(method={"name": "fedavg"}, cross_site=value) for value in (False, True))
    for planned, served in ((off, on), (on, off), (off, off)):
        one = sites.make(nnUNetTrainerFedAvg, planned)["a"]
        one._membership = Membership(served, "", 1, 0, "")
        assert not one.validates_together
    trainers = trained(sites, nnUNetTrainerFedAvg, off)
    assert ("a", "b") not in validations.done
    assert not [key for key in sites.rooms.means if key.startswith("cross-site")]
    assert "cross_site" not in json.loads((Path(trainers["a"].output_folder) / "federation.json").read_text())


def test_what_a_later_validation_notes_joins_the_record(sites: InProcess, validations: Validations) -> None:
    study = sites.study(method={"name": "fedavg"})
    trained(sites, nnUNetTrainerFedAvg, study)
    one = again(sites, nnUNetTrainerFedAvg, study, "--val")["a"]
    path = Path(one.output_folder) / "federation.json"
    before = json.loads(path.read_text())
    one.note_facts(super_model_choices={"global": 2})
    assert json.loads(path.read_text()) == {**before, "super_model_choices": {"global": 2}}
    path.unlink()
    one.note_facts(super_model_choices={"global": 2})
    assert not path.exists(), "no record begins with a validation"


# ----------------------------------------------------------------------------------------------------- over the network


class SmallTrainer(SimpleNamespace):
    """What the evaluation needs of a trainer."""

    def __init__(self, seat: Any, folder: Path, outputs: int = 2):
        torch.manual_seed(ord(seat.site[0]))
        super().__init__(
            communicator=seat, output_folder=str(folder), network=torch.nn.Linear(3, outputs), events=[], local_rank=0
        )
        folder.mkdir()
        self.validated(str(folder))

    def bare(self, network: torch.nn.Module) -> torch.nn.Module:
        return network

    def happened(self, text: str) -> None:
        self.events.append(text)

    def note_facts(self, **facts: Any) -> None:
        (Path(self.output_folder) / "federation.json").write_text(json.dumps(facts))

    def print_to_log_file(self, text: str) -> None:
        pass

    def validated(self, folder: str) -> None:
        (Path(folder) / "validation").mkdir(parents=True)
        content = {"foreground_mean": {"Dice": score(self.network, ord(self.communicator.site[0]))}}
        (Path(folder) / "validation" / "summary.json").write_text(json.dumps(content))


@pytest.fixture
def without_nnunet(monkeypatch: pytest.MonkeyPatch) -> None:
    def validate(trainer: SmallTrainer, name: str, save_probabilities: bool) -> None:
        trainer.validated(f"{trainer.output_folder}/{name}")

    monkeypatch.setattr(cross_site_evaluation, "validate_below", validate)


def evaluate(trainer: SmallTrainer) -> dict[str, Any]:
    cross_site_evaluation.evaluate_across_sites(trainer, False, lambda phase: None)  # type: ignore[arg-type]
    return recorded(trainer)


@pytest.mark.usefixtures("without_nnunet")
def test_a_site_that_is_away_is_left_out(serve: Serve, tmp_path: Path) -> None:
    settings = {"min_sites": 2, "deadline_minutes": 0.02, "keep_rounds": 2, "wire_dtype": "bfloat16"}
    served = serve(make_study(("a", "b", "c", "d"), cross_site=True, **settings))
    sent: list[dict[str, Any]] = []
    seats = {site: served.seat(site, outgoing=sent.append) for site in ("a", "b", "d")}
    together(*(partial(seat.mean, "round-0007/model", {"w": np.ones(2)}, 1.0) for seat in seats.values()))
    trainers = {site: SmallTrainer(seat, tmp_path / site) for site, seat in seats.items()}
    found = dict(zip(trainers, together(*(partial(evaluate, one) for one in trainers.values())), strict=True))
    expected = {model: {at: score(one.network, ord(at)) for at in trainers} for model, one in trainers.items()}
    assert all(record["matrix"] == expected for record in found.values())
    assert all(len(one.events) == 1 and "model of c" in one.events[0] for one in trainers.values())
    record = served.coordinator.status(record=True)
    [run] = record["runs"].values()
    assert run["cross_site"] == expected == Run("name", {}, record, {}).cross_site
    assert seats["a"].newest("model") == "round-0007/model", "where a late site goes on is kept"
    uploads = [entry["key"] for entry in sent if entry["what"] == "upload" and entry["verb"] == "mean"]
    assert sorted(uploads)[:3] == [model_key(site) for site in "abd"], "each model leaves its site, once"
    late = SmallTrainer(served.seat("c"), tmp_path / "c")
    assert set(evaluate(late)["matrix"]) == {"c"}
    assert len(late.events) == 5


@pytest.mark.usefixtures("without_nnunet")
def test_a_model_of_another_network_is_refused(serve: Serve, tmp_path: Path) -> None:
    served = serve(make_study(cross_site=True))
    a, b = (SmallTrainer(served.seat(site), tmp_path / site, n) for site, n in (("a", 2), ("b", 3)))
    before = to_arrays(shared_tensors(b.network))["weight"].copy()
    errors: list[BaseException] = []

    def refuse() -> None:
        try:
            evaluate(b)
        except DisagreementError as error:
            errors.append(error)

    thread = threading.Thread(target=refuse)
    thread.start()
    a.communicator.mean(model_key("a"), to_arrays(shared_tensors(a.network)), 1.0)
    thread.join()
    assert "'weight' has the shape (2, 3), this site's (3, 3)" in str(errors[0])
    assert np.array_equal(to_arrays(shared_tensors(b.network))["weight"], before)


# ----------------------------------------------------------------------------------------------------------- the matrix


@pytest.mark.parametrize("said", [None, True, "0.5", [0.5], {}, float("nan"), float("inf"), -0.1, 1.5, 10**400])
def test_whatever_a_site_says_becomes_a_dice_or_nothing(said: Any) -> None:
    found = matrix({"a": {"a": said, "b": 0.5}, "b": said, "c": {"b": 1}}, "ab")
    assert found == {"a": {"a": None}, "b": {"a": 0.5, "c": 1.0}}


def test_the_matrix_is_turned() -> None:
    columns = {"b": {"a": 0.25, "b": None}, "a": {"a": 0.75, "x": 1.0}}
    assert matrix(columns, ["b", "a"]) == {"a": {"a": 0.75, "b": 0.25}, "b": {"b": None}}
