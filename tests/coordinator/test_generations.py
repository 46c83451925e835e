"""Rounds that are undone: what stands, what is void, who is refused, and what the record tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from desk import Desk

from nnunet_fed.coordinator.generations import Model, rewind
from nnunet_fed.coordinator.store import Store
from nnunet_fed.errors import ConfigurationError, RefusedError
from nnunet_fed.exchange.keys import key_of, scope_of_round

Make = Callable[..., Desk]


def model(number: int) -> str:
    return key_of(scope_of_round(number), "model")


def trained(desk: Make, rounds: int, **study: Any) -> Desk:
    at = desk("ab", rounds=20, **study)
    at.all_give("start/model", {"a": 0, "b": 0})
    for number in range(rounds):
        at.all_give(model(number), {"a": number, "b": number + 1})
    return at


def undo(at: Desk, wanted: str, run: str | None = None) -> Model:
    at.close()
    store = Store(at.folder)
    gone_back = rewind(store, wanted, run)
    store.close()
    at.open()
    return gone_back


def test_a_training_goes_on_from_an_earlier_model(desk: Make) -> None:
    at = trained(desk, 4)
    old = at.run
    at.give("a", model(4), 666)
    assert undo(at, "2") == (f"{old}.1", "round-0002")
    assert at.spooled() == [], "what was given to the open round is gone"
    with pytest.raises(RefusedError, match=r"went back to the model of round-0002.*with --c"):
        at.give("b", model(4), 4)
    with pytest.raises(RefusedError, match="went back"):
        at.coordinator.wait(old, model(4), 0)
    with pytest.raises(RefusedError, match="went back"):
        at.coordinator.newest(old, "model")
    assert at.join("a", "b") == f"{old}.1"
    assert at.coordinator.newest(at.run, "model") == model(2)
    assert at.result(model(2)) == [2.5]
    at.held.clear()
    assert at.all_give(model(3), {"a": 30, "b": 40}) == [35]
    assert at.coordinator.newest(at.run, "model") == model(3)


def test_all_who_were_there_are_waited_for(desk: Make) -> None:
    at = trained(desk, 2, min_sites=1)
    at.coordinator.leave(at.run, "b", "finished")
    undo(at, "round-0000")
    at.held.clear()
    at.join("a")
    at.give("a", model(1), 1)
    assert at.missing(model(1)) == ["b"]


def test_the_record_keeps_what_was_undone(desk: Make) -> None:
    at = trained(desk, 3)
    old = at.run
    undo(at, "1")
    status = at.coordinator.status(record=True)
    assert status["undone"] == {old: f"{old}.1"}
    before, after = status["runs"].values()
    assert [c["key"] for c in before["collectives"]] == ["start/model", model(0), model(1), model(2)]
    assert after["collectives"] == before["collectives"][:3]
    assert (after["goes_on_from"], after["goes_on_after"]) == ("round-0001", old)
    assert any("undone by 'nnunet_fed rewind'" in text for text in at.events())


def test_undone_twice_and_undone_again(desk: Make) -> None:
    at = trained(desk, 3, keep_rounds=5)
    old = at.run
    undo(at, "0")
    at.join("a", "b")
    at.held.clear()
    at.all_give(model(1), {"a": 10, "b": 10})
    assert undo(at, "start").run == f"{old}.2"
    assert undo(at, "2", run=old) == (f"{old}.3", "round-0002"), "what was undone by mistake can be had again"
    at.join("a", "b")
    assert at.result(model(2)) == [2.5]
    assert at.coordinator.status()["undone"].keys() == {old, f"{old}.1", f"{old}.2"}


@pytest.mark.parametrize("wanted", ["0", "round-0000", "7", "begin", "../x"])
def test_a_model_that_is_not_kept(desk: Make, wanted: str) -> None:
    at = trained(desk, 6)
    at.close()
    store = Store(at.folder)
    with pytest.raises(ConfigurationError, match=r"not kept; those of round-0003, round-0004, round-0005 are"):
        rewind(store, wanted)
    store.close()
    at.open()


def test_a_model_whose_file_is_damaged(desk: Make) -> None:
    at = trained(desk, 2)
    at.coordinator.result_file(at.collective(model(0))).write_bytes(b"damaged")
    at.close()
    store = Store(at.folder)
    with pytest.raises(ConfigurationError, match="damaged"):
        rewind(store, "0")
    store.close()
    at.open()


def test_older_models_are_kept_for_good(desk: Make) -> None:
    at = trained(desk, 9, keep_every=4, keep_rounds=2)
    at.coordinator.close()
    kept = [int(path.name[6:10]) for path in (at.folder / "results").glob("round-*")]
    assert sorted(kept) == [3, 7, 8]
    at.open()
    assert undo(at, "3").scope == "round-0003"


def test_which_training_is_said_if_there_are_several(desk: Make) -> None:
    at = trained(desk, 1)
    first = at.run
    other = at.join("a", "b", configuration="2d")
    at.held.clear()
    at.all_give(model(0), {"a": 1, "b": 1})
    at.close()
    store = Store(at.folder)
    with pytest.raises(ConfigurationError, match=f"Say with --run.*{first}, {other}"):
        rewind(store, "0")
    with pytest.raises(ConfigurationError, match="no run 'x'"):
        rewind(store, "0", "x")
    assert rewind(store, "0", other).run == f"{other}.1"
    store.close()
    at.open()
    assert at.coordinator.newest(first, "model") == model(0), "the other one goes on as it was"


def test_without_a_training(desk: Make) -> None:
    at = desk("ab", purpose="planning")
    at.close()
    store = Store(at.folder)
    with pytest.raises(ConfigurationError, match="No training has begun"):
        rewind(store, "0")
    store.close()
    at.open()


def test_a_version_that_cannot_go_back_is_refused(desk: Make) -> None:
    at = trained(desk, 2)
    undo(at, "0")
    with pytest.raises(RefusedError, match="version of nnunet_fed at site 'a' does not know"):
        at.join("a", can_go_back=False)
    assert at.coordinator.status()["sites"]["a"]["standing"] == "active"
