"""GCML's lockstep between peers over loopback, without a network to train: what a site takes depends on no clock."""

from __future__ import annotations

import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import make_study

from nnunet_fed.gossip.mailbox import Mailbox, State, described
from nnunet_fed.gossip.schedule import Version
from nnunet_fed.simulation.simulate import free_ports
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.methods.gcml_options import GCML
from nnunet_fed.study.site import Site
from nnunet_fed.trainers.gossip.gossip_session import GossipSession, Standing
from nnunet_fed.trainers.parts.training_record import TrainingRecord
from nnunet_fed.transport.peers.peer import PeerProcess

SITES, EPOCHS, PHASE = "abcd", 8, 2
SCHEMA, SIZE = described({"w": np.zeros(8, np.float32)})
Taken = list[tuple[int, str]]


class PeerThread:
    """A peer process as a training sees it."""

    def __init__(self, site: Site, folder: Path):
        self._process = PeerProcess(site, Mailbox(folder))
        self._thread = threading.Thread(target=self._process.run)
        self._thread.start()

    def exit_status(self) -> None: ...

    def ask_to_end(self) -> bool:
        self._process.stop()
        self._thread.join()
        return False


def train(study: Federation, site: Site, folder: Path, paces: random.Random) -> Taken:
    """A training's rounds, as the trainer has them, but for the network; epoch and letter of what it took."""
    mailbox = folder / "mailbox"
    standing = Standing(Version(site.name, {}, 0), "i")
    state = State("r", standing.version, {}, 1 + SITES.index(site.name), "i", SCHEMA, SIZE, lockstep=True)
    peer: Any = lambda: PeerThread(site, mailbox)  # noqa: E731
    assert isinstance(study.method, GCML)
    here = GossipSession(
        study, study.method, standing, mailbox, TrainingRecord(folder / "federation.json", False), state, peer, False
    )
    taken: Taken = []
    try:
        standing.members = here.await_members()
        for epoch in range(EPOCHS):
            if epoch > 0:
                here.await_senders(epoch)
            if epoch > 0 and (not taken or epoch >= taken[-1][0] + PHASE) and (found := here.next_letter()) is not None:
                letter = found[0].version
                taken.append((epoch, found[0].name))
            time.sleep(paces.uniform(0, 0.1) if paces.random() < 0.7 else 0.5)
            if taken and epoch + 1 == taken[-1][0] + PHASE:
                standing.version = standing.version.influenced_by(letter)
                standing.received[letter.site] = letter.counter
                standing.used[letter.site] = standing.used.get(letter.site, 0) + 1
            standing.version = standing.version.published(epoch + 1)
            here.round_over({"w": np.full(8, epoch, np.float32)})
    finally:
        here.leave()
        here.close()
    events = json.loads((folder / "federation.json").read_text())["events"]
    assert events == [], "no wait has come to its deadline"
    return taken


@pytest.mark.parametrize("topology", ["uniform_push", "derangement"])
def test_in_lockstep_four_sites_take_the_same_models_however_fast_each_is(tmp_path: Path, topology: str) -> None:
    method = {"name": "gcml", "topology": topology, "lockstep": True}
    study = make_study(SITES, method=method, rounds=EPOCHS, deadline_minutes=0.5)

    def run(pace: int) -> list[Taken]:
        addresses = {name: f"127.0.0.1:{port}" for name, port in zip(SITES, free_ports(len(SITES)), strict=True)}
        with ThreadPoolExecutor(len(SITES)) as pool:
            futures = []
            for name in SITES:
                folder = tmp_path / str(pace) / name
                folder.mkdir(parents=True)
                given = {"coordinator": "127.0.0.1:9", "insecure": True, "listen": addresses[name], "peers": addresses}
                site = Site.model_validate({"name": name, **given})
                futures.append(pool.submit(train, study, site, folder, random.Random(f"{name}{pace}")))
            return [future.result() for future in futures]

    first, again = run(1), run(2)
    assert first == again
    assert all(len(taken) >= 2 for taken in first)
