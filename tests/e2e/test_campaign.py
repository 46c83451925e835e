"""A consortium's year in a minute: whatever happens to it, its models are those of who took part, bit for bit."""

from __future__ import annotations

import hashlib
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import REPETITIONS, Exchange, Link, exchange
from harness import until

from nnunet_fed.exchange.keys import MODEL, key_of, scope_of_round
from nnunet_fed.exchange.payload import encode, measure
from nnunet_fed.study.site import Site
from nnunet_fed.transport.site.client import GrpcCommunicator

pytestmark = pytest.mark.e2e

ROUNDS, SIZE, DEADLINE = 50, 20_000, 9.0
HOUR = 3600
KEEPALIVE = 2


class Campaign:
    """Everything that happens, at random instants and in any order.

    Site a meets nothing of its own, bb is cut off, ccc is killed, dddd is removed, and eeeee comes later.
    """

    def __init__(self, running: Exchange, seed: int):
        self.running, self.chance = running, random.Random(seed)
        self.link = Link(running.address)
        self.watcher = GrpcCommunicator(Site(name="watcher", coordinator=running.address, insecure=True))
        self.removed_after = ROUNDS
        """Number of the last round that may have dddd."""
        for site in ("a", "bb", "ccc", "dddd"):
            self.start(site)

    def start(self, site: str) -> None:
        address = self.link.address if site == "bb" else None
        self.running.start(site, address, keepalive=KEEPALIVE, checkpoint=True)

    def happened(self) -> dict[str, Any]:
        return self.watcher.status(record=True)

    def closed(self) -> int:
        """How many rounds have closed."""
        collectives = [c for run in self.happened()["runs"].values() for c in run["collectives"]]
        return len([c for c in collectives if c["key"].endswith(MODEL) and c["closed"]])

    def go_on(self, rounds: int) -> None:
        end = self.closed() + rounds
        until(lambda: self.closed() >= end, f"{rounds} more rounds", 60)

    # ----------------------------------------------------------------------------------------------- what happens

    def the_clock_steps_back(self) -> None:
        self.running.set_clock(-HOUR)
        self.go_on(2)

    def the_clock_steps_forward(self) -> None:
        self.running.set_clock(HOUR)
        self.go_on(2)

    def the_coordinator_is_killed(self) -> None:
        self.running.restart()

    def it_is_stopped_for_longer_than_a_keepalive(self) -> None:
        assert self.running.coordinator is not None
        self.go_on(1)  # it serves
        self.running.coordinator.send_signal(signal.SIGSTOP)
        time.sleep(KEEPALIVE + 2)
        self.running.coordinator.send_signal(signal.SIGCONT)

    def a_site_is_killed(self) -> None:
        self.running.kill(self.running.sites["ccc"])
        self.start("ccc")

    def a_site_is_cut_off_for_longer_than_its_deadline(self) -> None:
        self.link.stop()
        until(lambda: self.running.sites["bb"].poll() is not None, "bb gives up", 60)
        assert "does not answer" in (self.running.folder / "bb.log").read_text()
        self.go_on(2)  # without it
        self.link = Link(self.running.address)
        self.start("bb")

    def a_site_is_added(self) -> None:
        self.running.change_sites(sorted({*self.running.study.sites, "eeeee"}))
        self.go_on(2)  # nobody waits for it
        self.start("eeeee")

    def a_site_is_removed(self) -> None:
        self.running.change_sites(sorted({*self.running.study.sites} - {"dddd"}))
        removed = self.running.sites.pop("dddd")
        self.removed_after = self.closed() - 1
        until(lambda: removed.poll() is not None, "dddd is refused", 60)
        assert removed.poll() != 0
        assert "Site 'dddd' is not in the study 'faults'" in (self.running.folder / "dddd.log").read_text()

    def run(self) -> dict[str, Any]:
        faults: list[Callable[[], None]] = [
            self.the_clock_steps_back, self.the_clock_steps_forward, self.the_coordinator_is_killed,
            self.the_coordinator_is_killed, self.it_is_stopped_for_longer_than_a_keepalive, self.a_site_is_killed,
            self.a_site_is_cut_off_for_longer_than_its_deadline, self.a_site_is_added, self.a_site_is_removed,
        ]  # fmt: skip
        self.chance.shuffle(faults)
        self.go_on(1)  # before that, all that are in the study are waited for
        for fault in faults:
            time.sleep(self.chance.uniform(0, 0.8))
            fault()
        assert self.closed() < ROUNDS, "all of it while they train"
        self.running.finish()
        happened = self.happened()
        self.watcher.close()
        self.link.stop()
        return happened


def reference(took_part: list[dict[str, float]]) -> tuple[list[str], list[str]]:
    """What each round's mean is if these sites give these weights: digests of its payload, and of the model in it."""
    model, payloads, models = np.full(SIZE, 0.5, np.float32), [], []
    for number, weights in enumerate(took_part):
        w, b, total = np.zeros(SIZE), np.zeros(3), sum(weights.values())
        for site, weight in sorted(weights.items()):
            noise = np.random.default_rng([number, *site.encode()]).normal(size=SIZE).astype(np.float32)
            update = model + noise
            w += weight * update.astype(np.float64)
            b += weight * (update[:3] * 2).astype(np.float64)
        model = (w / total).astype(np.float32)
        payloads.append(measure(encode({"w": model, "b": (b / total).astype(np.float32)}))[0])
        models.append(f"{number} {hashlib.sha256(model.tobytes()).hexdigest()}")
    return payloads, models


@pytest.mark.parametrize("repetition", range(REPETITIONS))
def test_models_are_those_of_who_took_part_whatever_happens(tmp_path: Path, repetition: int) -> None:
    study: dict[str, Any] = {"rounds": ROUNDS, "min_sites": 1, "deadline_minutes": DEADLINE / 60, "keep_rounds": 2}
    with exchange(tmp_path / "run", ("a", "bb", "ccc", "dddd"), size=SIZE, pause=0.3, **study) as running:
        campaign = Campaign(running, repetition)
        happened = campaign.run()
    (run,) = happened["runs"].values()
    rounds = {c["key"]: c for c in run["collectives"] if c["key"].endswith(MODEL)}
    assert list(rounds) == [key_of(scope_of_round(number), MODEL) for number in range(ROUNDS)], "in this order"
    took_part = [{site: given["weight"] for site, given in c["sites"].items()} for c in rounds.values()]
    payloads, models = reference(took_part)
    assert [c["digest"] for c in rounds.values()] == payloads
    for site in running.sites:
        printed = running.results(site).read_text().splitlines()
        assert set(printed) <= set(models), "every model that a site has had"
        assert printed[-1] == models[-1]
    assert [c["status"] for c in rounds.values()] == ["pruned"] * (ROUNDS - 2) + ["closed"] * 2
    with_removed = [number for number, sites in enumerate(took_part) if "dddd" in sites]
    assert max(with_removed) <= campaign.removed_after
    assert set(took_part[-1]) == {"a", "bb", "ccc", "eeeee"}
    absent = {event["site"] for event in happened["events"] if event["text"].startswith("absent")}
    assert "bb" in absent
    assert absent <= {"bb", "ccc"}, "who was cut off, perhaps who was killed, and nobody else"
