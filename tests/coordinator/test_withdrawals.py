"""A site withdraws what it has told wrongly while planning: who may, until when, what is void, what is recorded."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from desk import Desk

from nnunet_fed.coordinator.round_closer import RoundCloser
from nnunet_fed.coordinator.store import Store
from nnunet_fed.coordinator.withdrawals import MOST
from nnunet_fed.errors import RefusedError, WithdrawnError
from nnunet_fed.exchange.keys import PLANS, PUBLISHED

Make = Callable[..., Desk]
DATASET, COUNTS = "planning/dataset", "planning/counts"


class KilledError(Exception):
    """Stands for kill -9: nothing after it is done."""


@pytest.fixture
def planning(desk: Make) -> Desk:
    """Sites a and b have told of their data sets, and only b has given a sum."""
    at = desk("ab", purpose="planning")
    at.tell_value("a", DATASET, 1)
    at.tell_value("b", DATASET, 7)
    at.give("b", COUNTS, {"value": np.arange(3)}, verb="sum")
    assert at.collective(DATASET).status == "closed"
    while len(at.spooled()) > 1:  # what was given to the gather goes in the background
        time.sleep(0.01)
    return at


def withdraw(at: Desk, site: str = "b", value: Any = 2, key: str = DATASET) -> None:
    at.correcting = {site}
    with pytest.raises(WithdrawnError, match=f"Site '{site}' has withdrawn .* all sites plan again .* run it again"):
        at.tell_value(site, key, value)
    at.correcting = set()
    at.join("a", "b", purpose="planning")


def test_a_site_withdraws_and_all_plan_anew(planning: Desk) -> None:
    old = planning.run
    planning.correcting = {"b"}
    with pytest.raises(WithdrawnError, match="Site 'b' has withdrawn"):
        planning.tell_value("b", DATASET, 2)
    for call in (
        lambda: planning.tell_value("a", DATASET, 1),
        lambda: planning.coordinator.wait(old, COUNTS, 0),
        lambda: planning.coordinator.newest(old, "x"),
    ):
        with pytest.raises(WithdrawnError, match="Site 'b' has withdrawn"):
            call()
    assert planning.spooled() == []
    assert list((planning.folder / "results").iterdir()) == [], "what was told is not kept, whoever told it"
    assert planning.join("a", "b", purpose="planning") == f"{old}.1" == planning.coordinator.planning_run()
    assert planning.coordinator.wait(planning.run, DATASET, 0) is None, "it begins with nothing"
    planning.tell_value("a", DATASET, 1)
    assert planning.missing(DATASET) == ["b"]
    planning.tell_value("b", DATASET, 2)
    assert planning.coordinator.result_file(planning.collective(DATASET)).read_bytes() == b'{"a": 1, "b": 2}'


def test_who_waits_hears_of_it_at_once(planning: Desk) -> None:
    planning.give("a", "planning/more", {"value": np.arange(3)}, verb="sum")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(planning.coordinator.wait, planning.run, "planning/more", 60)
        withdraw(planning)
        assert isinstance(waiting.exception(10), WithdrawnError)


def test_the_record_tells_who_when_and_why(planning: Desk) -> None:
    old = planning.run
    withdraw(planning)
    status = planning.coordinator.status(record=True)
    before, after = status["runs"].values()
    assert [(c["key"], c["status"], list(c["sites"])) for c in before["collectives"]] == [
        (DATASET, "pruned", ["a", "b"]), (COUNTS, "failed", ["b"]),
    ]  # fmt: skip
    assert (after["withdrawn_by"], after["goes_on_after"], after["collectives"]) == ("b", old, [])
    assert status["undone"] == {old: f"{old}.1"}
    assert status["failed"] == status["open"] == [], "nobody has to do anything about what is void"
    [event] = [event for event in status["events"] if "withdrew" in event["text"]]
    assert (event["site"], event["run"], event["at"] > 0) == ("b", f"{old}.1", True)
    assert f"its values for '{DATASET}' are others now (1 of {MOST}" in event["text"]


def test_the_same_again_withdraws_nothing(planning: Desk) -> None:
    """A site that was killed gives the same command again."""
    old = planning.run
    withdraw(planning)
    planning.correcting = {"b"}
    assert planning.tell_value("b", DATASET, 2) == "stands"
    planning.tell_value("a", DATASET, 1)
    assert planning.tell_value("b", DATASET, 2) == "stands"
    assert planning.coordinator.planning_run() == f"{old}.1"
    withdraw(planning, value=3)
    assert planning.run == f"{old}.2", "its values differ again"


def test_a_site_withdraws_what_itself_told_and_says_so(planning: Desk) -> None:
    old = planning.run
    assert planning.tell_value("b", DATASET, 2) == "differs", "not without being asked to"
    planning.correcting = {"a"}
    assert planning.tell_value("a", DATASET, 1) == "stands"
    planning.give("a", COUNTS, {"value": np.arange(3) + 5}, verb="sum")
    assert planning.coordinator.planning_run() == old


def test_once_the_plans_are_agreed_only_a_new_attempt_helps(planning: Desk) -> None:
    for site in "ab":
        planning.tell_value(site, PLANS, "digest")
    planning.tell_value("a", PUBLISHED, "plans")
    withdraw(planning)
    for key in (DATASET, PLANS, PUBLISHED):
        for site in "ab":
            planning.tell_value(site, key, 5)
    planning.correcting = {"b"}
    with pytest.raises(
        RefusedError, match=r"Site 'b' cannot withdraw.*plans are agreed.*new attempt.*new-attempt"
    ) as e:
        planning.tell_value("b", DATASET, 6)
    assert not isinstance(e.value, WithdrawnError)
    assert planning.collective(PUBLISHED).status == "closed"
    planning.correcting = set()
    planning.close()
    planning.new_attempt()
    planning.open()
    planning.join("a", "b", purpose="planning")
    assert planning.tell_value("b", DATASET, 6) == "stands"


def test_plans_that_are_just_being_agreed(planning: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either the withdrawal comes first, or the plans are agreed; no site gets plans that are void."""
    reduce, is_reducing, go_on = RoundCloser._reduce, threading.Event(), threading.Event()

    def slowly(closer: RoundCloser, *arguments: Any) -> None:
        is_reducing.set()
        assert go_on.wait(20)
        reduce(closer, *arguments)

    planning.tell_value("a", PUBLISHED, 1)
    monkeypatch.setattr(RoundCloser, "_reduce", slowly)
    with ThreadPoolExecutor(2) as pool:
        closing = pool.submit(planning.tell_value, "b", PUBLISHED, None)
        assert is_reducing.wait(20)
        planning.correcting = {"a"}
        withdrawing = pool.submit(planning.tell_value, "a", DATASET, 5)
        with pytest.raises(TimeoutError):
            withdrawing.result(0.3)
        go_on.set()
        assert closing.result(20) == "stands"
        with pytest.raises(RefusedError, match="plans are agreed"):
            withdrawing.result(20)


