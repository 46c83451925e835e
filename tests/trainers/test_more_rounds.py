"""More rounds after the end: every method goes on with all that it had, its personal states included."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from at_coordinator import AtCoordinator
from left_behind import Site01, quick_nnunet, train_together
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from serving import Served
from version_0_1 import SITES, LeftBehind

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.methods import METHODS
from nnunet_fed.study.site import Site
from nnunet_fed.trainers.fedsm import super_validation
from nnunet_fed.trainers.parts import further_validation, study_trainer
from nnunet_fed.trainers.plugin import nnunet_fed_trainers
from nnunet_fed.transport.site.client import GrpcCommunicator

OPTIONS: dict[str, dict[str, Any]] = {
    "fedgs": {"threshold": 1.5, "log_base": 2.0, "variant": "fedgs_norm"},
    "fedoap": {"finetune_epochs": 1},
    "fedsm": {"selector_patches": 2, "best_model_gate": False},
}
AT_A_COORDINATOR = [name for name in METHODS if name not in ("custom", "gcml")]
ROUNDS, MORE = 1, 1


def trainer_of(method: str) -> type[Any]:
    trainer: type[Any] = getattr(nnunet_fed_trainers, METHODS[method].own_trainer())
    return trainer


class Started:
    """Notes with what each site's first epoch of a command begins."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, trainer: type[Any]):
        self.states: dict[str, dict[str, Any]] = {}
        start = trainer.on_train_start

        def noted(one: Any) -> None:
            start(one)
            # as the checkpoint holds it, which is a copy
            path = Path(one.output_folder) / "started.pth"
            one.save_at_epoch_start(path.name)
            self.states[one.own_site().name] = torch.load(path, map_location="cpu", weights_only=False)

        monkeypatch.setattr(trainer, "on_train_start", noted)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return bool(np.array_equal(one, other)) if isinstance(one, np.ndarray) else bool(one == other or one != one)


def loaded(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
    return content


@pytest.fixture
def validated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What nnU-Net's validation was asked for, which stands in no test here: the model's folder, in the order."""
    asked: list[str] = []

    def validate(one: Any, save: bool = False) -> None:
        folder = Path(one.output_folder) / "validation"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").write_text(json.dumps({"foreground_mean": {"Dice": 0.5}}))
        asked.append(folder.parent.name)

    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", validate)
    for module in (study_trainer, further_validation, super_validation):
        monkeypatch.setattr(module, "evaluate_lesions", lambda one: None)
    monkeypatch.setattr(super_validation, "_collect", lambda *_: None)
    return asked


def files_of(folder: Path) -> dict[str, bytes]:
    """All but what a validation writes, and the logs."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "validation" not in path.parts and path.suffix != ".txt"
    }


def validate_again(sites: AtCoordinator, trainer: type[Any], study: Federation, patch: pytest.MonkeyPatch) -> None:
    """``--val`` at a site, without a coordinator and without site.toml: nothing but the validation is written."""
    before, record = files_of(sites.results("a")), sites.record("a")

    def nobody(*_: Any) -> Any:
        raise ConfigurationError("there is no site.toml, and no coordinator")

    patch.delenv("nnUNet_fed_skip_validation")
    patch.setattr(Site, "from_environment", nobody)
    patch.setattr(GrpcCommunicator, "__init__", nobody)
    again = sites.command(trainer, study, "a", continues=False)
    again.load_checkpoint(str(sites.results("a") / "checkpoint_final.pth"))
    again.perform_actual_validation()
    after = files_of(sites.results("a"))
    assert {name for name in before if after[name] != before[name]} <= {"federation.json"}
    assert after.keys() == before.keys()
    now = sites.record("a")
    assert {name: now[name] for name in record} == record, "what the record has stands"


