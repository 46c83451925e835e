"""What one site alone can begin, fix and fill: nothing that the others need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from desk import Desk

from nnunet_fed.coordinator.ballots import agrees, can_win, elected
from nnunet_fed.coordinator.store import Ballot
from nnunet_fed.errors import NoRoomError, NotYetError, RefusedError
from nnunet_fed.exchange.payload import encode
from nnunet_fed.exchange.uploads import INTERRUPTED

Make = Callable[..., Desk]
R0, R1 = "round-0000/model", "round-0001/model"
X, Y = {"w": np.float32([1, 2])}, {"w": np.float32([[1]])}


def own_trainer(at: Desk, *sites: str) -> None:
    """Into a run of the method's own trainer, whose scopes are declared."""
    at.join(*sites, trainer=at.study.method.own_trainer())


def may_begin(at: Desk, key: str, site: str = "a") -> bool:
    payload = b"".join(encode({"w": np.float32([1])}))
    try:
        return at.coordinator.ask(at.offer_of(site, key, payload)) == "send"
    except RefusedError as error:
        if "cannot begin: a training has the scopes of its method" not in str(error):
            raise
        return False


def close(at: Desk, key: str, sites: str = "ab") -> None:
    for site in sites:
        at.give(site, key, 1)
    assert at.collective(key).status == "closed"


# --------------------------------------------------------------------------------------------------------------- scopes


def test_a_site_alone_makes_no_later_round_the_newest(desk: Make) -> None:
    at = desk("abc", min_sites=1)
    close(at, R0, "abc")
    for key in ("round-9999/model", "round-0020/model", "round-9/model", "round-00001/model"):
        with pytest.raises(RefusedError, match="cannot begin"):
            at.give("c", key, 9)
    with pytest.raises(NotYetError, match="no collective of 'round-0001' has closed here.*a, b did not"):
        at.give("c", "round-0002/model", 9)
    at.pass_deadline()
    assert at.coordinator.newest(at.run, "model") == R0
    close(at, R1, "abc")


def test_round_after_round(desk: Make) -> None:
    at = desk("ab", rounds=3)
    assert may_begin(at, R0)
    for number in range(3):
        close(at, f"round-{number:04d}/model")
    assert not may_begin(at, "round-0003/model")


def test_a_study_that_was_restored_goes_on_where_all_its_sites_are(desk: Make) -> None:
    """docs/operations.md, back-up and restore."""
    at = desk("abc")
    close(at, R0, "abc")
    for site in "ab":
        with pytest.raises(NotYetError, match="'round-0007' is out of order"):
            at.give(site, "round-0007/model", 1)
    close(at, "round-0007/model", "cab")
    assert at.coordinator.newest(at.run, "model") == "round-0007/model"
    close(at, "round-0008/model", "abc")


def test_scopes_that_the_method_declares(desk: Make) -> None:
    at = desk("abc", rounds=2, method={"name": "fedsm"})
    own_trainer(at, *"abc")
    before, after = ["start", "start-1", "start-2"], ["validation", "cross-site", "cross-site-a", "cross-site-c"]
    never = ["other", "start-3", "start-", "start-01", "calibration", "planning", "cross-site-x", "round"]

    def turns() -> list[str]:
        return [scope for scope in before + after + never if may_begin(at, f"{scope}/x")]

    assert turns() == before
    close(at, R0, "abc")
    assert turns() == []
    close(at, R1, "abc")
    assert turns() == after


def test_a_method_without_exchange_validates_whenever_it_likes(desk: Make) -> None:
    at = desk("ab", method={"name": "local"}, cross_site=True)
    own_trainer(at, *"ab")
    assert may_begin(at, "cross-site-a/deployed")


def test_a_trainer_from_outside_names_its_scopes_itself(desk: Make) -> None:
    at = desk("ab", rounds=1)
    for number in range(64):
        at.tell("a", f"mine-{number}/x", 0)
    assert not may_begin(at, "mine-64/x")
    for number in range(64):
        at.tell("b", f"mine-{number}/x", 0)
        assert at.collective(f"mine-{number}/x").status == "empty"
    at.close()
    at.open()
    assert not may_begin(at, "mine-64/x")
    close(at, R0)
    assert not may_begin(at, "mine-64/x")


def test_a_trainer_from_outside_has_no_preparation_between_rounds(desk: Make) -> None:
    at = desk("ab", rounds=2)
    close(at, "mine/x")
    close(at, R0)
    assert not may_begin(at, "others/x")
    assert at.give("b", "mine/x", 2) == "differs", "what has begun is answered"
    close(at, R1)
    close(at, "afterwards/x")


def test_a_planning_has_one_scope(desk: Make) -> None:
    at = desk("ab", "planning")
    with pytest.raises(RefusedError, match="A planning has 'planning'"):
        at.upload("a", "start/model", b"1", verb="gather")
    at.upload("a", "planning/dataset", b"1", verb="gather")


@pytest.mark.parametrize(("method", "most"), [({"name": "fedavg"}, 66), ({"name": "fedsm"}, 67)])
def test_a_scope_has_so_many_names(desk: Make, method: dict[str, Any], most: int) -> None:
    at = desk("ab", method=method)
    for number in range(most):
        at.tell("a", f"round-0000/n-{number}", 0)
    with pytest.raises(RefusedError, match=f"the site is in {most} collectives of 'round-0000' already"):
        at.tell("a", "round-0000/another", 0)
    at.tell("a", "round-0000/n-0", 0)
    assert at.give("b", "round-0000/model", 1) == "stands", "it has taken nobody's place"


