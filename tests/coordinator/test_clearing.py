"""What is not needed any more does not stay: after a full disk, after an attempt that was given up, after rounds."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from desk import Desk

from nnunet_fed.coordinator import round_closer
from nnunet_fed.coordinator.store import Store
from nnunet_fed.errors import RefusedError
from nnunet_fed.exchange.payload import encode

Make = Callable[..., Desk]
R0, R1 = "round-0000/model", "round-0001/model"


def within(seconds: float, happened: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def round_of(at: Desk, number: int) -> None:
    """As FedSM's: sums, gathered values and means."""
    scope = f"round-{number:04d}"
    for site in "ab":
        at.give(site, f"{scope}/personal", 1)
        at.give(site, f"{scope}/deviation", {"value": np.float64([1])}, verb="sum")
        at.upload(site, f"{scope}/selector", b'"x"', verb="gather")
        at.give(site, f"{scope}/model", 1)
    for name in ("personal", "deviation", "selector", "model"):
        assert at.collective(f"{scope}/{name}").status == "closed"


def settled(at: Desk) -> bool:
    return within(5, lambda: at.spooled() == [])


@pytest.mark.parametrize("full", ["result", "journal"])
def test_a_disk_that_was_full_while_a_round_was_cleared_leaks_nothing(
    desk: Make, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    monkeypatch.setattr(round_closer, "NOTE_SECONDS", 0.05)
    at = desk("ab")
    store, is_full = at.coordinator._store, [True]
    release, make_durable = store.release, round_closer.make_durable

    def released(run: str, key: str) -> list[Path]:
        if full == "journal" and is_full[0]:
            raise sqlite3.OperationalError("database or disk is full")
        return release(run, key)

    def durable(path: Path) -> None:
        if full == "result" and is_full[0]:
            raise OSError(28, "No space left on device")
        make_durable(path)

    monkeypatch.setattr(store, "release", released)
    monkeypatch.setattr(round_closer, "make_durable", durable)
    for site in "ab":
        at.give(site, R0, 1)
    assert at.collective(R0).status == "closed"
    time.sleep(0.2)
    assert len(at.spooled()) == 2
    is_full[0] = False
    assert settled(at), "without a restart"


def test_files_that_could_not_be_deleted_are_tried_again(desk: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_closer, "NOTE_SECONDS", 0.05)
    at, broken, unlink = desk("ab"), [True], Path.unlink

    def breaks(path: Path, missing_ok: bool = False) -> None:
        if broken[0] and path.parent.name == "spool" and path.suffix != ".part":
            raise OSError(30, "Read-only file system")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", breaks)
    for site in "ab":
        at.give(site, R0, 1)
    assert at.collective(R0).status == "closed"
    time.sleep(0.2)
    assert len(at.spooled()) == 2
    broken[0] = False
    assert settled(at)


def test_what_was_pruned_before_it_was_cleared_is_cleared_by_a_restart(
    desk: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = desk("ab", keep_rounds=2)
    settle = at.coordinator._round_closer._settle

    def full_in_the_first_round(collective: Any, save: Callable[[], None]) -> None:
        if collective.scope != "round-0000":
            settle(collective, save)

    monkeypatch.setattr(at.coordinator._round_closer, "_settle", full_in_the_first_round)
    for number in range(4):
        round_of(at, number)
    at.close()
    assert len(at.spooled()) == 8
    at.open()
    assert at.collective("round-0000/personal").status == "pruned"
    assert settled(at)


def test_an_attempt_that_was_given_up_leaves_its_record_only(desk: Make) -> None:
    at = desk("ab")
    round_of(at, 0)
    at.give("a", R1, 1)
    at.upload("b", R1, b"".join(encode({"w": np.float32([2])})), arrives=b"part")
    at.close()
    assert len(at.spooled()) == 2
    assert list((at.folder / "results").iterdir())
    at.new_attempt()
    at.open()
    assert at.spooled() == []
    assert list((at.folder / "results").iterdir()) == []
    status = at.coordinator.status(record=True)
    assert (status["open"], status["failed"]) == ([], []), "no alarm stays"
    (run,) = status["runs"].values()
    assert [c["key"] for c in run["collectives"]][-1] == R1
    error = at.collective(R1).error
    assert error == "Attempt 1 was given up, and attempt 2 is open. Start this training without --c."
    for ask in (lambda: at.give("a", R1, 1), lambda: at.coordinator.newest(at.run, "model")):
        with pytest.raises(RefusedError, match="Attempt 1 was given up"):
            ask()
    at.join("a", "b", fresh=True)
    round_of(at, 0)


def test_a_result_that_is_pruned_before_it_was_saved_holds_nothing_back(
    desk: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is slower than the rounds: nobody has asked for that result."""
    at, make_durable, may_save = desk("ab", keep_rounds=2), round_closer.make_durable, threading.Event()

    def slow(path: Path) -> None:
        may_save.wait(5)
        make_durable(path)

    monkeypatch.setattr(round_closer, "make_durable", slow)
    for number in range(5):
        round_of(at, number)
    may_save.set()
    assert settled(at)


def test_sums_and_gathered_values_of_old_rounds_are_not_kept(desk: Make) -> None:
    at = desk("ab", keep_rounds=2)
    for site in "ab":
        at.give(site, "mine/calibration", {"value": np.int64([1])}, verb="sum")
        at.upload(site, "start/agreement", b"1", verb="gather")
    assert at.collective("mine/calibration").status == at.collective("start/agreement").status == "closed"
    for number in range(5):
        round_of(at, number)
    assert settled(at)
    (run,) = at.coordinator.status(record=True)["runs"].values()
    kept = {c["key"] for c in run["collectives"] if c["status"] == "closed"}
    names = ("personal", "deviation", "selector", "model")
    rounds = {f"round-000{number}/{name}" for number in (3, 4) for name in names}
    assert kept == rounds | {"mine/calibration", "start/agreement"}, "a late site may want these"
    assert len(list((at.folder / "results").iterdir())) == len(kept)
    assert at.coordinator.tally().rounds == {at.run: 5}


def test_what_one_site_began_goes_with_its_round(desk: Make) -> None:
    at = desk("abc", min_sites=2)
    for site in "abc":
        at.give(site, R0, 1)
    at.give("c", "round-0000/mine", 1)
    at.give("c", "round-0001/mine", 1)
    assert at.collective(R0).status == "closed"
    assert at.missing("round-0000/mine") == ["a", "b"]
    for site in "abc":
        at.give(site, R1, 1)
    assert at.collective(R1).status == "closed"
    assert [waits["key"] for waits in at.coordinator.status()["open"]] == ["round-0001/mine"]
    assert at.give("c", "round-0000/mine", 1) == "stands"
    assert at.give("a", "round-0000/mine", 1) == "closed"
    assert at.collective("round-0000/mine").status == "pruned"
    assert within(5, lambda: len(at.spooled()) == 1)
    at.pass_deadline()
    assert {site: told["standing"] for site, told in at.coordinator.status()["sites"].items()} == dict.fromkeys(
        "abc", "active"
    )


def test_no_question_of_a_round_looks_at_all_past_rounds(desk: Make) -> None:
    """How much the journal reads for a call does not grow with the rounds: counted in SQLite's own steps."""
    at = desk("ab", rounds=100, max_update_norm=1e6, keep_rounds=2)
    store = at.coordinator._store

    @contextmanager
    def counted(steps: list[int]) -> Any:
        store._journal.set_progress_handler(lambda: steps.append(1) and None, 100)
        try:
            yield
        finally:
            store._journal.set_progress_handler(None, 0)

    def cost(first: int) -> int:
        steps: list[int] = []
        with counted(steps):
            for number in range(first, first + 3):
                round_of(at, number)
                at.coordinator.status()
                at.coordinator.newest(at.run, "model")
                assert settled(at)
        return len(steps)

    for number in range(5):
        round_of(at, number)
    early = cost(5)
    for number in range(8, 48):
        round_of(at, number)
    assert cost(48) < 1.2 * early


def test_a_journal_without_indexes_gets_them(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.transaction():
        for name in ("collective_by_status", "collective_by_name", "contribution_with_file"):
            store._journal.execute(f"DROP INDEX {name}")
        for name in ("ballot", "turned_down"):
            store._journal.execute(f"DROP TABLE {name}")
    store.close()
    again = Store(tmp_path)
    assert again.newest_means("r", "model", 1) == []
    assert again.turned_down("r", "k", "a") is None
    again.close()
