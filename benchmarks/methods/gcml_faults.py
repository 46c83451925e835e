"""What a fault at one site of GCML costs the others: real processes of four sites that gossip, over a network of ours.

``calm`` is a run without faults. In each of the others something happens to one site:

============== =================================================================================
``killed``     it and its peer process are killed (SIGKILL) while it pushes a model, for good
``resumed``    it is killed in the same way, and continued with ``--c`` after a while
``absent``     it never starts
``blackholed`` for a minute every packet to and from it is lost, while it trains on
============== =================================================================================

What is measured is the pace of the three others: the seconds from the start of one epoch to that of the next, with the
checkpoints and the mail between them. A fault must not win time for them either: in every run a *stand-in*, which
trains alone on the same plans, computes while the faulty site does not, so that four trainings share the machine at any
time. And an epoch with a peer's model takes more than twice as long as one without, and a fault changes how many there
are: so medians are compared of epochs of the same kind, and the total is what the epochs of a run would have taken at
the paces of the calm one. Beside the ratio stands what depends on neither: how long a training's own thread was blocked
in an epoch (Linux: wall time without what it computed or waited for a core), to which waiting for a peer would add.

At the end every site that has a final model predicts a test set with stock ``nnUNetv2_predict``. Finished runs are kept
and skipped on a second call.

    python benchmarks/methods/gcml_faults.py --out gcml_faults --json gcml_faults.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tcp_proxy import Network

from nnunet_fed.datasets.phantom import write_phantom
from nnunet_fed.processes import Process, Step, stop
from nnunet_fed.simulation.reuse_plans import adopt
from nnunet_fed.simulation.simulate import (
    HOST,
    Place,
    Simulation,
    free_ports,
    simulate,
    site_environment,
    training_command,
)
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.toml import to_toml

RUNS = ("calm", "killed", "resumed", "absent", "blackholed")
SITES = ("site_a", "site_b", "site_c", "site_d")
VICTIM = "site_b"
OTHERS = tuple(site for site in SITES if site != VICTIM)
TARGET = 1.02
PUSHED = 200_000
"""Bytes of a push that have passed when the site is killed."""
SLOW = 1.0
"""Megabytes in a second that pass from the site that will be killed, lest its push is over before it is seen."""
POLL = 0.25
EPOCH = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+): +Epoch (\d+) *$", re.MULTILINE)
DONE = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+): +Training done", re.MULTILINE)


def blocked_seconds(pid: int) -> float | None:
    """How long the first thread of a process has neither computed nor waited for a core; ``None``: not on Linux."""
    try:
        computed, waited = (int(number) for number in Path(f"/proc/{pid}/schedstat").read_text().split()[:2])
        started = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return None
    return up - started / os.sysconf("SC_CLK_TCK") - (computed + waited) / 1e9


class Running:
    """The trainings of one run."""

    def __init__(self, arguments: argparse.Namespace, name: str, study: Federation):
        self.folder, self.study, self._arguments = arguments.out / name, study, arguments
        shutil.rmtree(self.folder, ignore_errors=True)
        addresses = {site: f"{HOST}:{port}" for site, port in zip(SITES, free_ports(len(SITES)), strict=True)}
        self.network = Network(addresses)
        self.places = {site: self._place(site, study, self.folder / site) for site in SITES}
        for site, place in self.places.items():
            settings = {"name": site, "coordinator": f"{HOST}:9", "insecure": True, "listen": addresses[site]}
            (place.folder / "site.toml").write_text(to_toml({**settings, "peers": self.network.peers(site)}))
        alone = study.model_copy(update={"method": Federation.model_validate(_study(arguments, "local")).method})
        self._alone = alone, self._place(VICTIM, alone, self.folder / "stand_in")
        self.processes: dict[str, Process] = {}
        self._stand_in: Process | None = None
        self.blocked: dict[str, dict[int, float]] = {site: {} for site in SITES}

    def _place(self, site: str, study: Federation, folder: Path) -> Place:
        place = Place(site, self._arguments.out / "data" / site, folder.resolve(), ("all",))
        place.make(f"{HOST}:9", {})
        adopt(self._arguments.out / "planned" / "sites" / site, place.folder, study)
        return place

    def _train(self, place: Place, study: Federation, *words: str) -> Process:
        environment = {**site_environment(place.folder, 1), "nnUNet_n_proc_DA": "0", "nnUNet_fed_skip_validation": "1"}
        command = [*training_command(study, "all", "cpu"), *words]
        return Process(Step("Training", command, environment, place.folder / "train.log"))

    def start(self, site: str, *words: str) -> None:
        """Start the training of a site, in whose place nobody trains any more."""
        if self._stand_in is not None and site == VICTIM:
            stop([self._stand_in])
            self._stand_in = None
        self.processes[site] = self._train(self.places[site], self.study, *words)

    def stand_in(self) -> None:
        """Let somebody train alone in the place of the site that does not, now and whenever that ends."""
        if self._stand_in is None or self._stand_in.exit_status() is not None:
            study, place = self._alone
            self._stand_in = self._train(place, study)

    def log(self, site: str) -> str:
        """What nnU-Net has logged at a site."""
        logs = sorted(self.places[site].results(self.study, "all").glob("training_log_*.txt"))
        return "\n".join(log.read_text() for log in logs)

    def epoch(self, site: str) -> int:
        """In which a site is; -1: it has not begun."""
        return max((int(number) for _, number in EPOCH.findall(self.log(site))), default=-1)

    def kill(self) -> None:
        """Kill the victim and its peer process, which leads a session of its own."""
        mailbox = str(self.places[VICTIM].results(self.study, "all") / "mailbox")
        command = ["pgrep", "-f", f"nnunet_fed peer {mailbox}"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        for number in found.stdout.split():
            os.kill(int(number), signal.SIGKILL)
        self.processes[VICTIM].kill()

    def kill_in_a_push(self, from_epoch: int) -> None:
        """Wait for a push of the victim, and kill it there."""
        outgoing = [proxy for (caller, _), proxy in self.network.proxies.items() if caller == VICTIM]
        self.await_(lambda: self.epoch(VICTIM) >= from_epoch)
        for proxy in outgoing:
            proxy.megabytes_per_second = SLOW
        before = {proxy: proxy.to_target for proxy in outgoing}
        self.await_(lambda: any(proxy.to_target - before[proxy] > PUSHED for proxy in outgoing), 0.05)
        self.kill()
        for proxy in outgoing:
            proxy.megabytes_per_second = None

    def await_(self, happened: Callable[[], bool], seconds: float = POLL) -> None:
        """Wait, and look how long the sites have been blocked meanwhile."""
        end = time.monotonic() + 3600
        while not happened():
            if time.monotonic() > end:
                raise TimeoutError(f"{self.folder.name}: nothing has happened for an hour")
            if self._stand_in is not None:
                self.stand_in()
            for site, process in self.processes.items():
                if process.exit_status() not in (None, 0) and site != VICTIM:
                    raise RuntimeError(f"{site} has failed. {process.last_words()}")
                self._look(site, process)
            time.sleep(seconds)

    def _look(self, site: str, process: Process) -> None:
        epoch, blocked = self.epoch(site), blocked_seconds(process.pid)
        if blocked is not None and epoch >= 0:
            self.blocked[site].setdefault(epoch, blocked)

    def finish(self) -> None:
        """Wait for all that trains; In every run alike the last to finish have more of the machine."""
        self.await_(lambda: all(self.processes[site].exit_status() is not None for site in OTHERS))
        if self._stand_in is not None:
            stop([self._stand_in])
            self._stand_in = None
        if VICTIM in self.processes:
            self.await_(lambda: self.processes[VICTIM].exit_status() is not None)

    def close(self) -> None:
        """End whatever is left."""
        stop([*self.processes.values(), *([self._stand_in] if self._stand_in else [])])
        self.network.close()

    def figures(self) -> dict[str, Any]:
        """Of each site that has finished: seconds of its epochs with and without a peer's model."""
        found: dict[str, Any] = {}
        for site, place in self.places.items():
            results = place.results(self.study, "all")
            if not (results / "checkpoint_final.pth").is_file():
                continue
            log, record = self.log(site), json.loads((results / "federation.json").read_text())
            mutual = {n for phase in record["mutual_phases"] for n in range(phase["began"], phase["ended"] + 1)}
            starts = {int(number): _seconds(at) for at, number in EPOCH.findall(log)}
            starts[len(starts)] = _seconds(DONE.findall(log)[-1])
            blocked = self.blocked[site]
            found[site] = {
                "epochs": [
                    {
                        "epoch": n, "mutual": n in mutual, "seconds": starts[n + 1] - starts[n],
                        "blocked": blocked[n + 1] - blocked[n] if {n, n + 1} <= blocked.keys() else None,
                    }
                    for n in range(len(starts) - 1)
                ],
                "events": [event["text"] for event in record["events"]],
                "missed": sum(entry["event"] == "missed" for entry in record["transfers"]),
            }  # fmt: skip
        return found


