"""A coordinator that was restored from a back-up: sites ahead of it go on if they agree, or go back."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
from desk import Desk

from nnunet_fed.errors import NotYetError, RefusedError
from nnunet_fed.exchange.communicator import Held
from nnunet_fed.exchange.keys import key_of, scope_of_round

Make = Callable[..., Desk]


def model(number: int) -> str:
    return key_of(scope_of_round(number), "model")


def ahead(desk: Make, sites: str = "ab", known: int = 2, closed: int = 5, **study: int) -> Desk:
    """A coordinator that knows so many rounds of those that have closed; the sites hold the last one."""
    at = desk(sites, rounds=20, **study)
    for number in range(closed):
        if number == known:
            back_up(at)
        at.all_give(model(number), dict.fromkeys(sites, number))
    restore(at)
    return at


def back_up(at: Desk) -> None:
    at.close()
    shutil.copytree(at.folder, at.folder.with_name("back-up"))
    at.open()


def restore(at: Desk) -> None:
    at.close()
    shutil.rmtree(at.folder)
    shutil.copytree(at.folder.with_name("back-up"), at.folder)
    at.open()


def test_sites_that_agree_go_on(desk: Make) -> None:
    at = ahead(desk)
    with pytest.raises(NotYetError, match=f"restored from a back-up and does not know {model(4)}.*until b tell"):
        at.give("a", model(5), 5)
    at.give("b", model(5), 7)
    at.give("a", model(5), 5)
    assert at.result(model(5)) == [6]
    assert any(f"agree on {model(4)}" in text for text in at.events())
    assert at.coordinator.newest(at.run, "model") == model(5)


def test_a_site_that_was_behind_takes_their_next_model(desk: Make) -> None:
    at = ahead(desk, "abc", min_sites=2)
    at.coordinator.leave(at.run, "c", "gone")
    for site in "aba":
        try:
            at.give(site, model(5), 5)
        except NotYetError:
            assert site == "a"
    at.join("c")
    at.held["c"] = Held(model(1), at.collective(model(1)).digest or "")
    assert at.give("c", model(2), 666) == "closed"
    assert at.coordinator.newest(at.run, "model") == model(5)


def test_sites_that_do_not_agree_go_back(desk: Make) -> None:
    at = ahead(desk)
    old = at.run
    at.held["b"] = Held(model(3), "0" * 32)
    with pytest.raises(NotYetError):
        at.give("a", model(5), 5)
    with pytest.raises(RefusedError, match="went back to the model of round-0001.*--c"):
        at.give("b", model(4), 5)
    with pytest.raises(RefusedError, match="went back to the model of round-0001"):
        at.give("a", model(5), 5)
    assert at.join("a", "b") == f"{old}.1"
    assert at.coordinator.generation(at.run) == 1
    assert at.coordinator.standing(at.run, "a", at.held["a"]) == "ahead"
    at.held.clear()
    assert at.all_give(model(2), {"a": 20, "b": 30}) == [25]


def test_one_site_alone_brings_nobody_back(desk: Make) -> None:
    """It may hold what it likes: those whose model is known go on."""
    at = desk("abc", rounds=20)
    for number in range(3):
        at.all_give(model(number), dict.fromkeys("abc", number))
    at.held["c"] = Held(model(9), "f" * 32)
    at.close()
    at.open()
    with pytest.raises(NotYetError):
        at.give("c", model(3), 666)
    at.give("a", model(3), 3)
    with pytest.raises(RefusedError, match="Site 'c' holds a round-0009/model that is not the federation's.*--c"):
        at.give("c", model(3), 666)
    assert at.coordinator.standing(at.run, "c", at.held["c"]) == "other", "with --c it goes back"
    at.give("b", model(3), 3)
    at.held["c"] = at.held["a"]
    at.give("c", model(3), 6)
    assert at.result(model(3)) == [4]
    assert at.coordinator.generation(at.run) == 0


def test_another_model_of_a_round_that_is_known(desk: Make) -> None:
    at = desk("ab", rounds=20)
    at.all_give(model(0), {"a": 0, "b": 1})
    at.held["a"] = Held(model(0), "f" * 32)
    with pytest.raises(RefusedError, match="Site 'a' holds a round-0000/model that is not the federation's"):
        at.give("a", model(1), 1)


def test_who_is_away_is_waited_for_until_the_deadline(desk: Make) -> None:
    at = ahead(desk, "abc", min_sites=2)
    for site in "ab":
        with pytest.raises(NotYetError, match="until"):
            at.give(site, model(5), 5)
    at.pass_deadline()
    at.give("a", model(5), 4)
    at.give("b", model(5), 6)
    at.pass_deadline()
    assert at.result(model(5)) == [5]


def test_too_few_sites_decide_nothing(desk: Make) -> None:
    at = ahead(desk)
    at.pass_deadline()
    for _ in range(2):
        with pytest.raises(NotYetError):
            at.give("a", model(5), 5)
        at.pass_deadline()


def test_nothing_to_go_back_to(desk: Make) -> None:
    at = ahead(desk, known=0)
    at.held["b"] = Held(model(3), "0" * 32)
    with pytest.raises(NotYetError):
        at.give("a", model(5), 5)
    with pytest.raises(RefusedError, match="holds no model of this training.*new-attempt"):
        at.give("b", model(4), 5)


@pytest.mark.parametrize("held", [Held("x", "0" * 32), Held("round-0000/other", "0" * 32), Held(model(0), "x")])
def test_what_no_site_can_hold(desk: Make, held: Held) -> None:
    at = desk("ab")
    at.held["a"] = held
    with pytest.raises(RefusedError, match="cannot name a model"):
        at.give("a", model(0), 1)


def test_an_open_round_of_the_back_up_is_over(desk: Make) -> None:
    at = desk("ab", rounds=20)
    at.all_give(model(0), {"a": 0, "b": 0})
    at.give("a", model(1), 1)
    back_up(at)
    at.all_give(model(1), {"a": 1, "b": 1})
    restore(at)
    with pytest.raises(NotYetError):
        at.give("a", model(2), 2)
    at.give("b", model(2), 2)
    at.give("a", model(2), 2)
    assert at.result(model(2)) == [2]
    assert at.collective(model(1)).status == "pruned"
    at.close()
    assert at.spooled() == []
    at.open()
