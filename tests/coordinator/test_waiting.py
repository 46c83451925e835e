"""For whom the others wait, and when they stop: one missed deadline serves for a round, and nobody waits in vain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from desk import Desk
from rich.console import Console

from nnunet_fed.coordinator.watch import status_table

Make = Callable[..., Desk]
STEPS = [f"round-0000/{name}" for name in ("personal", "deviation", "selector-0", "selector", "state", "model")]
"""Of a round, as FedSM's."""


def give_all(at: Desk, key: str, sites: str) -> None:
    for site in sites:
        at.give(site, key, 1)


@pytest.mark.parametrize("dies_before", range(len(STEPS)))
def test_one_missed_deadline_serves_for_the_round(desk: Make, dies_before: int) -> None:
    at = desk("abc", min_sites=2)
    for number, key in enumerate(STEPS):
        give_all(at, key, "abc" if number < dies_before else "ab")
        if number == dies_before:
            assert at.missing(key) == ["c"]
            at.pass_deadline()
        assert at.collective(key).status == "closed"


@pytest.mark.parametrize("says", ["offers again", "joins again", "reports"])
def test_who_missed_a_collective_is_not_waited_for_in_its_round(desk: Make, says: str) -> None:
    """It has to take the round's model once there is one: it could not go on from here whatever it says."""
    at = desk("abc", min_sites=2)
    give_all(at, STEPS[0], "abc")
    give_all(at, STEPS[1], "ab")
    at.pass_deadline()
    assert at.collective(STEPS[1]).status == "closed"
    for key in STEPS[2:]:
        if says == "offers again":
            assert at.give("c", STEPS[1], 1) == "closed"
        elif says == "joins again":
            at.join("c")
        else:
            at.coordinator.report("c", {"phase": "training", "round": 1})
        give_all(at, key, "ab")
        assert at.collective(key).status == "closed", "at once"
    at.give("a", "round-0001/personal", 1)
    assert at.missing("round-0001/personal") == (["b"] if says == "reports" else ["b", "c"])


def test_who_contributes_again_in_its_round_is_waited_for_again(desk: Make) -> None:
    at = desk("abc", min_sites=2)
    give_all(at, STEPS[0], "abc")
    give_all(at, STEPS[1], "ab")
    at.pass_deadline()
    assert at.collective(STEPS[1]).status == "closed"
    give_all(at, STEPS[2], "cab")
    at.give("a", STEPS[3], 1)
    assert at.missing(STEPS[3]) == ["b", "c"]
    at.give("b", STEPS[3], 1)
    at.pass_deadline()
    assert at.collective(STEPS[3]).status == "closed"
    give_all(at, STEPS[4], "ab")
    assert at.collective(STEPS[4]).status == "closed", "it has died again, and that has cost one deadline again"


def test_a_wait_without_hope_ends_at_once_and_all_are_told(desk: Make) -> None:
    at = desk("abc", min_sites=2)
    give_all(at, STEPS[0], "abc")
    at.give("a", STEPS[1], 1)
    at.coordinator.leave(at.run, "b", "maintenance")
    assert at.collective(STEPS[1]).status == "open"
    at.coordinator.leave(at.run, "c", "maintenance")
    failed = at.collective(STEPS[1])
    assert failed.status == "failed"
    assert str(failed.error).startswith(
        "'round-0000/deviation' cannot be closed any more: it needs 2 of 3 sites, and only a can contribute "
        "(b has left, c has left)."
    )
    status = at.coordinator.status()
    assert status["open"] == []
    assert status["failed"] == [{"run": at.run, "key": STEPS[1], "error": failed.error}]
    shown = Console(width=400, record=True)
    shown.print(status_table(status))
    told = shown.export_text()
    assert "cannot be closed any more" in told
    assert "being computed" not in told
    at.join("b")
    assert at.give("a", STEPS[1], 1) == "stands"
    assert at.missing(STEPS[1]) == ["b"], "it goes on once there is somebody to wait for"
    at.give("b", STEPS[1], 3)
    assert at.result(STEPS[1]) == 2
    assert at.coordinator.status()["failed"] == []


def test_who_missed_what_came_before_gives_no_hope(desk: Make) -> None:
    at = desk("abc", min_sites=2)
    give_all(at, STEPS[0], "abc")
    give_all(at, STEPS[1], "ab")
    at.pass_deadline()
    assert at.collective(STEPS[1]).status == "closed"
    at.join("c")
    at.give("a", STEPS[2], 1)
    at.coordinator.leave(at.run, "b", "done")
    assert "only a can contribute (b has left, c missed what came before in this round)" in str(
        at.collective(STEPS[2]).error
    )


def test_an_absent_site_is_waited_for_where_the_quorum_needs_it(desk: Make) -> None:
    """It may come back until the deadline: this is neither work nor hopeless, and it is shown as what it is."""
    at = desk("abc", min_sites=2)
    give_all(at, "round-0000/model", "ab")
    at.pass_deadline()
    assert at.collective("round-0000/model").status == "closed"
    at.coordinator.leave(at.run, "b", "done")
    at.give("a", "round-0001/model", 1)
    assert at.missing("round-0001/model") == ["c"]
    assert at.give("c", "round-0001/model", 3) == "stands"
    assert at.result("round-0001/model") == 2
