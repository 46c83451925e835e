"""Many rounds of a small model with sites and a coordinator that are killed again and again.

Checks at the end that no round was lost, that all sites have the model of an undisturbed run, bit for bit, and that the
coordinator's memory, file descriptors and disk have not grown: among kills, and in the undisturbed run, whose one
coordinator goes through all rounds. Exits with 1 otherwise.

    python benchmarks/exchange/kills.py --rounds 200 --sites 8
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "tests" / "e2e"))

from faults import Exchange, exchange  # the tests' processes
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from nnunet_fed.study.site import Site
from nnunet_fed.transport.site.client import GrpcCommunicator

ALLOWED = {"anonymous memory, MB": 1.25, "file descriptors": 1.25, "disk without the journal, MB": 1.25}
"""Largest ratio of the last quarter of the rounds to the second one."""

Samples = list[tuple[int, dict[str, float]]]
"""Rounds done, and what the coordinator took then."""


def footprint(running: Exchange) -> dict[str, float]:
    """What the coordinator takes now."""
    assert running.coordinator is not None
    process = Path(f"/proc/{running.coordinator.pid}")
    fields = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    files = [path for folder in ("spool", "results") for path in (running.folder / "state" / folder).iterdir()]
    sizes = [path.stat().st_size for path in files if path.exists()]
    return {
        "anonymous memory, MB": int(fields["RssAnon"].split()[0]) / 1e3,
        "file descriptors": float(len(list((process / "fd").iterdir()))),
        "disk without the journal, MB": sum(sizes) / 1e6,
    }


def rounds_done(running: Exchange, name: str) -> int:
    """How many rounds a site has printed."""
    return len(running.results(name).read_text().splitlines()) if running.results(name).exists() else 0


def follow(running: Exchange, letters: str, progress: Progress, task: TaskID, samples: Samples) -> Iterator[None]:
    """Until all sites have ended: note what the coordinator takes, and show how many rounds are done."""
    while any(site.poll() is None for site in running.sites.values()):
        time.sleep(0.2)
        done = max(rounds_done(running, name) for name in letters)
        progress.update(task, completed=done)
        with suppress(FileNotFoundError):  # it was killed, or has just begun
            samples.append((done, footprint(running)))
        yield


def undisturbed(folder: Path, arguments: argparse.Namespace) -> tuple[list[str], Samples]:
    """What a site prints if nothing happens, and what the coordinator takes."""
    samples: Samples = []
    with (
        exchange(folder, arguments.letters, arguments.parameters, rounds=arguments.rounds) as running,
        Progress() as progress,
    ):
        for name in arguments.letters:
            running.start(name)
        task = progress.add_task("undisturbed", total=arguments.rounds)
        for _ in follow(running, arguments.letters, progress, task, samples):
            pass
        return next(iter(running.finish(seconds=60).values())), samples


def soak(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run with kills; a killed site goes on from its checkpoint."""
    chance, kills = random.Random(arguments.seed), {"coordinator": 0, "site": 0}
    samples: Samples = []
    with (
        exchange(folder, arguments.letters, arguments.parameters, rounds=arguments.rounds) as running,
        Progress() as progress,
    ):
        for name in arguments.letters:
            running.start(name, checkpoint=True)
        task = progress.add_task("with kills", total=arguments.rounds)
        next_kill = time.monotonic() + chance.uniform(0, 2 * arguments.every)
        for _ in follow(running, arguments.letters, progress, task, samples):
            if time.monotonic() < next_kill:
                continue
            next_kill = time.monotonic() + chance.uniform(0, 2 * arguments.every)
            if chance.random() < 0.5:
                running.kill(running.coordinator)
                running.serve()
                kills["coordinator"] += 1
            else:
                name = chance.choice(arguments.letters)
                if running.sites[name].poll() is None:
                    running.kill(running.sites[name])
                    running.start(name, checkpoint=True)
                    kills["site"] += 1
        printed = running.finish(seconds=60)
        watcher = GrpcCommunicator(Site(name="watcher", coordinator=running.address, insecure=True))
        record = watcher.status(record=True)
        watcher.close()
    (run,) = record["runs"].values()
    closed = [c["key"] for c in run["collectives"] if c["verb"] == "mean" and c["status"] in ("closed", "pruned")]
    return {"printed": printed, "closed": closed, "kills": kills, "samples": samples}


def growth(samples: Samples, rounds: int, what: str) -> tuple[float, float]:
    """Medians in the second and in the last quarter of the rounds."""
    quarters = [
        [taken[what] for done, taken in samples if start <= done / rounds < start + 0.25] for start in (0.25, 0.75)
    ]
    return statistics.median(quarters[0] or [0.0]), statistics.median(quarters[1] or [0.0])


def main() -> None:
    """Run both, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--sites", type=int, default=8)
    parser.add_argument("--parameters", type=int, default=250_000, help="of the model: 1 MB")
    parser.add_argument("--every", type=float, default=5.0, help="mean seconds between two kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    arguments = parser.parse_args()
    arguments.letters = "abcdefghijklmnopqrstuvwxyz"[: arguments.sites]
    with tempfile.TemporaryDirectory(prefix="nnunet_fed_kills_") as name:
        expected, steady = undisturbed(Path(name) / "undisturbed", arguments)
        found = soak(Path(name) / "soak", arguments)
    lost = arguments.rounds - len(found["closed"])
    same = all(dict.fromkeys(printed) == dict.fromkeys(expected) for printed in found["printed"].values())
    table = Table(title=f"{arguments.rounds} rounds, {arguments.sites} sites; kills: {found['kills']}")
    for column in ("", "run", "second quarter", "last quarter"):
        table.add_column(column, justify="right" if "quarter" in column else "left")
    good = same and lost == 0
    for run, samples in (("undisturbed", steady), ("with kills", found["samples"])):
        for what, allowed in ALLOWED.items():
            before, after = growth(samples, arguments.rounds, what)
            table.add_row(what, run, f"{before:.1f}", f"{after:.1f}")
            good = good and after <= allowed * before + 1
    console = Console()
    console.print(table)
    console.print(f"Rounds lost: {lost}. Same bits as undisturbed: {'yes' if same else 'no'}.")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({**found, "undisturbed": steady, "lost": lost, "same": same}, indent=2) + "\n"
        )
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
