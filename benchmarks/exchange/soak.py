"""Many rounds of a small model at one coordinator: does anything grow that should not?

The rounds' collectives are those of FedSM, FedGS and FedAvg in turn. Attempts are given up in the middle of a round,
sites stay away until a deadline, uploads break, a site begins collectives that nobody else knows, and now and then the
disk is full. Sampled are memory, file descriptors, what lies in the spool and among the results, the journal, and the
processor's time that a round takes. Without a network: `kills.py` has that. Exits with 1 if something has grown between
the second and the last quarter of the rounds.

    python benchmarks/exchange/soak.py --rounds 2000 --sites 3
"""

from __future__ import annotations

import argparse
import json
import logging
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from nnunet_fed.coordinator import round_closer
from nnunet_fed.coordinator.coordinator import Coordinator
from nnunet_fed.coordinator.opening import open_attempt
from nnunet_fed.coordinator.store import Store
from nnunet_fed.coordinator.verdict import Offer
from nnunet_fed.errors import FederationError
from nnunet_fed.exchange.communicator import Verb
from nnunet_fed.exchange.keys import key_of, scope_of_round
from nnunet_fed.exchange.payload import encode, measure
from nnunet_fed.study.federation import Federation

ROUNDS: dict[str, list[tuple[str, Verb]]] = {
    "fedsm": [
        ("personal", "mean"), ("personal-deviation", "sum"), ("selector-0", "mean"), ("selector", "gather"),
        ("state", "mean"), ("model", "mean"),
    ],
    "fedgs": [("factor", "sum"), ("model", "mean")],
    "fedavg": [("model", "mean")],
}  # fmt: skip
"""The collectives of a round, by method."""
GIVEN_UP = 5
"""Attempts that are given up, in the first half of the rounds, so that the last one is long."""
MOST = {
    "memory, MB": 1.25, "file descriptors": 1.0, "spool and results, kB": 1.1, "rows beside the record": 1.1,
    "journal, kB a round": 1.15, "write-ahead log, kB": 1.25, "CPU, ms a round": 1.5,
}  # fmt: skip
"""Largest ratio of the last quarter of the rounds to the second one."""

Sample = dict[str, float]


class Soak:
    """Sites and a coordinator that goes through rounds; the sites are method calls.

    Args:
        folder: of the state.
        rounds: so many in all.
        sites: so many.
        parameters: of the model.
    """

    def __init__(self, folder: Path, rounds: int, sites: int, parameters: int):
        self.folder, self.rounds = folder, rounds
        self.sites = [f"site_{number:02d}" for number in range(sites)]
        self._model = {"w": np.zeros(parameters, np.float32)}
        self._now = 0.0
        self.attempt = 0
        self._open()

    def _open(self) -> None:
        study = Federation.model_validate({
            "name": "soak", "method": {"name": "fedsm"}, "sites": self.sites, "rounds": self.rounds,
            "min_sites": max(1, len(self.sites) - 1), "max_update_norm": 1e9,
        })  # fmt: skip
        self._study, self.attempt, self._number = study, self.attempt + 1, 0
        store = Store(self.folder)
        self.journal = store._journal
        if self.attempt > 1:
            open_attempt(store)
        self.coordinator = Coordinator(study, store, clock=lambda: self._now)
        for site in self.sites:
            self.run = self.coordinator.join(site, "training", study.digest, "3d_fullres", "Soak", True)

    def give_up(self) -> None:
        """Stop in the middle of a round, and open another attempt."""
        key = key_of(scope_of_round(self._number), "model")
        self._give(self.sites[0], key, "mean")
        self._give(self.sites[1], key, "mean", breaks=True)
        self.close()
        self._open()

    def close(self) -> None:
        """Stop."""
        self.coordinator.close()

    def round(self, away: Sequence[str] = ()) -> None:
        """One round, in which some sites stay away after its first collective."""
        collectives = list(ROUNDS.values())[self._number % len(ROUNDS)]
        scope = scope_of_round(self._number)
        self._give(self.sites[-1], key_of(scope, "mine"), "gather")
        for place, (name, verb) in enumerate(collectives):
            key = key_of(scope, name)
            there = [site for site in self.sites if place == 0 or site not in away]
            for site in there:
                self._give(site, key, verb)
            collective = self.coordinator.wait(self.run, key, 0)
            if collective is not None and collective.status == "open":
                self._now += 60 * self._study.deadline_minutes + 1
                collective = self.coordinator.wait(self.run, key, 0)
            if collective is None or collective.status != "closed":
                raise RuntimeError(f"{key}: {collective}")
            with suppress(OSError):
                self.coordinator.wait_until_saved(collective)
        self._number += 1

    def _give(self, site: str, key: str, verb: Verb, breaks: bool = False) -> None:
        value = {"value": np.ones(3)} if verb == "sum" else self._model
        payload = b'{"told": 1}' if verb == "gather" else b"".join(encode(value))
        offer = Offer(self.run, key, site, verb, 1.0, *measure([payload]))
        pieces = [payload[:9]] if breaks else [payload]
        while True:
            try:
                self.coordinator.take(offer, 0, pieces)
                return
            except (sqlite3.OperationalError, OSError):  # as a site: once more, until there is room
                self.make_room()

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        """The journal takes nothing more until a site has tried in vain, and no result is saved meanwhile."""
        make_durable = round_closer.make_durable

        def full(path: Path) -> None:
            raise OSError(28, "No space left on device", str(path))

        round_closer.make_durable = full
        self.journal.execute(f"PRAGMA max_page_count = {self._pragma('page_count')}")
        try:
            yield
        finally:
            round_closer.make_durable = make_durable
            self.make_room()

    def _pragma(self, name: str) -> int:
        return int(self.journal.execute(f"PRAGMA {name}").fetchone()[0])

    def make_room(self) -> None:
        """Somebody has deleted something."""
        self.journal.execute("PRAGMA max_page_count = 1073741823")

    def sample(self) -> Sample:
        """What the coordinator takes now."""
        end = time.monotonic() + 3 * round_closer.NOTE_SECONDS
        whole = "*.*.*.*.[0-9a-f]*"  # of which one waits: what a site has begun alone
        while len(list((self.folder / "spool").glob(whole))) > 1 and time.monotonic() < end:
            time.sleep(0.02)
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        files = [path for name in ("spool", "results") for path in (self.folder / name).iterdir()]
        pages = self._pragma("page_count")
        beside = ("ballot", "turned_down", "collective WHERE status IN ('open', 'closed')")
        return {
            "memory, MB": int(fields["RssAnon"].split()[0]) / 1e3,
            "file descriptors": float(len(list(Path("/proc/self/fd").iterdir()))),
            "spool and results, kB": sum(path.stat().st_size for path in files) / 1e3,
            "rows beside the record": float(
                sum(self.journal.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0] for table in beside)
            ),
            "journal, kB": (pages - self._pragma("freelist_count")) * self._pragma("page_size") / 1e3,
            "write-ahead log, kB": (self.folder / "journal.sqlite-wal").stat().st_size / 1e3,
        }


