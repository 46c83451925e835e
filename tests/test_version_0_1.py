"""What version 0.1 left on disk in the middle of a study goes on with this version, whatever the method.

Each site is a thread, of which one trains at a time; between them is the real network. Real processes: ``tests/e2e``.
"""

from __future__ import annotations

import json
import queue
import re
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from serving import Served
from typer.testing import CliRunner
from version_0_1 import CONFIGURATION, PLANS, SITES, STUDIES, LeftBehind
from workers import workers_as_threads

from nnunet_fed.cli.app import app
from nnunet_fed.exchange.keys import scope_of
from nnunet_fed.simulation.simulate import free_ports, plugin_folder
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.site import Site
from nnunet_fed.study.toml import to_toml
from nnunet_fed.trainers.parts.checkpoint import random_states, restore_random_states
from nnunet_fed.transport.site.client import GrpcCommunicator

CPU = torch.device("cpu")
COORDINATED = [method for method in STUDIES if method != "gcml"]
LOGGED = ("train_losses", "val_losses", "mean_fg_dice", "lrs")


@pytest.fixture(autouse=True)
def nnunet(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"nnUNet_n_proc_DA": 0, "nnUNet_def_n_proc": 1, "nnUNet_extTrainer": plugin_folder()}
    for name, value in {**variables, "nnUNet_fed_skip_validation": 1, "nnUNet_fed_debug": 1}.items():
        monkeypatch.setenv(name, str(value))
    for name in ("plot_network_architecture", "print_plans"):
        monkeypatch.setattr(nnUNetTrainer, name, lambda trainer: None)
    monkeypatch.setattr(LocalLogger, "plot_progress_png", lambda logger, folder: None)
    workers_as_threads(monkeypatch)


class Site01:
    """A site of a study that version 0.1 has left behind."""

    def __init__(self, left: LeftBehind, name: str, method: str, monkeypatch: pytest.MonkeyPatch):
        self.left, self.name, self._patch = left, name, monkeypatch
        self.steps = 0
        self._facts = STUDIES[method]
        self.fold = left.fold(name)

    def trainer(self, validation: bool = False) -> Any:
        """As ``nnUNetv2_train ... --c`` makes it, or ``--val``; it counts its steps."""
        for variable, path in self.left.paths(self.name).items():
            self._patch.setenv(variable, path)
        trainer = get_trainer_from_args(
            "1", CONFIGURATION, self._facts["fold"], self._facts["trainer"], PLANS, not validation, CPU
        )
        maybe_load_checkpoint(trainer, not validation, validation)
        step = trainer.train_step

        def counted(batch: dict[str, Any]) -> Any:
            self.steps += 1
            return step(batch)

        trainer.train_step = counted
        return trainer

    def checkpoint(self, name: str) -> dict[str, Any]:
        loaded: dict[str, Any] = torch.load(self.fold / name, map_location="cpu", weights_only=False)
        return loaded

    def record(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.fold / "federation.json").read_text())
        return record

    def assert_went_on(self, before: dict[str, Any], epochs: int, steps: int) -> None:
        """To the end, in so many epochs of so many steps, and none of them twice."""
        state = before["federation"]
        done = before["current_epoch"] + (state["pending"] is not None)
        assert 0 < done < epochs
        assert self.steps == (epochs - done) * steps
        log, earlier = self.checkpoint("checkpoint_final.pth")["logging"], before["logging"]
        for name in LOGGED:
            kept = before["current_epoch"]
            assert len(log[name]) == epochs
            assert log[name][:kept] == earlier[name][:kept]
        assert not (self.fold / "checkpoint_latest.pth").exists()


