"""A federation of real processes for the tests: stock nnU-Net commands against a real coordinator."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from warm import QUICK, Forked

from nnunet_fed.simulation.simulate import free_ports, plugin_folder
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.site import Site
from nnunet_fed.study.toml import to_toml
from nnunet_fed.transport.site.client import GrpcCommunicator

PLANS = "nnUNetFedSmallPlans"
PATIENCE = 480.0
"""Seconds for whatever may take long on a slow machine that has other work as well."""


def stock_environment(**variables: Any) -> dict[str, str]:
    """Of a user with two cores."""
    settings = {
        "nnUNet_n_proc_DA": 0, "nnUNet_def_n_proc": 1, "nnUNet_npp": 0, "nnUNet_nps": 0,
        "nnUNet_fed_threads": 1, "OMP_NUM_THREADS": 1,
    }  # fmt: skip
    return {**os.environ, **{name: str(value) for name, value in {**settings, **variables}.items()}}


def environment(**variables: Any) -> dict[str, str]:
    """The same without what takes long and is not tested (``quick/``)."""
    # nnU-Net draws 3000 x 5400 pixels of progress after each epoch, for longer than an epoch of these tests takes
    return stock_environment(PYTHONPATH=QUICK, MATPLOTLIBRC=QUICK, **variables)


def command(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def run(words: Sequence[Any], environment: dict[str, str], log: Path, out: Path | None = None) -> None:
    """A command to its end, in a process that need not import PyTorch first."""
    process = Forked([str(word) for word in words], environment, log, out or log)
    try:
        assert process.wait(PATIENCE) == 0, log.read_text()[-3000:]
    finally:
        process.send_signal(signal.SIGTERM)  # a simulation ends its sites, which no other signal reaches


def predict_without_us(site: RunningSite, images: Path, out: Path, checkpoint: str) -> None:
    """``nnUNetv2_predict`` with what a site has trained, where our trainers are not known; it starts no helpers."""
    stock = {name: value for name, value in site.environment.items() if not name.startswith("nnUNet_ext")}
    words = [command("nnUNetv2_predict"), "-i", images, "-o", out, "-d", 1, "-c", "3d_fullres", "-f", site.fold]
    words += ["-tr", site.trainer, "-p", PLANS, "-chk", checkpoint, "-device", "cpu", "--disable_tta"]
    run(words, stock, out.with_suffix(".log"))


def until(happened: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"did not happen within {seconds} s: {what}"
        time.sleep(0.05)


@dataclass
class Planned:
    """Sites whose data are planned and preprocessed, for any number of studies."""

    folder: Path
    study: Federation

    def dataset(self, site: str) -> Path:
        return next((self.folder / "sites" / site / "nnUNet_preprocessed").iterdir())

    def restudy(self, site: str, study: Federation, target: Path) -> str:
        """The site's preprocessed data below ``target``, with plans that carry another study; returns its name."""
        source = self.dataset(site)
        dataset = target / source.name
        dataset.mkdir(parents=True)
        for entry in source.iterdir():
            if entry.is_dir():
                (dataset / entry.name).symlink_to(entry)
            else:
                shutil.copy(entry, dataset)
        plans_file = dataset / f"{PLANS}.json"
        plans = json.loads(plans_file.read_text())
        plans["federation"].update(name=study.name, digest=study.digest, study=study.model_dump(mode="json"))
        plans_file.write_text(json.dumps(plans))
        return source.name


@dataclass
class RunningSite:
    name: str
    folder: Path
    dataset: str
    trainer: str
    environment: dict[str, str]
    fold: str = "0"
    process: Forked | None = None
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.folder / "train.log"

    @property
    def results(self) -> Path:
        return self.folder / "results" / self.dataset / f"{self.trainer}__{PLANS}__3d_fullres" / f"fold_{self.fold}"

    def copied(self, folder: Path) -> RunningSite:
        """The same with a copy of all its files."""
        shutil.copytree(self.folder, folder, symlinks=True)
        moved = {name: value.replace(str(self.folder), str(folder)) for name, value in self.environment.items()}
        return replace(self, folder=folder, environment=moved)

    def start(self, *arguments: str) -> None:
        train = [command("nnUNetv2_train"), "1", "3d_fullres", self.fold, "-tr", self.trainer, "-p", PLANS]
        self.process = Forked([*train, "-device", "cpu", *arguments], self.environment, self.log)

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()

    def finish(self) -> None:
        assert self.process is not None
        assert self.process.wait(PATIENCE) == 0, self.log.read_text()[-3000:]

    def checkpoint(self, name: str = "checkpoint_final.pth") -> dict[str, Any]:
        loaded: dict[str, Any] = torch.load(self.results / name, map_location="cpu", weights_only=False)
        return loaded

    def record(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.results / "federation.json").read_text())
        return record


