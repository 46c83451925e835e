"""Bytes that GCML's sites send in each topology, counted on the wire, beside FedAvg's.

Real peer processes with a small model over loopback, and in the place of the trainings a loop that posts a model of
every site in every round, and waits until all are served. Between every two sites stands a proxy that counts. FedAvg's
bytes are those of its payloads: 2 N in a round, one up and one down at each site. Beside them stand the values of the
notes (5.5), which are expectations; with few rounds a random topology is off by chance, and ``drawn`` says by how much.

    python benchmarks/methods/gcml_bytes.py --rounds 40 --json gcml_bytes.json
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tcp_proxy import Network

from nnunet_fed.gossip.mailbox import Mailbox, State, described
from nnunet_fed.gossip.schedule import Schedule, Topology, Version
from nnunet_fed.simulation.simulate import HOST, free_ports
from nnunet_fed.study.toml import to_toml

SIZES = {
    5: {"NYU": 113, "MCF": 106, "NWU": 21, "AHN": 12, "MCA": 17},
    8: dict(zip("abcdefgh", (32, 15, 23, 7, 9, 21, 22, 23), strict=True)),
}
"""Training cases of each site: PanSeg and BraTS, the notes' 3.2."""
ARMS: dict[str, tuple[Topology, float | None, dict[int, float]]] = {
    "bernoulli, c = 1": ("bernoulli", 1.0, {5: 0.10, 8: 0.06}),
    "bernoulli, c = N/2": ("bernoulli", None, {5: 0.25, 8: 0.25}),
    "uniform_push": ("uniform_push", None, {5: 0.50, 8: 0.50}),
    "derangement": ("derangement", None, {5: 0.50, 8: 0.50}),
    "matching": ("matching", None, {5: 0.40, 8: 0.50}),
    "ring": ("ring", None, {5: 0.50, 8: 0.50}),
    "exponential": ("exponential", None, {5: 0.50, 8: 0.50}),
}
"""Topology, expected senders, and the notes' share of FedAvg's bytes (5.5) by number of sites."""
RUN = "0" * 64
PATIENCE = 120.0


class Peers:
    """Peer processes of some sites, without trainings."""

    def __init__(self, folder: Path, cases: dict[str, int], parameters: int):
        self.cases = cases
        self._counter = 0
        self._tensors = {"w": np.random.default_rng(0).normal(size=parameters).astype(np.float32)}
        self._schema, self.size = described(self._tensors)
        addresses = {site: f"{HOST}:{port}" for site, port in zip(cases, free_ports(len(cases)), strict=True)}
        self.network = Network(addresses)
        self._mailboxes = {site: Mailbox(folder / site) for site in cases}
        self._processes = [self._start(folder, site, addresses[site]) for site in cases]
        self._await(lambda site: len(self._mailboxes[site].members()) == len(cases) - 1)

    def _start(self, folder: Path, site: str, address: str) -> subprocess.Popen[bytes]:
        state = State(RUN, Version(site, {}, 0), {}, self.cases[site], "i", self._schema, self.size)
        self._mailboxes[site].publish_state(state)
        settings = {"name": site, "coordinator": f"{HOST}:9", "insecure": True, "listen": address}
        (folder / f"{site}.toml").write_text(to_toml({**settings, "peers": self.network.peers(site)}))
        command = [sys.executable, "-m", "nnunet_fed", "peer", str(folder / site)]
        with (folder / f"{site}.log").open("wb") as log:
            return subprocess.Popen([*command, "--site-file", str(folder / f"{site}.toml")], stderr=log)

    def _await(self, happened: Any) -> None:
        end = time.monotonic() + PATIENCE
        for site in self.cases:
            while not happened(site):
                if time.monotonic() > end:
                    sys.exit(f"Error: the peer process of site {site} does not get on.")
                time.sleep(0.02)

    def exchange(self, schedule: Schedule, number: int) -> None:
        """One round: every site posts a model, and all are served."""
        self._counter += 1
        for site, mailbox in self._mailboxes.items():
            mailbox.post(
                run=RUN, version=Version(site, {site: self._counter}, self._counter), training_cases=self.cases[site],
                initial="i", tensors=self._tensors, candidates=schedule.candidates(number, site, self.cases),
            )  # fmt: skip
        self._await(lambda site: (found := self._mailboxes[site].outgoing()) is not None and not found[2])

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
        for process in self._processes:
            process.wait()
        self.network.close()


def measure(peers: Peers, arm: str, rounds: int) -> dict[str, Any]:
    """Bytes sent by each site in all rounds, and what they are to FedAvg's."""
    topology, senders, notes = ARMS[arm]
    schedule = Schedule(topology, 0, senders)
    before = {site: peers.network.sent(site) for site in peers.cases}
    for number in track(range(rounds), description=f"{len(peers.cases)} sites, {arm}"):
        peers.exchange(schedule, number)
    sent = {site: peers.network.sent(site) - before[site] for site in peers.cases}
    drawn = sum(len(schedule.pushes(number, peers.cases)) for number in range(rounds))
    sites = len(peers.cases)
    fedavg = 2 * sites * rounds * peers.size
    return {
        "sites": sites, "topology": arm, "rounds": rounds, "payload": peers.size, "bytes_sent": sent,
        "transfers_per_round": drawn / rounds, "share_of_fedavg": sum(sent.values()) / fedavg,
        "share_drawn": drawn * peers.size / fedavg, "share_in_the_notes": notes[sites],
    }  # fmt: skip


def show(figures: list[dict[str, Any]], console: Console) -> None:
    """Print a row for each number of sites and topology."""
    table = Table(title="Bytes on the wire, as a share of FedAvg's 2 N payloads a round")
    for column in ("sites", "topology", "transfers a round", "measured", "drawn", "notes", "MB sent by a site a round"):
        table.add_column(column, justify="right")
    for found in figures:
        megabytes = [sent / found["rounds"] / 1e6 for sent in found["bytes_sent"].values()]
        shares = [f"{found[f'share_{what}']:.1%}" for what in ("of_fedavg", "drawn", "in_the_notes")]
        spread = f"{sum(megabytes) / len(megabytes):.2f} ({min(megabytes):.2f}, {max(megabytes):.2f})"
        table.add_row(
            str(found["sites"]), found["topology"], f"{found['transfers_per_round']:.2f}", *shares, spread
        )  # fmt: skip
    console.print(table)
    payload = figures[0]["payload"] / 1e6
    console.print(f"A payload has {payload:.2f} MB; a site of FedAvg sends one and receives one in a round.")


def main() -> None:
    """Measure what the JSON file does not have yet, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--parameters", type=int, default=500_000, help="of the model, of 4 bytes each")
    parser.add_argument("--sites", type=int, nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--json", type=Path, help="write the figures there; what it has of the same settings stands")
    arguments = parser.parse_args()
    figures: list[dict[str, Any]] = []
    if arguments.json and arguments.json.is_file():
        figures = [one for one in json.loads(arguments.json.read_text()) if one["rounds"] == arguments.rounds]
    for sites in arguments.sites:
        done = {found["topology"] for found in figures if found["sites"] == sites}
        missing = [arm for arm in ARMS if arm not in done]
        if not missing:
            continue
        with tempfile.TemporaryDirectory(prefix="nnunet_fed_bytes_") as folder:
            peers = Peers(Path(folder), SIZES[sites], arguments.parameters)
            try:
                for arm in missing:
                    figures.append(measure(peers, arm, arguments.rounds))
                    if arguments.json:
                        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
            finally:
                peers.stop()
    show(figures, Console())


if __name__ == "__main__":
    main()