def _seconds(text: str) -> float:
    date, _, fraction = text.partition(".")
    return time.mktime(time.strptime(date, "%Y-%m-%d %H:%M:%S")) + float(f"0.{fraction}")


def _study(arguments: argparse.Namespace, method: str) -> dict[str, Any]:
    options = {"topology": "uniform_push", "warm_up_epochs": 1, "ramp_steps": 10} if method == "gcml" else {}
    return {
        "name": "faults", "sites": SITES, "method": {"name": method, **options}, "planner": "nnUNetPlannerFedSmall",
        "plans_name": "nnUNetFedSmallPlans", "rounds": arguments.rounds, "iterations_per_epoch": arguments.iterations,
        "val_iterations_per_epoch": 1, "initial_lr": 0.05, "momentum": 0.9, "fold": "all",
    }  # fmt: skip


def run(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """One run from start to end, with its predictions."""
    study, third = Federation.model_validate(_study(arguments, "gcml")), arguments.rounds // 3
    running = Running(arguments, name, study)
    try:
        for site in SITES:
            if (name, site) != ("absent", VICTIM):
                running.start(site)
        if name == "absent":
            running.stand_in()
        if name in ("killed", "resumed"):
            running.kill_in_a_push(third)
            running.stand_in()
        if name == "resumed":
            killed = max(running.epoch(site) for site in OTHERS)
            running.await_(lambda: max(running.epoch(site) for site in OTHERS) >= killed + max(1, third // 2))
            running.start(VICTIM, "--c")
        if name == "blackholed":
            running.await_(lambda: running.epoch(VICTIM) >= third)
            end = time.monotonic() + arguments.blackhole
            for proxy in running.network.of(VICTIM):
                proxy.passes.clear()
            running.await_(lambda: time.monotonic() > end)
            for proxy in running.network.of(VICTIM):
                proxy.passes.set()
        running.finish()
        figures = running.figures()
    finally:
        running.close()
    for site in figures:
        figures[site]["predicts"] = predicts(arguments, running.places[site], study)
    return figures


def predicts(arguments: argparse.Namespace, place: Place, study: Federation) -> bool:
    """Whether stock ``nnUNetv2_predict``, without our trainers on its path, predicts with a final model."""
    stock = {name: value for name, value in site_environment(place.folder, 1).items() if "ext" not in name.lower()}
    images, out = arguments.out / "data" / "test" / "imagesTs", place.folder / "predicted"
    model = place.results(study, "all").parent.name.split("__")[0]
    command = [str(Path(sys.executable).parent / "nnUNetv2_predict"), "-i", str(images), "-o", str(out), "-d", "1"]
    command += ["-c", study.configuration, "-f", "all", "-tr", model, "-p", str(study.plans_name), "-device", "cpu"]
    with (place.folder / "predict.log").open("wb") as log:
        status = subprocess.run(
            [*command, "--disable_tta", "-npp", "1", "-nps", "1"], env=stock, stdout=log, stderr=log, check=False
        ).returncode
    wanted = {path.name.replace("_0000", "") for path in images.iterdir()}
    return status == 0 and wanted == {path.name for path in out.glob("*.nii.gz")}


def epochs_of(figures: dict[str, Any], mutual: bool, key: str = "seconds") -> list[float]:
    """Of the sites that no fault befalls."""
    epochs = [epoch for site in OTHERS for epoch in figures[site]["epochs"]]
    return [epoch[key] for epoch in epochs if epoch["mutual"] == mutual and epoch[key] is not None]


def show(figures: dict[str, Any], console: Console) -> None:
    """Print a row for each run."""
    calm = figures["calm"]
    pace = {mutual: epochs_of(calm, mutual) for mutual in (False, True)}
    table = Table(title=f"Pace of {', '.join(OTHERS)}; {VICTIM} has the fault (target of the ratios: {TARGET})")
    columns = ("run", "epochs plain, mutual", "s plain, median", "ratio", "s mutual, median", "ratio", "total, ratio")
    for column in (*columns, "blocked, s an epoch", "final models that predict"):
        table.add_column(column, justify="right")
    for name, found in figures.items():
        times = {mutual: epochs_of(found, mutual) for mutual in (False, True)}
        cells = []
        for mutual in (False, True):
            enough = times[mutual] and pace[mutual]
            median = statistics.median(times[mutual]) if times[mutual] else None
            cells.append("-" if median is None else f"{median:.2f}")
            cells.append(f"{median / statistics.median(pace[mutual]):.3f}" if enough and median is not None else "-")
        expected = sum(len(times[m]) * statistics.mean(pace[m]) for m in times if pace[m])
        total = sum(sum(times[m]) for m in times if pace[m])
        blocked = [value for mutual in (False, True) for value in epochs_of(found, mutual, "blocked")]
        predicting = sum(site["predicts"] for site in found.values())
        table.add_row(
            name, f"{len(times[False])}, {len(times[True])}", *cells, f"{total / expected:.3f}",
            f"{statistics.median(blocked):.3f}" if blocked else "-", f"{predicting} of {len(found)}",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    """Make the runs that are missing, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gcml_faults"))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--blackhole", type=float, default=60.0, help="seconds in which packets are lost")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    console, data, planned = Console(), arguments.out / "data", arguments.out / "planned"
    if not data.is_dir():
        write_phantom(data, sites=len(SITES), cases=4, test_cases=2)
    if not (planned / "summary.json").is_file():
        shutil.rmtree(planned, ignore_errors=True)
        study = Federation.model_validate(_study(arguments, "gcml"))
        simulate(Simulation({site: data / site for site in SITES}, planned, study, until="plan"), console)
    figures = {}
    for name in dict.fromkeys(["calm", *arguments.runs]):
        kept = arguments.out / f"{name}.json"
        if not kept.is_file():
            console.print(f"{name} ...")
            kept.write_text(json.dumps(run(arguments, name)))
        figures[name] = json.loads(kept.read_text())
    show(figures, console)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
