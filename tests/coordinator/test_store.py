"""The journal alone: what is noted is found again, and a transaction is whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nnunet_fed.coordinator.store import Agreed, Collective, Contribution, Store
from nnunet_fed.errors import ConfigurationError


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path)
    yield store
    store.close()


def put(store: Store, key: str, status: str = "closed", run: str = "r", verb: str = "mean", opened: float = 0) -> None:
    with store.transaction():
        store.put_collective(Collective(run, key, verb, status, opened, None, None, None, None, None))


def given(key: str, site: str, file: str | None = None, norm: float | None = None) -> Contribution:
    return Contribution("r", key, site, 1.0, "d", 3, file, 0.0, 0.0, norm)


def test_all_is_there_after_it_is_opened_again(store: Store, tmp_path: Path) -> None:
    with store.transaction():
        store.set_fact("attempt", 3)
        store.add_study({"name": "s"})
        store.add_run("r", {"purpose": "planning"})
        store.add_run("r", {"purpose": "another: the first stands"})
        store.set_standing("r", "a", "absent")
        store.freeze("r", "start", ["a", "b"])
        store.agree("r", "model", Agreed("[]", 7))
        store.add_event("r", "a", "text")
        store.add_contribution(given("start/model", "a", "file"))
    put(store, "start/model")
    store.close()
    store.__init__(tmp_path)  # type: ignore[misc]
    assert (store.fact("attempt"), store.fact("unknown")) == (3, None)
    assert store.latest_study() == {"name": "s"}
    assert store.runs() == {"r": {"purpose": "planning"}}
    assert (store.standing("r"), store.standing("x"), store.latest_standing()) == ({"a": "absent"}, {}, {"a": "absent"})
    assert (store.participants("r", "start"), store.participants("r", "round-0000")) == (["a", "b"], None)
    assert (store.agreed("r", "model"), store.agreed("r", "x")) == (Agreed("[]", 7), None)
    assert [(event["site"], event["text"]) for event in store.events()] == [("a", "text")]
    assert store.contributions("r", "start/model") == {"a": given("start/model", "a", "file")}
    assert store.spooled() == {"file": ("r", "start/model")}
    collective = store.collective("r", "start/model")
    assert collective is not None
    assert (collective.scope, collective.name, collective.status) == ("start", "model", "closed")


def test_a_transaction_that_fails_leaves_nothing(store: Store) -> None:
    def note_and_fail() -> None:
        with store.transaction():
            store.set_fact("attempt", 1)
            store.add_event(None, None, "text")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        note_and_fail()
    assert store.fact("attempt") is None
    assert store.events() == []


def test_rounds_are_counted_by_their_models(store: Store) -> None:
    assert store.count_rounds() == {}
    for number, status in enumerate(("pruned", "closed", "open", "failed", "empty")):
        put(store, f"round-000{number}/model", status)
    put(store, "round-0001/personal")
    put(store, "round-0001/model/more")
    put(store, "start/model")
    put(store, "cross-site-a/deployed")
    put(store, "round-0009/model", verb="gather")
    put(store, "round-12345/model", run="other")
    assert store.count_rounds() == {"r": 2, "other": 1}


def test_collectives_and_contributions_have_their_order(store: Store) -> None:
    for opened, key in ((2.0, "a/x"), (1.0, "b/x"), (3.0, "c/x")):
        put(store, key, "open" if key == "c/x" else "closed", opened=opened)
    assert [c.key for c in store.collectives("r")] == ["b/x", "a/x", "c/x"]
    assert [c.key for c in store.collectives("r", "open")] == ["c/x"]
    for site in "cab":
        store.add_contribution(given("a/x", site))
    assert list(store.contributions("r", "a/x")) == ["a", "b", "c"]


def test_what_is_released_and_withdrawn(store: Store) -> None:
    for site, file in (("a", "f1"), ("b", "f2"), ("c", None)):
        store.add_contribution(given("a/x", site, file, norm=None if site == "c" else 2.0))
    assert store.norms("r", ["a/x"]) == [2.0, 2.0]
    assert store.norms("r", []) == []
    store.withdraw(given("a/x", "b"))
    assert list(store.contributions("r", "a/x")) == ["a", "c"]
    assert store.has_contributed("r", "a")
    assert not store.has_contributed("r", "b")
    assert store.release("r", "a/x") == [store.spool / "f1"]
    assert store.release("r", "a/x") == []
    assert store.spooled() == {}
    assert list(store.contributions("r", "a/x")) == ["a", "c"], "who contributed stays known"


def test_results_of_two_runs_have_two_places(store: Store) -> None:
    places = {store.result_path(run, key) for run in ("r", "r2") for key in ("a/x", "a_x/y", "a/x_y", "a_x_y")}
    assert len(places) == 8
    assert {place.parent for place in places} == {store.results}
    assert len(store.result_path("r", "a/" + 150 * "x").name) < 130


def test_one_coordinator_at_a_time(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunet_fed.coordinator import store as module

    connect = module.sqlite3.connect
    monkeypatch.setattr(module.sqlite3, "connect", lambda path, **how: connect(path, **{**how, "timeout": 0.01}))
    with pytest.raises(ConfigurationError, match=r"cannot be opened.*another --state"):
        Store(tmp_path)
