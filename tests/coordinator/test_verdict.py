"""What becomes of an offer: the whole table, and that looking changes nothing."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_fed.coordinator.store import Collective, Contribution
from nnunet_fed.coordinator.verdict import Offer, verdict_of
from nnunet_fed.errors import RefusedError

D1, D2 = "1" * 32, "2" * 32
OFFER = Offer("run", "round-0001/model", "a", "mean", 2.0, D1, 10)


def collective(status: str, verb: str = "mean") -> Collective:
    return Collective("run", OFFER.key, verb, status, 0.0, None, None, None, None, None)


def standing(digest: str = D1, weight: float = 2.0) -> Contribution:
    return Contribution("run", OFFER.key, "a", weight, digest, 10, "file", 0.0, 0.0, None)


@pytest.mark.parametrize(
    ("status", "stood", "participants", "verdict"),
    [
        (None, None, None, "send"),
        (None, None, ["a", "b"], "send"),
        (None, None, ["b"], "closed"),
        ("open", None, None, "send"),
        ("open", None, ["a"], "send"),
        ("open", None, ["b"], "closed"),
        ("open", (D1, 2.0), None, "stands"),
        ("open", (D2, 2.0), None, "differs"),
        ("open", (D1, 1.0), None, "differs"),
        ("open", (D1, 2.0), ["b"], "stands"),
        ("failed", None, None, "send"),
        ("failed", None, ["b"], "closed"),
        ("failed", (D1, 2.0), None, "stands"),
        ("failed", (D2, 2.0), None, "differs"),
        *((status, None, members, "closed") for status in ("closed", "empty", "pruned") for members in (None, ["a"])),
        *((status, (D1, 2.0), ["a"], "stands") for status in ("closed", "empty", "pruned")),
        *((status, (D2, 2.0), ["a"], "differs") for status in ("closed", "empty", "pruned")),
    ],
)
def test_the_table(status: str | None, stood: Any, participants: list[str] | None, verdict: str) -> None:
    there = None if status is None else collective(status)
    assert verdict_of(OFFER, there, None if stood is None else standing(*stood), participants) == verdict


def test_of_weight_0_the_same_is_said() -> None:
    nothing = replace(OFFER, weight=0.0, digest="", size=0)
    assert verdict_of(nothing, None, None, None) == "send"
    assert verdict_of(nothing, collective("open"), standing("", 0.0), None) == "stands"
    assert verdict_of(nothing, collective("open"), standing(), None) == "differs"
    assert verdict_of(nothing, collective("closed"), None, ["a"]) == "closed"


@pytest.mark.parametrize("status", ["closed", "empty", "pruned"])
def test_another_verb_is_refused_once_it_is_settled(status: str) -> None:
    assert verdict_of(OFFER, collective("open", "sum"), None, ["a", "b"]) == "send"
    with pytest.raises(RefusedError, match="'round-0001/model' is a sum at the other sites, not a mean"):
        verdict_of(OFFER, collective(status, "sum"), standing(), ["b"])


COLLECTIVES = st.none() | st.sampled_from(["open", "failed", "closed", "empty", "pruned"]).map(collective)
STANDING = st.none() | st.builds(standing, st.sampled_from([D1, D2]), st.sampled_from([0.0, 2.0]))
PARTICIPANTS = st.none() | st.lists(st.sampled_from("abc"), unique=True)


@given(st.sampled_from([D1, D2]), st.sampled_from([0.0, 2.0]), COLLECTIVES, STANDING, PARTICIPANTS)
def test_it_is_pure_and_what_it_depends_on(digest: str, weight: float, there: Any, stood: Any, members: Any) -> None:
    offer = replace(OFFER, digest=digest, weight=weight)
    given_to_it = offer, there, stood, members
    before = deepcopy(given_to_it)
    verdict = verdict_of(*given_to_it)
    assert given_to_it == before
    assert verdict_of(*before) == verdict
    assert (verdict in ("stands", "differs")) == (stood is not None)
    if stood is not None:
        same = (stood.digest, stood.weight) == (digest, weight)
        assert verdict == verdict_of(offer, None, stood, None) == ("stands" if same else "differs")
    elif verdict == "send":
        assert there is None or there.status in ("open", "failed")
        assert members is None or "a" in members


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"weight": -1.0}, "weight"),
        ({"weight": float("nan")}, "weight"),
        ({"weight": float("inf")}, "weight"),
        ({"key": "model"}, "'model' cannot name a collective"),
        ({"key": "r/" + 300 * "m"}, "cannot name a collective"),
        ({"digest": ""}, "'' is no digest of a payload"),
        ({"digest": "../../etc/passwd"}, "no digest"),
    ],
)
def test_what_no_offer_can_be(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RefusedError, match=sentence):
        replace(OFFER, **wrong).check()


def test_of_weight_0_no_digest_is_asked() -> None:
    replace(OFFER, weight=0.0, digest="").check()