def take_turns(monkeypatch: pytest.MonkeyPatch, turn: threading.Lock) -> None:
    """Let another site train while this one waits for it; what a site draws is its own."""

    def waits(verb: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            states = random_states()
            turn.release()
            try:
                return verb(*arguments, **options)
            finally:
                turn.acquire()
                restore_random_states(states)

        return wrapped

    for name in ("mean", "sum", "gather"):
        monkeypatch.setattr(GrpcCommunicator, name, waits(getattr(GrpcCommunicator, name)))


def train_together(sites: list[Site01], served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """All sites to the end of their trainings; raises the first error, whoever waits for whom then."""
    turn, here = threading.Lock(), threading.local()
    outcomes: queue.Queue[BaseException | None] = queue.Queue()
    monkeypatch.setattr(Site, "from_environment", lambda: served.settings(here.site))
    take_turns(monkeypatch, turn)

    def train(site: Site01) -> None:
        here.site = site.name
        try:
            with turn:
                trainer = site.trainer()
                trainer.run_training()
                trainer.perform_actual_validation()
        except BaseException as error:
            outcomes.put(error)
        else:
            outcomes.put(None)

    for site in sites:
        threading.Thread(target=train, args=(site,), daemon=True).start()
    for _ in sites:
        if (error := outcomes.get()) is not None:
            raise error


def contributions(record: dict[str, Any], key: str) -> dict[str, Any]:
    """By site, to the collective of that key."""
    found = [c for run in record["runs"].values() for c in run["collectives"] if c["key"] == key]
    assert len(found) == 1
    sites: dict[str, Any] = found[0]["sites"]
    return sites


def scopes_beside_rounds(record: dict[str, Any]) -> set[str]:
    """Of the trainings, without the number that may follow."""
    trainings = [run for run in record["runs"].values() if run["purpose"] == "training"]
    scopes = {scope_of(collective["key"]) for run in trainings for collective in run["collectives"]}
    return {re.sub(r"-\d+$", "", scope) for scope in scopes} - {"round"}


@pytest.mark.parametrize("method", COORDINATED)
def test_a_study_goes_on(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, facts = LeftBehind(method, tmp_path / "study"), STUDIES[method]
    study = Federation.read(left.study_file)
    assert study.digest_of_fold(study.fold) == facts["digest"]
    sites = [Site01(left, name, method, monkeypatch) for name in SITES]
    before = [site.checkpoint("checkpoint_latest.pth") for site in sites]
    pending = [state["federation"]["pending"] is not None for state in before]
    assert pending == [method != "local"] * len(sites), "killed in the exchange"

    with ExitStack() as stack:
        served = Served(study, left.state, stack)
        watcher = GrpcCommunicator(served.settings("watcher"))
        stack.callback(watcher.close)
        earlier = watcher.status(record=True)
        train_together(sites, served, monkeypatch)
        record = watcher.status(record=True)

    epochs = study.epochs + getattr(study.method, "finetune_epochs", 0)
    for site, state in zip(sites, before, strict=True):
        site.assert_went_on(state, epochs, study.iterations_per_epoch)
        assert (site.fold / f"checkpoint_{study.method.LAST_MODEL}.pth").is_file()
        scopes = [entry["scope"] for entry in site.record()["rounds"]]
        assert scopes == [f"round-{number:04d}" for number in range(study.rounds)]
    assert list(record["runs"]) == facts["runs"]
    assert scopes_beside_rounds(record) <= {*study.method.SCOPES_BEFORE, *study.method.SCOPES_AFTER}
    assert record["digest"] == facts["digest"]
    for key, given in facts["open"].items():
        assert {site: told["digest"] for site, told in contributions(earlier, key).items()} == given
        now = contributions(record, key)
        assert now.keys() == set(SITES)
        for site in given:
            assert now[site] == contributions(earlier, key)[site], "what was contributed stands"


def test_peers_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other: a site reads a letter that waits, another one goes on with a model that it was trying."""
    left = LeftBehind("gcml", tmp_path / "study")
    study = Federation.read(left.study_file)
    assert study.digest == STUDIES["gcml"]["digest"]
    sites = [Site01(left, name, "gcml", monkeypatch) for name in SITES]
    peers = {name: f"127.0.0.1:{port}" for name, port in zip(SITES, free_ports(len(SITES)), strict=True)}
    letters = sorted(path.name for path in (sites[0].fold / "mailbox" / "inbox").iterdir())
    assert letters
    assert sites[1].checkpoint("checkpoint_latest.pth")["federation"]["method"]["incoming"] is not None
    for site in sites:
        settings = {"name": site.name, "coordinator": "127.0.0.1:1", "insecure": True, "peers": peers}
        file = left.site(site.name) / "site.toml"
        file.write_text(to_toml({**settings, "listen": peers[site.name]}))
        monkeypatch.setenv("nnUNet_fed_site", str(file))
        before, phases = site.checkpoint("checkpoint_latest.pth"), site.record()["mutual_phases"]
        trainer = site.trainer()
        trainer.run_training()
        trainer.perform_actual_validation()
        site.assert_went_on(before, study.epochs, study.iterations_per_epoch)
        assert len(site.record()["mutual_phases"]) > len(phases)
        assert site.record()["mutual_phases"][: len(phases)] == phases
    first, second = (site.record()["mutual_phases"][-1] for site in sites)
    assert f"{first['from']}@{first['counter']}" in letters
    assert second["from"] == SITES[0]


@pytest.mark.parametrize("method", STUDIES)
def test_stock_nnunet_predicts(method: str, tmp_path: Path) -> None:
    """With the checkpoint that version 0.1 was killed with, where our trainers are asked for only if they must be."""
    left = LeftBehind(method, tmp_path)
    fold = left.fold(SITES[0])
    predictor = nnUNetPredictor(use_mirroring=False, device=CPU, perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(
        str(fold.parent), (int(fold.name.removeprefix("fold_")),), "checkpoint_latest.pth"
    )
    assert type(predictor.network).__name__ == ("FedOAPNetwork" if method == "fedoap" else "PlainConvUNet")
    (image,) = left.images.iterdir()
    voxels, properties = SimpleITKIO().read_images([str(image)])
    segmentation = predictor.predict_single_npy_array(voxels, properties)
    assert segmentation.shape == voxels.shape[1:]
    assert set(np.unique(segmentation)) <= {0, 1, 2}


def test_a_finished_training_is_validated_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = LeftBehind("finished", tmp_path)
    monkeypatch.delenv("nnUNet_fed_skip_validation")
    site = Site01(left, SITES[0], "fedavg", monkeypatch)
    files = [site.fold / "validation" / name for name in ("summary.json", "lesions.json")]
    before = [json.loads(file.read_text()) for file in files]
    for file in files:
        file.unlink()
    site.trainer(validation=True).perform_actual_validation()
    summary, lesions = (json.loads(file.read_text()) for file in files)
    assert summary["foreground_mean"] == before[0]["foreground_mean"]
    assert summary["mean"] == before[0]["mean"]
    assert lesions == before[1]


def test_report_of_a_finished_study(tmp_path: Path) -> None:
    left = LeftBehind("finished", tmp_path)
    done = CliRunner().invoke(app, ["report", str(left.folder), "--out", str(tmp_path / "report.html")])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "report.html").read_text()
    for site, told in json.loads((left.folder / "summary.json").read_text())["sites"].items():
        assert site in page
        assert f"{told['dice']['final']:.3f}" in page


def test_report_of_a_coordinator_in_the_middle_of_a_study(tmp_path: Path) -> None:
    left = LeftBehind("fedavg", tmp_path)
    done = CliRunner().invoke(app, ["report", str(left.state), "--out", str(tmp_path / "report.html")])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "report.html").read_text()
    assert all(told in page for told in (*SITES, "iterations_per_epoch", "joined"))
