"""Rounds that are undone in a study with real trainers, and sites whose training diverged: they come back with --c."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from left_behind import Site01, quick_nnunet, train_together
from serving import Served
from version_0_1 import SITES, STUDIES, LeftBehind

from nnunet_fed.coordinator.generations import rewind
from nnunet_fed.coordinator.store import Store
from nnunet_fed.errors import NoContributionError, NotFiniteError
from nnunet_fed.exchange.keys import MODEL, key_of, scope_of_round
from nnunet_fed.study.federation import Federation
from nnunet_fed.transport.site.client import GrpcCommunicator

WITH_ROUNDS = [method for method in STUDIES if method not in ("gcml", "local")]


@pytest.fixture(autouse=True)
def nnunet(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_nnunet(monkeypatch)


class Study:
    """A study of a method, and its sites."""

    def __init__(self, method: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.left, self._patch = LeftBehind(method, folder), monkeypatch
        self.study = Federation.read(self.left.study_file)
        self.sites = [Site01(self.left, name, method, monkeypatch) for name in SITES]
        self.epochs = self.study.epochs + getattr(self.study.method, "finetune_epochs", 0)

    def go_on(self) -> dict[str, Any]:
        """All sites with ``--c``, to the end; returns the coordinator's record."""
        with ExitStack() as stack:
            served = Served(self.study, self.left.state, stack)
            watcher = GrpcCommunicator(served.settings("watcher"))
            stack.callback(watcher.close)
            with self._patch.context() as patch:
                train_together(self.sites, served, patch)
            return watcher.status(record=True)

    def undo(self, wanted: str) -> str:
        store = Store(self.left.state)
        try:
            return rewind(store, wanted).run
        finally:
            store.close()

    def models(self) -> list[dict[str, Any]]:
        """The shared model of each site after the rounds."""
        name = f"checkpoint_{self.study.method.LAST_MODEL}.pth"
        return [site.checkpoint(name)["network_weights"] for site in self.sites]

    def assert_ended_together(self, missed: Sequence[int] = ()) -> None:
        """Every site has the same model, and has been in all rounds but those that the last site missed."""
        one, other = self.models()
        for name in one:
            private = self.study.method.name == "fedoap" and not torch.equal(one[name], other[name])
            assert private or torch.equal(one[name], other[name]), name
            assert not one[name].is_floating_point() or torch.isfinite(one[name]).all()
        for site, without in zip(self.sites, ((), missed), strict=True):
            log = site.checkpoint("checkpoint_final.pth")["logging"]
            assert {len(values) for values in log.values()} == {self.epochs}
            scopes = [entry["scope"] for entry in site.record()["rounds"]]
            assert scopes == [f"round-{number:04d}" for number in range(self.study.rounds) if number not in without]


@pytest.mark.parametrize("method", WITH_ROUNDS)
def test_rounds_are_undone(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of an exchange, and after the end, when the sites have finished."""
    study = Study(method, tmp_path, monkeypatch)
    first = study.undo("0")
    record = study.go_on()
    study.assert_ended_together()
    assert record["runs"][first]["goes_on_from"] == "round-0000"
    for site in study.sites:
        assert any("undone" in event["text"] for event in site.record()["events"])
        assert site.steps == (study.epochs - study.study.local_epochs) * study.study.iterations_per_epoch
    ended = study.models()

    second = study.undo("0")
    before = [site.steps for site in study.sites]
    record = study.go_on()
    study.assert_ended_together()
    assert list(record["undone"].values()) == [second, second]
    for site, steps, model in zip(study.sites, before, ended, strict=True):
        assert site.steps == steps + (study.epochs - study.study.local_epochs) * study.study.iterations_per_epoch
        assert (site.fold / "undone" / "checkpoint_final.pth").is_file(), "what was undone is not lost"
        assert [entry["scope"] for entry in site.record()["undone_rounds"]][-1] != "round-0000"
        assert model.keys() == study.models()[0].keys()


@pytest.mark.parametrize("method", ["fedavg", "fedsm", "fedadam"])
@pytest.mark.parametrize("damaged", ["network_weights", "optimizer_state"])
def test_a_training_that_diverged_comes_back_finite(
    method: str, damaged: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(method, tmp_path, monkeypatch)
    poison(study.sites[1].fold / "checkpoint_latest.pth", damaged)
    study.go_on()
    study.assert_ended_together()
    told = [event["text"] for event in study.sites[1].record()["events"]]
    assert any("not finite: it starts anew" in text for text in told), told
    assert not any("not finite" in event["text"] for event in study.sites[0].record()["events"])


def poison(checkpoint: Path, what: str) -> None:
    """Let a tensor of a checkpoint be as in a training that diverged."""
    content = torch.load(checkpoint, map_location="cpu", weights_only=False)
    if what == "optimizer_state":
        next(iter(content[what]["state"].values()))["momentum_buffer"].fill_(torch.nan)
    else:
        next(iter(content[what].values())).fill_(torch.inf)
    torch.save(content, checkpoint)


def test_a_training_that_diverges_stops_and_nobody_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study("fedavg", tmp_path, monkeypatch)
    study.study = study.study.model_copy(update={"min_sites": 1})
    alone = [site for site in study.sites if site.name == SITES[1]]
    everyone, study.sites = study.sites, alone
    content = torch.load(alone[0].fold / "checkpoint_latest.pth", map_location="cpu", weights_only=False)
    assert content["federation"]["pending"], "it will be in an exchange at once"
    monkeypatch.setattr("nnunet_fed.trainers.parts.catching_up.is_finite", lambda trainer: True)
    poison(alone[0].fold / "checkpoint_latest.pth", "network_weights")
    with pytest.raises(NotFiniteError, match=r"Site 'site_b' has nothing to give to 'round-0001/model'.*with --c"):
        study.go_on()
    monkeypatch.undo()
    quick_nnunet(monkeypatch)
    study.sites = everyone
    study.go_on()
    study.assert_ended_together(missed=[1])


def test_sites_ahead_of_a_restored_coordinator_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are killed before the last round; the coordinator comes back as it was before the one before."""
    undisturbed = Study("fedavg", tmp_path / "undisturbed", monkeypatch)
    undisturbed.go_on()
    study = Study("fedavg", tmp_path / "restored", monkeypatch)
    shutil.copytree(study.left.state, tmp_path / "back-up")
    mean = GrpcCommunicator.mean
    last = key_of(scope_of_round(study.study.rounds - 1), MODEL)

    def killed_before_the_last(communicator: GrpcCommunicator, key: str, *given: Any) -> Any:
        if key == last:
            raise NoContributionError("killed")
        return mean(communicator, key, *given)

    with monkeypatch.context() as patch:
        patch.setattr(GrpcCommunicator, "mean", killed_before_the_last)
        with pytest.raises(NoContributionError, match="killed"):
            study.go_on()
    shutil.rmtree(study.left.state)
    shutil.copytree(tmp_path / "back-up", study.left.state)
    record = study.go_on()
    study.assert_ended_together()
    assert any("restored from a back-up" in event["text"] for event in record["events"])
    for one, other in zip(undisturbed.models(), study.models(), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
