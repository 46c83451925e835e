"""Make what stands beside this file: what version 0.1 leaves on disk in the middle of a study of every method.

Everything is done with the wheel beside this file, by its commands and nnU-Net's, and by real kills:

    python tests/data/v0.1/make.py /tmp/v0.1        # a new folder, in which it works; takes some minutes

The Python that runs it must have the dependencies of nnunet_fed 0.1. Only the network is changed by hand, in the plans
that both sites have agreed on: a few thousand parameters instead of nnU-Net's millions.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from packing import pack

HERE = Path(__file__).resolve().parent
SITES = ("site_a", "site_b")
DATASET = 1
PLANS = "nnUNetFedSmallPlans"
ROUNDS, STEPS = 3, 2
STUDIES: dict[str, tuple[str, list[str]]] = {
    "fedavg": ("nnUNetTrainerFedAvg", []),
    "local": ("nnUNetTrainerLocal", []),
    "fedprox": ("nnUNetTrainerFedProx", ["--fold", "1"]),
    "fedavgm": ("nnUNetTrainerFedAvgM", ["--min-sites", "1", "--deadline-minutes", "90"]),
    "fedadam": ("nnUNetTrainerFedAdam", []),
    "ditto": ("nnUNetTrainerDitto", []),
    "fedgs": ("nnUNetTrainerFedGS", []),
    "fedsm": ("nnUNetTrainerFedSM", []),
    "fedoap": ("nnUNetTrainerFedOAP", []),
    "gcml": (
        "nnUNetTrainerGCML",
        ["--rounds", "6", "--option", "topology=ring", "--option", "warm_up_epochs=1", "--option", "mutual_epochs=2"],
    ),
}
"""Trainer of each method, and what its study says besides. The first one plans; the others take over its plans."""
SETTINGS = ["--rounds", ROUNDS, "--iterations", STEPS, "--val-iterations", 1, "--lr", 0.05, "--momentum", 0.9]
NETWORK = {
    "n_stages": 3, "features_per_stage": [4, 4, 6], "kernel_sizes": [[3, 3, 3]] * 3,
    "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]], "n_conv_per_stage": [1, 1, 1], "n_conv_per_stage_decoder": [1, 1],
}  # fmt: skip
PATIENCE = 600.0
"""Seconds."""


class Maker:
    """Makes the studies in a new folder.

    Args:
        work: that folder.
    """

    def __init__(self, work: Path):
        self.work = work
        work.mkdir(parents=True)
        (wheel,) = HERE.glob("*.whl")
        zipfile.ZipFile(wheel).extractall(work / "installed")
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "nnUNet_fed_threads"), "1")
        self.environment = {
            **os.environ, **threads, "PYTHONPATH": str(work / "installed"), "PYTHONUNBUFFERED": "1",
            "nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1",
        }  # fmt: skip
        self.plugins = self.run(self.nnunet_fed("plugin-path"))
        assert str(work) in self.plugins, f"{self.plugins} is not of the wheel"

    def nnunet_fed(self, *words: Any) -> list[str]:
        return [sys.executable, "-m", "nnunet_fed", *map(str, words)]

    def run(self, command: list[str]) -> str:
        """A command to its end; what it prints."""
        logging.info("%s", " ".join(command))
        done = subprocess.run(command, env=self.environment, cwd=self.work, stdout=subprocess.PIPE, check=True)
        return done.stdout.decode().strip()

    def plan(self) -> None:
        """Data of two sites, planned and preprocessed together in the first study, and a tiny network in the plans."""
        data = self.work / "data"
        self.run(self.nnunet_fed("phantom", data, "--sites", len(SITES), "--cases", "4,3", "--coarse", 3))
        for site in SITES:
            cases = sorted(path.name.removesuffix(".nii.gz") for path in (data / site / "labelsTr").iterdir())
            folds = [{"train": [c for c in cases if c != case], "val": [case]} for case in cases[:2]]
            (data / site / "splits_final.json").write_text(json.dumps(folds))
        first = next(iter(STUDIES))
        self.simulate(first, first, "--until", "plan")
        for site in SITES:
            file = next((self.work / first / "sites" / site).rglob(f"{PLANS}.json"))
            plans = json.loads(file.read_text())
            plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"].update(NETWORK)
            file.write_text(json.dumps(plans, indent=4))

    def simulate(self, name: str, method: str, *words: str) -> None:
        """A study in a folder of its own, with a folder for each site and one for the coordinator's state."""
        given = [word for site in SITES for word in ("--site", f"{site}={self.work / 'data' / site}")]
        options = [*SETTINGS, *STUDIES[method][1], *words]  # of two equal options the last one counts
        self.run(self.nnunet_fed("simulate", *given, "--method", method, "--out", self.work / name, *options))

    def take_over_plans(self, method: str) -> None:
        """A study of another method on the same plans and preprocessed data."""
        self.simulate(method, method, "--until", "plan", "--planned", str(self.work / next(iter(STUDIES))))

    def finish_one(self) -> None:
        """A study of two rounds to its end, with nnU-Net's validation."""
        first = next(iter(STUDIES))
        self.simulate("finished", first, "--rounds", "2", "--planned", str(self.work / first))


