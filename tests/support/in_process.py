"""A federation of nnU-Net's own trainers in one process: a thread for each site, of which one trains at a time.

What a site draws is its own: the global random states change with the site that trains. So a run is repeatable.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny import DESCRIPTION, PATCHES, tiny_plans, write_preprocessed

from nnunet_fed.errors import DeadlineError
from nnunet_fed.exchange.communicator import Array, LocalCommunicator, LocalFederation
from nnunet_fed.exchange.payload import Tensors
from nnunet_fed.methods.tensors import shared_tensors, to_arrays
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.site import Site
from nnunet_fed.trainers.parts import checkpoint, connected_trainer
from nnunet_fed.trainers.parts.coordinator_session import Membership
from nnunet_fed.trainers.parts.study_trainer import SKIP_VALIDATION_VARIABLE
from nnunet_fed.trainers.parts.training_record import TrainingRecord

CASES = {"a": 4, "b": 6}
STEPS = 3
CPU = torch.device("cpu")


class Killed(Exception):  # noqa: N818
    """What a killed process does not see."""


class Rooms(LocalFederation):
    """What the coordinator keeps, and whose turn it is."""

    def __init__(self, sites: Sequence[str]):
        super().__init__(sites)
        self.turn = threading.Lock()
        self.means: dict[str, dict[str, Array]] = {}
        self.sent: dict[tuple[str, str], dict[str, Array]] = {}
        self.kill_before: str | None = None

    def exchange(self, key: str, site: str, value: Any) -> dict[str, Any]:
        if key == self.kill_before:
            raise Killed
        states = checkpoint.random_states()
        self.turn.release()
        try:
            return super().exchange(key, site, value)
        finally:
            self.turn.acquire()
            checkpoint.restore_random_states(states)


class RememberingCommunicator(LocalCommunicator):
    """With a memory of closed means, and of what was sent before: rule 2 of the protocol."""

    _federation: Rooms
    held = None

    def mean(self, key: str, tensors: Tensors, weight: float, exact: bool = False) -> dict[str, Array]:
        before = self._federation.sent.get((key, self.site))
        if before is None:
            self._federation.sent[key, self.site] = {name: np.array(array) for name, array in tensors.items()}
        else:
            assert same_arrays(before, dict(tensors)), f"{self.site} sends other bytes for {key} than before"
        result = super().mean(key, tensors, weight, exact)
        self._federation.means.setdefault(key, result)
        return result

    def newest(self, name: str) -> str | None:
        return next((key for key in reversed(self._federation.means) if key.endswith(f"/{name}")), None)

    def fetch(self, key: str) -> dict[str, Array]:
        return self._federation.means[key]


class LocalSession:
    """In the place of the communicator at a coordinator."""

    def __init__(self, rooms: Rooms, site: str, study: Federation, folder: Path, continues: bool):
        self.communicator, self.membership = RememberingCommunicator(rooms, site), Membership(study, "run", 1, 0, "")
        self.note_facts = TrainingRecord(folder / "federation.json", continues).note

    def describe(self, training_cases: int) -> None:
        self.note_facts(training_cases=training_cases)

    @contextmanager
    def exchanging(self, scope: str) -> Iterator[dict[str, float]]:
        yield {}

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **named: None


class InProcess:
    """Trains tiny sites together.

    Args:
        folder: of everything that is written.
        monkeypatch: sets nnU-Net's variables, and puts the threads in the place of the network.
        cases: of each site.
        configuration: of :func:`tiny.tiny_plans`.
        folds: that a site trains in the place of fold 0.
    """

    def __init__(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        cases: dict[str, int] | None = None,
        configuration: str = "2d",
        folds: dict[str, int | str] | None = None,
    ):
        self._folder, self._patch, self._configuration = folder, monkeypatch, configuration
        self.cases = CASES if cases is None else cases
        self._folds = folds or {}
        self._here = threading.local()
        self._runs = 0
        self.rooms = Rooms(list(self.cases))
        for site, number in self.cases.items():
            if not (folder / site / "preprocessed").exists():
                slices = 3 if configuration == "2d" else PATCHES[configuration][0] + 2
                write_preprocessed(folder / site / "preprocessed", number, slices)
        for name, value in {"nnUNet_n_proc_DA": 0, "nnUNet_raw": folder, SKIP_VALIDATION_VARIABLE: 1}.items():
            monkeypatch.setenv(name, str(value))
        for name in ("plot_network_architecture", "print_plans"):
            monkeypatch.setattr(nnUNetTrainer, name, lambda trainer: None)
        monkeypatch.setattr(LocalLogger, "plot_progress_png", lambda logger, folder: None)
        monkeypatch.setattr(Site, "from_environment", lambda: self._settings())

        def join(study: Federation, *rest: Any, continues: bool, **held: Any) -> LocalSession:
            return LocalSession(self.rooms, self._here.site, study, rest[-1], continues)

        monkeypatch.setattr(connected_trainer, "CoordinatorSession", join)

    def _settings(self) -> Site:
        return Site(name=self._here.site, coordinator="127.0.0.1:1", insecure=True)

    def study(self, **settings: Any) -> Federation:
        """Two rounds of three steps, with nothing else said."""
        defaults = {
            "name": "study", "sites": tuple(self.cases), "rounds": 2, "iterations_per_epoch": STEPS,
            "val_iterations_per_epoch": 1, "initial_lr": 0.05, "momentum": 0.9,
        }  # fmt: skip
        return Federation.model_validate({**defaults, **settings})

    def make(self, trainer: type[Any], study: Federation) -> dict[str, Any]:
        """A trainer for each site, of a run of its own."""
        self._runs += 1
        self.rooms = Rooms(list(self.cases))
        return {site: self.trainer(trainer, study, site) for site in self.cases}

    def trainer(self, trainer: type[Any], study: Federation, site: str) -> Any:
        """One site's trainer, in the current run."""
        self._patch.setenv("nnUNet_preprocessed", str(self._folder / site / "preprocessed"))
        self._patch.setenv("nnUNet_results", str(self._folder / site / f"results_{self._runs}"))
        return trainer(tiny_plans(study), self._configuration, self._folds.get(site, 0), DESCRIPTION, CPU)

    def run(self, trainers: dict[str, Any], validate: bool = False) -> None:
        """Train at all sites; raises the first error that does not only follow from another site's."""

        def run(site: str) -> None:
            self._here.site = site
            with self.rooms.turn:
                trainers[site].run_training()
                if validate:
                    trainers[site].perform_actual_validation()
                trainers[site]._leave_folder()  # as the end of a process does

        with ThreadPoolExecutor(len(trainers)) as pool:
            futures = [pool.submit(run, site) for site in trainers]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, DeadlineError)):
            raise error

    def train(self, trainer: type[Any], study: Federation) -> dict[str, Any]:
        """Trainers after a whole training."""
        trainers = self.make(trainer, study)
        self.run(trainers)
        return trainers

    def train_killed(self, trainer: type[Any], study: Federation, key: str) -> dict[str, Any]:
        """The same, but that every site is killed before it contributes to ``key``, and continued with ``--c``."""
        trainers = self.make(trainer, study)
        self.rooms.kill_before = key
        with pytest.raises(Killed):
            self.run(trainers)
        self.rooms.kill_before = None
        resumed = {site: self.trainer(trainer, study, site) for site in self.cases}
        for site, one in resumed.items():
            assert one.output_folder == trainers[site].output_folder
            one.load_checkpoint(str(Path(one.output_folder) / "checkpoint_latest.pth"))
        self.run(resumed)
        return resumed


def weights(network: torch.nn.Module) -> dict[str, Array]:
    """Copies of the network's tensors."""
    return {name: array.copy() for name, array in to_arrays(shared_tensors(network)).items()}


def same_arrays(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def same_training(one: Any, other: Any) -> bool:
    """Weights, momenta and the course of the training of the model that nnU-Net saves."""
    momenta = [trainer.optimizer.state_dict()["state"] for trainer in (one, other)]
    logs = [trainer.logger.get_checkpoint() for trainer in (one, other)]
    return (
        same_arrays(weights(one.network), weights(other.network))
        and all(torch.equal(momenta[0][i]["momentum_buffer"], momenta[1][i]["momentum_buffer"]) for i in momenta[0])
        and all(np.array_equal(logs[0][name], logs[1][name]) for name in ("train_losses", "val_losses", "lrs"))
    )