@pytest.mark.parametrize("method", AT_A_COORDINATOR)
def test_every_method_is_validated_again_and_goes_on_with_what_it_had(
    method: str, validated: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites, trainer = AtCoordinator(tmp_path, monkeypatch), trainer_of(method)
    options = {"name": method, **OPTIONS.get(method, {})}
    study = sites.study(rounds=ROUNDS, method=options)
    sites.go(trainer, study)
    assert not validated, "it was to be skipped, or the process was killed before"
    with monkeypatch.context() as patch:
        validate_again(sites, trainer, study, patch)
    assert validated[0] == "fold_0"
    assert ("global" in validated) == (METHODS[method].MODELS > 1)
    fine_tuned = study.method.fine_tuning
    name = f"checkpoint_{METHODS[method].LAST_MODEL if fine_tuned else 'final'}.pth"
    ended = {site: loaded(sites.results(site) / name) for site in sites.cases}
    with monkeypatch.context() as patch:
        started = Started(patch, trainer)
        record = sites.go(trainer, study, more(study, MORE), continues=True)
    for site, before in ended.items():
        begun = started.states[site]
        assert begun["current_epoch"] == ROUNDS
        for what in ("network_weights", "optimizer_state", "logging"):
            assert equal(begun[what], before[what]), what
        assert equal(begun["federation"]["method"], before["federation"]["method"])
        folder = sites.results(site)
        assert equal(loaded(folder / f"after_{ROUNDS}_rounds" / name)["network_weights"], before["network_weights"])
        final, total = loaded(folder / "checkpoint_final.pth"), ROUNDS + MORE
        assert {len(values) for values in final["logging"].values()} == {total + fine_tuned}
        rates = [0.05 * (1 - epoch / total) ** 0.9 for epoch in range(ROUNDS, total)]
        assert final["logging"]["lrs"][ROUNDS:total] == pytest.approx(rates), "nnU-Net's, of all epochs"
        if METHODS[method].EXCHANGES:
            assert [entry["scope"] for entry in sites.record(site)["rounds"]] == [
                f"round-{number:04d}" for number in range(total)
            ]
        assert (folder / "checkpoint_best.pth").is_file()
    last = [loaded(sites.results(site) / f"checkpoint_{METHODS[method].LAST_MODEL}.pth") for site in sites.cases]
    if METHODS[method].EXCHANGES and method != "fedoap":
        assert equal(*(one["network_weights"] for one in last)), "the sites have one model again"
    assert record["study"]["more_rounds"] == MORE
    assert "undone" not in " ".join(event["text"] for event in record["events"])


def more(study: Federation, number: int) -> Federation:
    return Federation.model_validate({**study.model_dump(mode="json"), "more_rounds": number})


def test_killed_in_the_further_rounds_it_goes_on_bit_identically(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plans still say the first number of rounds: the checkpoint says the other one."""
    trainer, final = trainer_of("ditto"), list[dict[str, Any]]()
    for key in ("", "round-0002/model"):
        sites = AtCoordinator(tmp_path / f"killed_{bool(key)}", monkeypatch, {"a": 4})
        study = sites.study(rounds=1, method={"name": "ditto"})
        sites.go(trainer, study)
        if key:
            sites.go(trainer, study, more(study, 2), continues=True, dying={"a": key})
        sites.go(trainer, study, more(study, 2), continues=True)
        final.append(loaded(sites.results("a") / "checkpoint_final.pth"))
    for what in ("network_weights", "optimizer_state"):
        assert equal(final[1][what], final[0][what])
    assert equal(final[1]["federation"]["method"], final[0]["federation"]["method"])


def test_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites, trainer = AtCoordinator(tmp_path, monkeypatch, {"a": 4}), trainer_of("fedavg")
    study = sites.study(rounds=1, method={"name": "fedavg"})
    sites.go(trainer, study)
    for number in (1, 2):
        sites.go(trainer, study, more(study, number), continues=True)
        validated = sites.command(trainer, study, "a", continues=True)  # --val loads it in the same way
        assert validated.num_epochs == 1 + number
        assert validated.current_epoch == 1 + number
        validated._leave_folder()  # as the end of its process does
    assert {path.name for path in sites.results("a").glob("after_*")} == {"after_1_rounds", "after_2_rounds"}
    with pytest.raises(ConfigurationError, match=r"more_rounds was 2, and is 1 now: rounds cannot be taken back"):
        sites.go(trainer, study, more(study, 1), continues=True)


def test_a_site_that_missed_the_end_and_one_that_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """b was killed in the last round, and comes back when a is further; c comes then for the first time."""
    sites, trainer = AtCoordinator(tmp_path, monkeypatch, {"a": 4, "b": 6, "c": 5}), trainer_of("ditto")
    settings = {"rounds": 2, "method": {"name": "ditto"}, "min_sites": 1}
    study = sites.study(**settings, sites=("a", "b"), deadline_minutes=0.003)
    sites.go(trainer, study, sites="ab", dying={"b": "round-0001/model"})
    sites.go(trainer, study, more(study, 2), continues=True, sites="a", dying={"a": "round-0003/model"})
    joined = sites.study(**settings, deadline_minutes=0.2)
    sites.go(trainer, study, more(joined, 2), sites="c", dying={"c": "round-0003/model"})
    record = sites.go(trainer, study, more(joined, 2), continues=True)
    took_part = record["runs"][next(iter(record["runs"]))]["collectives"]
    (last,) = [c for c in took_part if c["key"] == "round-0003/model"]
    assert sorted(last["sites"]) == ["a", "b", "c"]
    final = [loaded(sites.results(site) / "checkpoint_final.pth") for site in "abc"]
    assert {one["logging"]["lrs"][-1] for one in final} == {final[0]["logging"]["lrs"][-1]}
    assert [one["current_epoch"] for one in final] == [4, 4, 4]


def test_what_was_evaluated_across_sites_is_evaluated_again(
    validated: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The models have changed since: the training goes on as another generation of its run."""
    sites, trainer = AtCoordinator(tmp_path, monkeypatch), trainer_of("ditto")
    monkeypatch.delenv("nnUNet_fed_skip_validation")
    study = sites.study(rounds=1, method={"name": "ditto"}, cross_site=True)
    sites.go(trainer, study)
    once = sorted(validated)
    validated.clear()
    before = loaded(sites.results("a") / "checkpoint_final.pth")
    with monkeypatch.context() as patch:
        started = Started(patch, trainer)
        record = sites.go(trainer, study, more(study, 1), continues=True)
    assert sorted(validated) == once
    assert "b" in once
    assert equal(started.states["a"]["network_weights"], before["network_weights"]), "nothing of a's own is lost"
    (new,) = record["undone"].values()
    assert record["runs"][new]["goes_on_from"] == "round-0000"


def test_a_coordinator_that_is_silent_has_no_more_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites, trainer = AtCoordinator(tmp_path, monkeypatch, {"a": 4}), trainer_of("fedavg")
    study = sites.study(rounds=1, method={"name": "fedavg"})
    sites.go(trainer, study)
    before = loaded(sites.results("a") / "checkpoint_final.pth")
    monkeypatch.setattr(Site, "from_environment", lambda: Site(name="a", coordinator="127.0.0.1:1", insecure=True))
    again = sites.command(trainer, study, "a", continues=True)
    again.run_training()
    assert again.current_epoch == 1
    assert equal(loaded(sites.results("a") / "checkpoint_final.pth")["network_weights"], before["network_weights"])
    assert not list(sites.results("a").glob("after_*"))


def test_a_study_of_version_0_1_that_is_over_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick_nnunet(monkeypatch)
    left = LeftBehind("finished", tmp_path)
    study = Federation.read(left.study_file)
    sites = [Site01(left, name, study.method.name, monkeypatch) for name in SITES]
    ended = [site.checkpoint("checkpoint_final.pth") for site in sites]
    with ExitStack() as stack:
        train_together(sites, Served(more(study, 1), left.state, stack), monkeypatch)
    for site, before in zip(sites, ended, strict=True):
        final = site.checkpoint("checkpoint_final.pth")
        assert final["logging"]["train_losses"][: study.epochs] == before["logging"]["train_losses"]
        assert len(final["logging"]["train_losses"]) == study.epochs + study.local_epochs
        assert site.steps == study.local_epochs * study.iterations_per_epoch