class RunningFederation:
    """A coordinator process and its sites."""

    def __init__(self, study: Federation, folder: Path, planned: Planned, data: dict[str, str], **variables: Any):
        self.folder = folder
        folder.mkdir(parents=True)
        (folder / "federation.toml").write_text(to_toml(study.model_dump(mode="json")))
        self.address, *others = (f"127.0.0.1:{port}" for port in free_ports(1 + len(study.sites)))
        self.peers = dict(zip(study.sites, others, strict=True)) if study.method.name == "gcml" else {}
        self.coordinator: Forked | None = None
        self.sites = {name: self._site(name, data[name], study, planned, variables) for name in study.sites}
        watcher = Site(name="watcher", coordinator=self.address, insecure=True, connect_minutes=1)
        self.watcher = GrpcCommunicator(watcher)

    def _site(
        self, name: str, data: str, study: Federation, planned: Planned, variables: dict[str, Any]
    ) -> RunningSite:
        folder = self.folder / name
        folder.mkdir()
        settings: dict[str, Any] = {"name": name, "coordinator": self.address, "insecure": True}
        if self.peers:
            settings |= {"listen": self.peers[name], "peers": self.peers}
        (folder / "site.toml").write_text(to_toml(settings))
        dataset = planned.restudy(data, study, folder / "preprocessed")
        paths = {f"nnUNet_{what}": folder / what for what in ("raw", "preprocessed", "results")}
        extra = {"nnUNet_extTrainer": plugin_folder(), "nnUNet_fed_skip_validation": 1}
        variables = {**extra, **variables, "nnUNet_fed_site": folder / "site.toml"}
        return RunningSite(name, folder, dataset, study.method.trainer_name, environment(**paths, **variables))

    def serve(self) -> None:
        words = [sys.executable, "-m", "nnunet_fed", "coordinator", str(self.folder / "federation.toml")]
        words += ["--listen", self.address, "--state", str(self.folder / "state"), "--insecure"]
        self.coordinator = Forked(words, environment(), self.folder / "coordinator.log")

    def restart(self) -> None:
        """Kill the coordinator, and start it again; returns once it answers."""
        assert self.coordinator is not None
        self.coordinator.kill()
        self.coordinator.wait()
        self.serve()
        until(lambda: bool(self.watcher.status()), "the coordinator answers again")

    def happened(self) -> dict[str, Any]:
        return self.watcher.status(record=True)

    def collective(self, key: str) -> dict[str, Any] | None:
        runs = self.happened()["runs"].values()
        return next((c for run in runs for c in run["collectives"] if c["key"] == key), None)

    def contributed(self, site: str, key: str) -> bool:
        collective = self.collective(key)
        return collective is not None and site in collective["sites"]

    def closed(self, key: str) -> bool:
        collective = self.collective(key)
        return collective is not None and collective["status"] != "open"

    def stop(self) -> None:
        self.watcher.close()
        for process in [site.process for site in self.sites.values()] + [self.coordinator]:
            if process is not None and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextmanager
def peers(planned: Planned, folder: Path, data: dict[str, str], **changes: Any) -> Iterator[RunningFederation]:
    """Sites without a coordinator; as :func:`federation`."""
    study = Federation.model_validate({**planned.study.model_dump(), "sites": tuple(data), **changes})
    running = RunningFederation(study, folder, planned, data)
    try:
        yield running
    finally:
        running.stop()


@contextmanager
def federation(
    planned: Planned, folder: Path, data: dict[str, str], variables: dict[str, Any] | None = None, **changes: Any
) -> Iterator[RunningFederation]:
    """A served federation on the planned data; ``data`` says which planned site's data each site has."""
    study = Federation.model_validate({**planned.study.model_dump(), "sites": tuple(data), **changes})
    with ExitStack() as stack:
        running = RunningFederation(study, folder, planned, data, **(variables or {}))
        stack.callback(running.stop)
        running.serve()
        until(lambda: bool(running.watcher.status()), "the coordinator answers")
        yield running


@dataclass
class Trained:
    """Sites whose training has ended."""

    sites: dict[str, RunningSite]


def trained_once(folder: Path, train: Callable[[Path], RunningFederation]) -> Trained:
    """What one of pytest's processes trains in a folder that all have, for all of them."""
    done = folder.with_suffix(".pickle")
    with FileLock(folder.with_suffix(".lock")):
        if not done.is_file():
            sites = train(folder).sites
            done.write_bytes(pickle.dumps({name: replace(site, process=None) for name, site in sites.items()}))
    return Trained(pickle.loads(done.read_bytes()))


def train_all(running: RunningFederation) -> None:
    for site in running.sites.values():
        site.start()
    for site in running.sites.values():
        site.finish()


def kill_in_exchange(running: RunningFederation, key: str) -> None:
    """Start both sites; kill the first after its contribution to ``key`` of the second round, and continue it.

    The second stands still meanwhile: so the first has the state from before the exchange only.
    """
    first, second = running.sites.values()
    first.start()
    second.start()
    until(lambda: running.closed("round-0000/model"), "the first round is over")
    second.send(signal.SIGSTOP)
    until(lambda: running.contributed(first.name, f"round-0001/{key}"), f"{first.name} has contributed")
    assert not running.closed(f"round-0001/{key}")
    first.send(signal.SIGKILL)
    second.send(signal.SIGCONT)
    first.start("--c")


def same_bits(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two checkpoints hold the same weights and the same optimizer state."""
    weights, others = one["network_weights"], other["network_weights"]
    momenta, other_momenta = one["optimizer_state"]["state"], other["optimizer_state"]["state"]
    return (
        weights.keys() == others.keys()
        and all(torch.equal(weights[name], others[name]) for name in weights)
        and momenta.keys() == other_momenta.keys()
        and all(torch.equal(momenta[i]["momentum_buffer"], other_momenta[i]["momentum_buffer"]) for i in momenta)
    )