def test_nobody_lets_the_others_plan_for_ever(planning: Desk) -> None:
    first = planning.run
    for number in range(MOST):
        planning.tell_value("b", DATASET, number)
        withdraw(planning, value=100 + number)
    planning.tell_value("b", DATASET, 100)
    planning.correcting = {"b"}
    with pytest.raises(RefusedError, match=rf"Site 'b' has withdrawn what it told {MOST} times.*new-attempt"):
        planning.tell_value("b", DATASET, 101)
    assert planning.coordinator.planning_run() == f"{first}.{MOST}"
    assert sum("withdrew" in text for text in planning.events("b")) == MOST
    planning.tell_value("a", DATASET, 1)
    withdraw(planning, "a", 2)
    planning.close()
    planning.new_attempt()
    planning.open()
    planning.join("a", "b", purpose="planning")
    planning.tell_value("b", DATASET, 1)
    withdraw(planning)


def test_a_training_withdraws_nothing(desk: Make) -> None:
    at = desk("ab")
    at.correcting = {"a"}
    at.give("a", "round-0000/model", 1)
    assert at.give("a", "round-0000/model", 2) == "differs"
    assert at.coordinator.generation(at.run) == 0


def test_version_0_1_plans_anew(planning: Desk) -> None:
    withdraw(planning)
    assert planning.join("a", purpose="planning", can_go_back=False) == planning.run


def test_who_came_into_the_study_meanwhile_plans_with_the_others(planning: Desk) -> None:
    planning.close()
    planning.open(sites=tuple("abc"))
    assert planning.tell_value("b", DATASET, 7) == "stands"
    planning.join("c", purpose="planning")
    assert planning.tell_value("c", DATASET, 1) == "closed", "it is not expected in what is under way"
    withdraw(planning)
    planning.tell_value("a", DATASET, 1)
    assert planning.missing(DATASET) == ["b", "c"]


@pytest.mark.parametrize(
    ("owner", "function", "calls", "is_done"),
    [
        (Store, "add_run", 1, False),
        (Store, "add_event", 1, False),
        (RoundCloser, "clear_withdrawn", 1, True),
        (Path, "unlink", 1, True),
        (Store, "put_collective", 1, True),
        (Store, "release_run", 1, True),
        (Path, "unlink", 2, True),
    ],
)
def test_a_coordinator_that_is_killed_anywhere(
    planning: Desk, monkeypatch: pytest.MonkeyPatch, owner: type, function: str, calls: int, is_done: bool
) -> None:
    old, made = planning.run, getattr(owner, function)
    left = [calls]

    def dies(*arguments: Any, **options: Any) -> Any:
        left[0] -= threading.current_thread() is threading.main_thread()
        if left[0] == 0:
            raise KilledError
        return made(*arguments, **options)

    planning.correcting = {"b"}
    with monkeypatch.context() as patch:
        patch.setattr(owner, function, dies)
        with pytest.raises(KilledError):
            planning.tell_value("b", DATASET, 2)
        assert left == [0]
    planning.close()
    planning.open()
    assert (planning.coordinator.planning_run() == f"{old}.1") is is_done
    with pytest.raises(WithdrawnError, match="Site 'b' has withdrawn"):
        planning.tell_value("b", DATASET, 2)  # the site tries again until it is answered
    assert planning.coordinator.planning_run() == f"{old}.1", "once, whatever happens"
    assert sum("withdrew" in text for text in planning.events("b")) == 1
    assert planning.spooled() == list((planning.folder / "results").iterdir()) == []


def test_a_restart_goes_on_with_the_planning_that_began_anew(planning: Desk) -> None:
    withdraw(planning)
    planning.tell_value("a", DATASET, 1)
    run = planning.run
    planning.close()
    planning.open()
    assert planning.coordinator.planning_run() == run == planning.join("b", purpose="planning")
    planning.tell_value("b", DATASET, 2)
    assert planning.collective(DATASET).status == "closed"
    assert planning.coordinator.generation(run) == 1
