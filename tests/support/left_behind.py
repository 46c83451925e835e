"""A study that version 0.1 left behind, and its sites going on: each is a thread, of which one trains at a time.

Between them is the real network.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from serving import Served
from version_0_1 import CONFIGURATION, PLANS, STUDIES, LeftBehind
from workers import workers_as_threads

from nnunet_fed.simulation.simulate import plugin_folder
from nnunet_fed.study.site import Site
from nnunet_fed.trainers.parts.checkpoint import random_states, restore_random_states
from nnunet_fed.transport.site.client import GrpcCommunicator

CPU = torch.device("cpu")
LOGGED = ("train_losses", "val_losses", "mean_fg_dice", "lrs")


def quick_nnunet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set nnU-Net's variables for tests, and leave out what takes time and shows pictures."""
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

    threads = [threading.Thread(target=train, args=(site,), daemon=True) for site in sites]
    for thread in threads:
        thread.start()
    for _ in sites:
        if (error := outcomes.get()) is not None:
            for thread in threads:  # what a test does next must not meet one that is about to end, too
                thread.join(10)
            raise error
