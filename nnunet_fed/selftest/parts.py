"""The parts of the self-test, one after the other, on made-up images: one that fails does not end the others.

Source: ours. All is made of simulations; the trainings run in :mod:`nnunet_fed.selftest.measured_training`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from rich.console import Console

from nnunet_fed.datasets.phantom import write_phantom
from nnunet_fed.errors import ConfigurationError, FederationError
from nnunet_fed.processes import Step, Worker, raise_first, signals_interrupt, stop_workers
from nnunet_fed.selftest.measured_training import KILL_VARIABLE, MEASURED_VARIABLE, STEPS_VARIABLE, Measured
from nnunet_fed.selftest.outcome import PLAIN, Row
from nnunet_fed.simulation.first_look import SITES
from nnunet_fed.simulation.simulate import (
    AUGMENTATION_VARIABLE,
    Simulation,
    nnunet_command,
    plugin_folder,
    simulate,
    site_environment,
)
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.methods import METHODS, method_settings
from nnunet_fed.study.methods.custom_options import EXTERNAL_TRAINERS

SITE_NAMES = ("site_a", "site_b")
PLANNING, KILLED = "data and planning", "kill -9 and --c"
TRIED = tuple(sorted(set(METHODS) - {"custom"}))
"""Methods that the self-test has."""
ROUNDS = 2
ITERATIONS = {"cpu": 4, "cuda": 20, "mps": 10}
"""Steps of a round."""
WARM_UP = 2
"""Steps of a training that do not count: compiling and the choice of kernels are in them."""
SETTINGS = {
    "sites": SITE_NAMES, "rounds": ROUNDS, "val_iterations_per_epoch": 1, "planner": "nnUNetPlannerFedSmall",
    "initial_lr": 0.01, "deadline_minutes": 15.0, "planning_deadline_minutes": 15.0,
}  # fmt: skip
OPTIONS = {"fedoap": {"finetune_epochs": 1}}
"""Of methods whose defaults take more than this test needs."""
OWN_NETWORK = ("fedoap",)
"""Methods whose network nnU-Net does not build without our trainers, because of an adapter: it predicts with them."""


@dataclass(frozen=True)
class SelfTest:
    """What to test."""

    out: Path
    """A new folder."""
    device: str
    methods: tuple[str, ...] = TRIED

    @property
    def names(self) -> list[str]:
        """Of all parts, in their order."""
        return [PLANNING, PLAIN, *self.methods, KILLED]

    def rows(self, begin: Callable[[str], None]) -> Iterator[Row]:
        """Do it, a row for each part; without data and plans there is nothing else to test.

        Args:
            begin: told the name of each part that begins.
        """
        bodies: list[Callable[[], list[Measured]]] = [self._plan, self._train_plain]
        bodies += [partial(self._train, method) for method in self.methods]
        for name, body in zip(self.names, [*bodies, self._kill_and_continue], strict=True):
            begin(name)
            row = self._row(name, body)
            yield row
            if name == PLANNING and row.failure is not None:
                return

    def _row(self, name: str, body: Callable[[], list[Measured]]) -> Row:
        started = time.monotonic()
        try:
            measured = body()
        except FederationError as error:
            return Row(name, time.monotonic() - started, str(error))
        except Exception as error:  # whatever it is, the other parts still tell something
            return Row(name, time.monotonic() - started, f"{type(error).__name__}: {error}")
        spent = time.monotonic() - started
        steps = [seconds for one in measured for seconds in one.seconds[WARM_UP:]]
        if not measured:
            return Row(name, spent)
        return Row(
            name, spent, None, all(one.compiled for one in measured), all(one.mixed_precision for one in measured),
            median(steps) if steps else None, max(one.peak_memory for one in measured) or None,
        )  # fmt: skip

    def _study(self, name: str, method: str) -> Federation:
        table = method_settings(method, OPTIONS.get(method, {}))
        steps = ITERATIONS[self.device]
        return Federation.model_validate({**SETTINGS, "name": name, "iterations_per_epoch": steps, "method": table})

    def _simulate(self, name: str, method: str, **environment: str) -> list[Measured]:
        data, out = self.out / "data", self.out / name
        sites = {site: data / site for site in SITE_NAMES}
        planning = name == "planned"
        simulation = Simulation(
            sites, out, self._study(name, method), "plan" if planning else "train", self.device,
            planned=None if planning else self.out / "planned",
            training_program=(sys.executable, "-m", "nnunet_fed.selftest.measured_training"),
            variables={site: {MEASURED_VARIABLE: str(out / SITES / site / "measured.json"), **environment}
                       for site in SITE_NAMES},
        )  # fmt: skip
        simulate(simulation, Console(quiet=True))
        return [] if planning else [Measured.read(out / SITES / site / "measured.json") for site in SITE_NAMES]

    def _plan(self) -> list[Measured]:
        write_phantom(self.out / "data", sites=len(SITE_NAMES), cases=5, test_cases=1, coarse=2.0)
        return self._simulate("planned", "fedavg")

    def _train_plain(self) -> list[Measured]:
        """nnU-Net's own trainer on the same plans and cases, at both sites at once as in all other parts."""
        out = self.out / "plain"
        out.mkdir()
        command = [sys.executable, "-m", "nnunet_fed.selftest.measured_training", "1", "3d_fullres", "0"]
        command += ["-tr", "nnUNetTrainer", "-p", self._plans, "-device", self.device]
        steps = {}
        for site in SITE_NAMES:
            results = out / site
            environment = self._stock_environment(self.out / "planned" / SITES / site) | {
                "nnUNet_results": str(results), MEASURED_VARIABLE: str(out / f"{site}.json"),
                STEPS_VARIABLE: str(ROUNDS * ITERATIONS[self.device]),
            }  # fmt: skip
            steps[site] = Step("Training", command, environment, out / f"{site}.log")
        _run(steps)
        return [_sound(Measured.read(out / f"{site}.json"), steps[site].log) for site in SITE_NAMES]

    def _train(self, method: str) -> list[Measured]:
        """A federation, and nnU-Net's own prediction with what the first site has of it."""
        measured = self._simulate(method, method)
        for site, one in zip(SITE_NAMES, measured, strict=True):
            _sound(one, self.out / method / SITES / site / "train.log")
        self._predict(method)
        return measured

    def _predict(self, method: str) -> None:
        folder, out = self.out / method / SITES / SITE_NAMES[0], self.out / method / "predicted"
        trainer = self._study(method, method).method.trainer_name
        command = [nnunet_command("nnUNetv2_predict"), "-i", str(self.out / "data" / "test" / "imagesTs")]
        command += ["-o", str(out), "-d", "1", "-c", "3d_fullres", "-f", "0", "-tr", trainer, "-p", self._plans]
        command += ["-device", self.device, "--disable_tta", "-npp", "1", "-nps", "1"]
        environment = self._stock_environment(folder)
        if method in OWN_NETWORK:
            environment[EXTERNAL_TRAINERS] = str(plugin_folder())
        step = Step("nnU-Net's prediction", command, environment, self.out / method / "predict.log")
        _run({SITE_NAMES[0]: step})
        if not list(out.glob("*.nii.gz")):
            raise FederationError(f"nnU-Net's prediction wrote nothing.\n(log: {step.log})")

    def _kill_and_continue(self) -> list[Measured]:
        site = SITE_NAMES[1]
        step = ITERATIONS[self.device] * 3 // 2  # in the middle of the second round
        measured = self._simulate("killed", "fedavg", **{KILL_VARIABLE: f"{site} {step}"})
        log = self.out / "killed" / SITES / site / "train.log"
        if not _sound(measured[1], log).continued_in_epoch:
            raise FederationError(f"The training that was killed did not go on where it was.\n(log: {log})")
        return []

    @property
    def _plans(self) -> str:
        return str(Federation.read(self.out / "planned" / "federation.toml").plans_name)

    def _stock_environment(self, folder: Path) -> dict[str, str]:
        """Of a site, where nobody knows our trainers."""
        environment = site_environment(folder, max(1, (os.cpu_count() or 1) // len(SITE_NAMES)))
        del environment[EXTERNAL_TRAINERS]
        return ({AUGMENTATION_VARIABLE: "0"} if self.device == "cpu" else {}) | environment


def require_methods(names: Sequence[str]) -> None:
    """See that the self-test has these methods; raises :class:`ConfigurationError`."""
    for name in names:
        if name not in TRIED:
            raise ConfigurationError(f"--methods: there is no {name!r}; known: {', '.join(TRIED)}.")


def _sound(measured: Measured, log: Path) -> Measured:
    if not measured.finite or not measured.seconds:
        raise FederationError(f"Not every training step had a loss that is a number.\n(log: {log})")
    return measured


def _run(steps: Mapping[str, Step]) -> None:
    """Commands of sites, side by side; the first that fails is told, and ends the others."""
    workers = [Worker(site, [step]) for site, step in steps.items()]
    with _ended(workers):
        going = True
        while going:
            going = max([worker.advance() for worker in workers])
            raise_first([worker for worker in workers if worker.failed()])
            time.sleep(0.2)


@contextmanager
def _ended(workers: Sequence[Worker]) -> Iterator[None]:
    with signals_interrupt(), ExitStack() as stack:
        stack.callback(stop_workers, workers)
        yield