def soak(folder: Path, rounds: int, sites: int, parameters: int) -> list[Sample]:
    """Go through all rounds; what was sampled after each hundredth of them."""
    running, samples, seconds = Soak(folder, rounds, sites, parameters), list[Sample](), list[float]()
    step, given_up_every = max(len(ROUNDS), rounds // 100), max(2, rounds // (2 * GIVEN_UP))
    for number in range(rounds):
        if number and number % given_up_every == 0 and number <= rounds // 2:
            running.give_up()
        started = time.process_time()
        if number % 25 == 20:
            with running.full_disk():
                running.round()
        else:
            running.round(away=running.sites[-1:] if number % 10 == 5 else ())
        seconds.append(time.process_time() - started)
        if (number + 1) % step == 0:
            timed = {"rounds": number + 1.0, "CPU, ms a round": 1e3 * statistics.mean(seconds[-step:])}
            samples.append({**timed, **running.sample()})
    with suppress(FederationError):
        running.coordinator.status(record=True)
    running.close()
    return samples


def quarters(samples: list[Sample]) -> dict[str, tuple[float, float]]:
    """By what was sampled: in the second and in the last quarter. Of the journal, by how much it grew a round."""
    last = samples[-1]["rounds"]
    parts = [[s for s in samples if start <= s["rounds"] / last <= start + 0.25] for start in (0.25, 0.75)]

    def of_part(what: str, part: list[Sample]) -> float:
        if what == "journal, kB a round":
            return (part[-1]["journal, kB"] - part[0]["journal, kB"]) / (part[-1]["rounds"] - part[0]["rounds"])
        return statistics.median(sample[what] for sample in part)

    return {what: (of_part(what, parts[0]), of_part(what, parts[1])) for what in MOST}


def main() -> None:
    """Run, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--parameters", type=int, default=2_500, help="of the model: 10 kB")
    parser.add_argument("--folder", type=Path, help="where the state is for the time being")
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    arguments = parser.parse_args()
    logging.getLogger("nnunet_fed").setLevel(logging.CRITICAL)  # a full disk is no news here
    with tempfile.TemporaryDirectory(prefix="nnunet_fed_soak_", dir=arguments.folder) as name:
        samples = soak(Path(name), arguments.rounds, arguments.sites, arguments.parameters)
    table = Table(title=f"{arguments.rounds} rounds, {arguments.sites} sites, {GIVEN_UP} attempts given up")
    for column in ("", "second quarter", "last quarter", "at most"):
        table.add_column(column, justify="right" if column else "left")
    found: dict[str, Any] = quarters(samples)
    for what, (before, after) in found.items():
        table.add_row(what, f"{before:.1f}", f"{after:.1f}", f"{MOST[what] * before:.1f}")
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"quarters": found, "samples": samples}, indent=2) + "\n")
    sys.exit(0 if all(after <= MOST[what] * before for what, (before, after) in found.items()) else 1)


if __name__ == "__main__":
    main()