class Running:
    """A coordinator and two sites of one study, until they are killed."""

    def __init__(self, maker: Maker, method: str):
        self.maker, self.folder = maker, maker.work / method
        self.trainer = STUDIES[method][0]
        study = (self.folder / "federation.toml").read_text()
        self.fold = re.findall(r"^fold = (\d+)$", study, re.MULTILINE)[0]
        site = (self.folder / "sites" / SITES[0] / "site.toml").read_text()
        self.address = re.findall(r'^coordinator = "(.*)"$', site, re.MULTILINE)[0]

    def serve(self) -> None:
        state = self.folder / "coordinator"
        words = ["coordinator", self.folder / "federation.toml", "--state", state, "--listen", self.address]
        self.coordinator = self.start(self.maker.nnunet_fed(*words, "--insecure"), {}, "coordinator.log")
        self.until("the coordinator answers", lambda: "for site_a" in (self.folder / "coordinator.log").read_text())

    def train(self, site: str) -> subprocess.Popen[bytes]:
        here = self.folder / "sites" / site
        variables = {name: str(here / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        variables |= {
            "nnUNet_fed_site": str(here / "site.toml"), "nnUNet_extTrainer": self.maker.plugins,
            "nnUNet_fed_skip_validation": "1",
        }  # fmt: skip
        command = [str(Path(sys.executable).parent / "nnUNetv2_train"), str(DATASET), "3d_fullres", self.fold]
        command += ["-tr", self.trainer, "-p", PLANS, "-device", "cpu"]
        return self.start(command, variables, f"{site}.log")

    def start(self, command: list[str], variables: dict[str, str], log: str) -> subprocess.Popen[bytes]:
        with (self.folder / log).open("wb") as file:
            return subprocess.Popen(
                command, env={**self.maker.environment, **variables}, cwd=self.maker.work, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def until(self, what: str, happened: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not happened():
            assert time.monotonic() < end, f"did not happen: {what}"
            time.sleep(0.01)
        logging.info("%s", what)

    def says(self, site: str, pattern: str) -> bool:
        return re.search(pattern, (self.folder / f"{site}.log").read_text(errors="replace")) is not None

    def record(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(
            self.maker.run(self.maker.nnunet_fed("status", "--coordinator", self.address, "--json"))
        )
        return answer

    def checkpoint(self, site: str) -> int:
        """When the site's last checkpoint was written."""
        (file,) = (self.folder / "sites" / site).rglob("checkpoint_latest.pth")
        return file.stat().st_mtime_ns

    def facts(self, record: dict[str, Any]) -> dict[str, Any]:
        """What a later version must not change."""
        waiting = {
            collective["key"]: {site: given["digest"] for site, given in collective["sites"].items()}
            for run in record["runs"].values()
            for collective in run["collectives"]
            if collective["status"] == "open"
        }
        return {
            "trainer": self.trainer, "fold": int(self.fold), "digest": record["digest"], "runs": list(record["runs"]),
            "open": waiting,
        }  # fmt: skip


def kill(*processes: subprocess.Popen[bytes]) -> None:
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def interrupt_in_exchange(running: Running) -> dict[str, Any]:
    """Kill everything in the exchange of the second round, to which one site has contributed and the other has not.

    Both sites have a checkpoint of before the exchange.
    """
    running.serve()
    a, b = (running.train(site) for site in SITES)
    running.until("the second site is in its second epoch", lambda: running.says("site_b", r": Epoch 1\b"))
    b.send_signal(signal.SIGSTOP)
    record: dict[str, Any] = {}

    def contributed() -> bool:
        record.update(running.record())
        return any(list(sites) == ["site_a"] for sites in running.facts(record)["open"].values())

    running.until("the first site has contributed to the second round", contributed)
    kill(a, running.coordinator)
    before = running.checkpoint("site_b")
    b.send_signal(signal.SIGCONT)
    running.until("the second site would contribute", lambda: running.checkpoint("site_b") != before)
    kill(b)
    return running.facts(record)


def interrupt_in_training(running: Running) -> dict[str, Any]:
    """Kill everything in the third epoch."""
    running.serve()
    processes = [running.train(site) for site in SITES]
    for site, process in zip(SITES, processes, strict=True):
        running.until(f"{site} is in its third epoch", lambda site=site: running.says(site, r": Epoch 2\b"))
        process.send_signal(signal.SIGSTOP)
    facts = running.facts(running.record())
    kill(*processes, running.coordinator)
    return facts


def interrupt_gossip(running: Running) -> dict[str, Any]:
    """Kill one site with a letter in its mailbox that it has not read, and one while it trains with a peer's model."""
    a, b = (running.train(site) for site in SITES)
    running.until("site_a is in its second epoch", lambda: running.says("site_a", r": Epoch 1\b"))
    a.send_signal(signal.SIGSTOP)  # its peer process goes on
    phase = r"trains with the model that site_a had(?s:.*): Epoch \d+\b(?s:.*): Epoch \d+\b"
    running.until("site_b is in the second epoch of a mutual phase", lambda: running.says("site_b", phase))
    kill(b)
    running.until(
        "site_a has mail",
        lambda: any(path.parent.name == "inbox" for path in (running.folder / "sites/site_a").rglob("site_b@*")),
    )
    kill(a)
    time.sleep(5)  # their peer processes end by themselves
    plans = json.loads(next((running.folder / "sites" / "site_a").rglob(f"{PLANS}.json")).read_text())
    return {
        "trainer": running.trainer, "fold": int(running.fold), "digest": plans["federation"]["digest"], "runs": [],
        "open": {},
    }  # fmt: skip


INTERRUPTIONS = {"local": interrupt_in_training, "gcml": interrupt_gossip}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    work = Path(sys.argv[1]).resolve()
    maker = Maker(work)
    maker.plan()
    facts = {}
    for method in STUDIES:
        if method != next(iter(STUDIES)):
            maker.take_over_plans(method)
        facts[method] = INTERRUPTIONS.get(method, interrupt_in_exchange)(Running(maker, method))
    maker.finish_one()
    pack(work, HERE, tuple(STUDIES), PLANS)
    (HERE / "studies.json").write_text(json.dumps(facts, indent=2) + "\n")
    shutil.rmtree(work / "installed")


if __name__ == "__main__":
    main()