# ---------------------------------------------------------------------------------------------------------------- kinds


def test_no_site_alone_lays_down_a_schema(desk: Make) -> None:
    at = desk("abc", min_sites=2)
    at.give("c", R0, X)
    for site in "ab":
        assert at.give(site, R0, Y) == "stands"
    assert at.result(R0) == 1
    closed = at.collective(R0)
    told = at.coordinator.turned_down(closed, "c")
    assert told is not None
    assert told.startswith("The tensors of site 'c' for 'round-0000/model' differ in names, shapes or dtypes")
    assert at.coordinator.turned_down(closed, "a") is None
    assert at.events("c")[-1] == f"turned down: {told}"
    assert at.coordinator.outlook(closed).weights == {"a": 1, "b": 1}
    assert at.coordinator.status()["sites"]["c"]["standing"] == "absent"
    at.give("a", R1, Y)
    assert at.missing(R1) == ["b"], "nobody waits for it"
    with pytest.raises(RefusedError, match="'c' for 'round-0001/model' differ"):
        at.give("c", R1, X)
    assert at.give("c", R1, Y) == "stands"
    at.close()
    at.open()
    assert at.coordinator.turned_down(at.collective(R0), "c") == told
    assert len(at.spooled()) == 2


def test_the_first_by_name_counts_where_most_send_nothing(desk: Make) -> None:
    """The common start: the first site's weights, while another one sends its own under the same key."""
    at = desk("abc", min_sites=2)
    at.give("c", "start/model", X)
    at.tell("b", "start/model", 0)
    at.give("a", "start/model", Y)
    assert at.result("start/model") == 1
    for site in "ab":
        at.give(site, R0, Y)
    assert at.result(R0) == 1


def test_no_site_alone_lays_down_a_verb(desk: Make) -> None:
    at = desk("abc", min_sites=2)
    at.upload("c", R0, b"[1]", verb="gather")
    for site in "ab":
        at.give(site, R0, 1)
    assert at.result(R0) == 1
    assert "is a mean at most sites, not a gather as at c" in str(at.coordinator.turned_down(at.collective(R0), "c"))


def test_too_few_that_agree_fail_and_may_correct_themselves(desk: Make) -> None:
    at = desk("abc")
    at.give("c", R0, X)
    for site in "ab":
        at.give(site, R0, Y)
    failed = at.collective(R0)
    assert failed.status == "failed"
    assert "cannot be closed. The tensors of site 'c' for" in str(failed.error)
    assert len(at.spooled()) == 2
    assert at.give("a", R0, Y) == "stands"
    assert at.give("c", R0, Y) == "stands"
    assert at.result(R0) == 1


def test_who_cannot_win_is_told_before_all_are_there(desk: Make) -> None:
    at = desk("abc")
    for site in "ab":
        at.give(site, R0, X)
    with pytest.raises(RefusedError, match="'c' for 'round-0000/model' differ"):
        at.give("c", R0, Y)
    with pytest.raises(RefusedError, match="is a mean at the other sites, not a gather"):
        at.upload("c", R0, b"1", verb="gather")


def test_elections() -> None:
    mean, other, nothing, gather = (
        Ballot("mean", "x"), Ballot("mean", "y"), Ballot("mean", None), Ballot("gather", None),
    )  # fmt: skip
    assert elected({"a": mean}) == elected({"a": mean, "b": other}) == elected({"b": mean, "c": nothing}) == mean
    assert elected({"a": mean, "b": other, "c": other}) == other
    assert elected({"a": nothing, "b": nothing}) == nothing
    assert elected({"a": gather, "b": nothing, "c": mean}) == mean
    assert (agrees(nothing, mean), agrees(mean, mean), agrees(other, mean), agrees(gather, mean)) == (
        True, True, False, False,
    )  # fmt: skip
    assert not can_win("b", other, {"a": mean}, ["b"])
    assert can_win("a", other, {"b": mean}, ["a"])
    assert can_win("b", other, {"a": mean}, ["b", "c"])


# ---------------------------------------------------------------------------------------------------------------- spool


def test_a_site_fills_its_share_of_the_spool_only(desk: Make) -> None:
    at = desk("ab", rounds=2)
    at.close()
    at.open(spool_quota=2000)
    big = b"".join(encode({"w": np.zeros(200, np.float32)}))
    assert at.upload("a", "round-0000/x", big, arrives=big[:500]) is None
    with pytest.raises(NoRoomError, match="it would pass its share of 1e-06 GB"):
        at.upload("a", "round-0000/y", big)
    assert at.upload("b", "round-0000/x", big) == "stands"
    assert at.upload("a", "round-0000/x", big, position=500, arrives=big[500:]) == "stands"


def test_uploads_that_broke_are_bounded_in_number(desk: Make) -> None:
    at = desk("ab")
    payload = b"".join(encode(X))
    for number in range(3 * INTERRUPTED):
        assert at.upload("a", f"round-0000/n-{number}", payload, arrives=payload[:9]) is None
        at.upload("b", "round-0000/other", payload, arrives=payload[:9])
    names: list[Path] = at.spooled()
    assert len(names) == INTERRUPTED + 1
    last = at.offer_of("a", f"round-0000/n-{3 * INTERRUPTED - 1}", payload)
    assert at.coordinator.position(last) == 9
