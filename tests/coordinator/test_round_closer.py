"""Closing alone, on a journal that a test has written: what is due, what is kept, what is cleared."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from desk import Clock
from serving import make_study

from nnunet_fed.coordinator import round_closer as module
from nnunet_fed.coordinator.round_closer import RoundCloser
from nnunet_fed.coordinator.store import Collective, Contribution, Store
from nnunet_fed.exchange.payload import encode, measure
from nnunet_fed.exchange.uploads import Spool


class Journal:
    """A store, and what closes its collectives."""

    def __init__(self, folder: Path, clock: Clock, sites: str = "ab", **study: Any):
        self.clock = clock
        self.store = Store(folder)
        self.closer = RoundCloser(
            make_study(tuple(sites), **study),
            self.store,
            Spool(self.store.spool, 1 << 20),
            threading.Condition(),
            None,
            clock.running,
        )
        self.store.add_run("r", {"purpose": "training"})
        for site in sites:
            self.store.set_standing("r", site, "active")

    def give(self, key: str, **values: float) -> None:
        """Of each site, as if it had arrived."""
        for site, value in values.items():
            payload = b"".join(encode({"w": np.float32([value])}))
            file = f"{key.replace('/', '.')}.{site}"
            (self.store.spool / file).write_bytes(payload)
            if self.store.collective("r", key) is None:
                opened = self.clock.time()
                self.store.put_collective(Collective("r", key, "mean", "open", opened, None, None, None, None, None))
            digest, size = measure([payload])
            self.store.add_contribution(Contribution("r", key, site, 1.0, digest, size, file, 0.0, 0.0, None))

    def at(self, key: str) -> Collective:
        found = self.store.collective("r", key)
        assert found is not None
        return found

    def close(self, key: str) -> str:
        self.closer.close_if_due("r", key)
        return self.at(key).status

    def finish(self) -> None:
        """Let what is under way in the background be over."""
        self.closer.shutdown()


@pytest.fixture
def made(tmp_path: Path, clock: Clock) -> Iterator[Any]:
    journals: list[Journal] = []

    def make(sites: str = "ab", **study: Any) -> Journal:
        journals.append(Journal(tmp_path, clock, sites, **study))
        return journals[-1]

    yield make
    for journal in journals:
        journal.finish()
        journal.store.close()


def test_what_nobody_contributed_to_is_not_due(made: Any) -> None:
    journal = made()
    journal.closer.close_if_due("r", "round-0000/model")
    assert journal.store.collectives("r") == []


def test_it_closes_once_over_those_who_are_frozen_with_it(made: Any) -> None:
    journal = made()
    journal.give("round-0000/model", a=1)
    assert journal.close("round-0000/model") == "open"
    assert journal.closer.missing(journal.at("round-0000/model")) == ["b"]
    journal.give("round-0000/model", b=3)
    assert journal.close("round-0000/model") == "closed"
    assert journal.store.participants("r", "round-0000") == ["a", "b"]
    closed = journal.at("round-0000/model")
    assert journal.close("round-0000/model") == "closed"
    assert journal.at("round-0000/model") == closed
    assert journal.closer.reductions == 1


def test_a_quorum_is_at_most_those_who_are_in_the_scope(made: Any) -> None:
    journal = made("abc", min_sites=2)
    journal.store.freeze("r", "round-0000", ["c"])
    journal.give("round-0000/model", c=5)
    assert journal.close("round-0000/model") == "closed"


def test_what_has_failed_stays_so_until_it_is_opened_again(made: Any, clock: Clock) -> None:
    journal = made("ab", deadline_minutes=1)
    journal.give("round-0000/model", a=1)
    assert journal.close("round-0000/model") == "open"
    clock.now += 61
    assert journal.close("round-0000/model") == "failed"
    journal.give("round-0000/model", b=1)
    assert journal.close("round-0000/model") == "failed"
    journal.closer.reopen(journal.at("round-0000/model"))
    assert journal.closer.left(journal.at("round-0000/model")) == pytest.approx(60, abs=0.1)
    assert journal.close("round-0000/model") == "closed"


def test_old_means_are_pruned_and_the_newest_model_is_not(made: Any) -> None:
    journal = made("a", keep_rounds=2)
    keys = ["start/model", *(f"round-000{number}/model" for number in range(3))]
    keys += [f"cross-site-{site}/deployed" for site in "xy"]
    for key in keys:
        journal.give(key, a=1)
        assert journal.close(key) == "closed"
    journal.finish()
    assert {c.key: c.status for c in journal.store.collectives("r")} == {
        **dict.fromkeys(keys[:3], "pruned"), **dict.fromkeys(keys[3:], "closed"),
    }  # fmt: skip
    assert len(list(journal.store.results.iterdir())) == 3
    assert list(journal.store.spool.iterdir()) == []


def test_a_result_counts_once_it_is_on_the_disk(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, tries = made("a"), list[Path]()

    def full_at_first(path: Path) -> None:
        tries.append(path)
        if len(tries) == 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "make_durable", full_at_first)
    journal.give("round-0000/model", a=1)
    journal.close("round-0000/model")
    collective = journal.at("round-0000/model")
    try:
        journal.closer.wait_until_saved(collective)
    except OSError:
        assert len(list(journal.store.spool.iterdir())) == 1, "what it is made of is needed still"
        journal.closer.wait_until_saved(collective)
    journal.finish()
    assert len(tries) == 2
    assert list(journal.store.spool.iterdir()) == []


def test_a_sweep_spares_what_is_needed_and_what_arrives(made: Any) -> None:
    journal = made()
    journal.give("round-0000/model", a=1)
    spool = journal.store.spool
    (spool / "stray").write_bytes(b"x")
    (spool / "arriving.part").write_bytes(b"x")
    journal.closer.recover(1)
    assert sorted(path.name for path in spool.iterdir()) == ["arriving.part", "round-0000.model.a"]
