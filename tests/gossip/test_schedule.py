"""Gossip: invariants 19 to 22, 26 and 29 of GCML's notes (6), by their numbers, and the notes' figures (5.5)."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
from collections import Counter
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_fed.errors import ConfigurationError, DisagreementError
from nnunet_fed.gossip.schedule import (
    Candidate,
    Schedule,
    Topology,
    Version,
    judge,
    kept,
    likelihood,
    merged,
    next_delivery,
    uniform,
)

TOPOLOGIES: tuple[Topology, ...] = get_args(Topology)
ALL = pytest.mark.parametrize("topology", TOPOLOGIES)
PANSEG = {"NYU": 113, "MCF": 106, "NWU": 21, "AHN": 12, "MCA": 17}
BRATS = dict(zip("abcdefgh", (32, 15, 23, 7, 9, 21, 22, 23), strict=True))
CASES = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=3), st.integers(1, 1000), min_size=1, max_size=9)
SCORES = st.dictionaries(st.sampled_from(get_args(Candidate)), st.floats(0, 1) | st.just(math.nan))


# ---------------------------------------------------------------------------------------------------------------- draws


def test_a_draw_is_the_same_for_ever() -> None:
    """Sites with other versions of Python or numpy must agree with each other."""
    assert uniform(0, 1, "send", "a") == 0.7587777937167302
    assert Schedule("derangement", 7).pushes(3, PANSEG) == {
        "AHN": "NWU",
        "MCA": "NYU",
        "MCF": "MCA",
        "NWU": "AHN",
        "NYU": "MCF",
    }


def test_the_process_that_talks_to_peers_needs_no_torch() -> None:
    code = "import sys, nnunet_fed.gossip.schedule; assert not {'torch', 'nnunetv2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@given(st.integers(0, 2**32), st.text())
def test_a_draw_depends_on_all_of_its_parts_and_on_nothing_else(seed: int, name: str) -> None:
    drawn = [uniform(seed, name), uniform(seed + 1, name), uniform(seed, name + "a"), uniform(seed, name, 0)]
    assert all(0 <= number < 1 for number in drawn)
    assert len(set(drawn)) == 4
    assert drawn[0] == uniform(seed, name)


@ALL
@given(seed=st.integers(0, 2**32), number=st.integers(0, 10**6), cases=CASES, order=st.randoms())
def test_21_every_site_computes_the_same_round_and_nobody_sends_to_itself(
    topology: Topology, seed: int, number: int, cases: dict[str, int], order: Any
) -> None:
    schedule = Schedule(topology, seed)
    pushes = schedule.pushes(number, cases)
    shuffled = list(cases.items())
    order.shuffle(shuffled)
    assert Schedule(topology, seed).pushes(number, dict(shuffled)) == pushes
    assert all(sender != receiver and receiver in cases for sender, receiver in pushes.items())
    for site in cases:
        tried = schedule.candidates(number, site, cases)
        assert tried[:1] == ((pushes[site],) if site in pushes else ())
        assert set(tried) in (set(), cases.keys() - {site})
        assert len(tried) == len(set(tried))


def test_21_a_site_sends_as_often_as_its_probability_says_and_to_all_others_alike() -> None:
    schedule, rounds = Schedule("bernoulli", 11), 12_500  # 1e5 draws
    sent, targets = Counter[str](), Counter[tuple[str, str]]()
    for number in range(rounds):
        for sender, receiver in schedule.pushes(number, BRATS).items():
            sent[sender] += 1
            targets[sender, receiver] += 1
    for site, p in schedule.send_probabilities(BRATS).items():
        assert abs(sent[site] - rounds * p) <= 3 * math.sqrt(rounds * p * (1 - p))
        for peer in BRATS.keys() - {site}:
            assert abs(targets[site, peer] - sent[site] / 7) <= 4 * math.sqrt(sent[site] * 6 / 49)


@given(CASES, st.none() | st.floats(0.1, 20))
def test_22_probabilities_rise_with_the_cases_and_never_exceed_one(
    cases: dict[str, int], senders: float | None
) -> None:
    probabilities = Schedule("bernoulli", 0, senders).send_probabilities(cases)
    ordered = [probabilities[site] for site in sorted(cases, key=lambda site: cases[site])]
    assert ordered == sorted(ordered)
    assert all(0 < p <= 1 for p in ordered)
    if all(p < 1 for p in ordered):
        assert sum(ordered) == pytest.approx(len(cases) / 2 if senders is None else senders)


@ALL
def test_22_one_site_sends_to_nobody_and_of_two_each_to_the_other(topology: Topology) -> None:
    for number in range(50):
        assert Schedule(topology, number).pushes(number, {"a": 3}) == {}
        pushes = Schedule(topology, number, 5.0).pushes(number, {"a": 3, "b": 4})
        assert pushes == {"a": "b", "b": "a"}


def test_a_site_that_is_no_member_or_has_no_cases_is_told_so() -> None:
    with pytest.raises(ConfigurationError, match="'x' is not among the members of the gossip, a, b"):
        Schedule("ring", 0).candidates(0, "x", {"a": 1, "b": 1})
    with pytest.raises(ConfigurationError, match="'b' has 0 training cases"):
        Schedule("bernoulli", 0).pushes(0, {"a": 1, "b": 0})


# ----------------------------------------------------------------------------------------------------------- topologies


@given(st.integers(0, 2**32), st.integers(0, 10**6), CASES.filter(lambda cases: len(cases) > 1))
def test_a_planned_round_reaches_everybody_once(seed: int, number: int, cases: dict[str, int]) -> None:
    for topology in ("derangement", "ring", "exponential"):
        pushes = Schedule(topology, seed).pushes(number, cases)
        assert pushes.keys() == set(pushes.values()) == cases.keys()
    pushes = Schedule("matching", seed).pushes(number, cases)
    assert len(pushes) == len(cases) // 2 * 2
    assert all(pushes[pushes[site]] == site for site in pushes)
    assert Schedule("uniform_push", seed).pushes(number, cases).keys() == cases.keys()


def test_derangements_are_uniform() -> None:
    counts = Counter(
        tuple(sorted(Schedule("derangement", 3).pushes(n, dict.fromkeys("abcd", 1)).items())) for n in range(1800)
    )
    assert len(counts) == 9, "all of them"
    assert all(abs(count - 200) < 4 * math.sqrt(200) for count in counts.values())


def test_the_ring_closes_over_a_dead_site_and_the_exponential_one_doubles_its_steps() -> None:
    sites = dict.fromkeys("abcde", 1)
    assert Schedule("ring", 0).pushes(4, sites) == dict(zip("abcde", "bcdea", strict=True))
    del sites["c"]
    assert Schedule("ring", 0).pushes(4, sites) == dict(zip("abde", "bdea", strict=True))
    steps = [Schedule("exponential", 0).pushes(number, BRATS)["a"] for number in range(5)]
    assert steps == ["b", "c", "e", "b", "c"]


MIXING = [
    # of the notes' table, for BraTS and PanSeg: transfers in a round, share of sites that receive, rounds to mix
    ("bernoulli", 1.0, (1.0, 0.12, 66), (1.0, 0.19, 51)),
    ("bernoulli", None, (4.0, 0.41, 17), (2.5, 0.42, 20)),
    ("uniform_push", None, (8, 0.66, 6.6), (5, 0.69, 4.9)),
    ("derangement", None, (8, 1, 5.1), (5, 1, 3.8)),
    ("matching", None, (8, 1, 4.8), (4, 0.80, 5.2)),
    ("ring", None, (8, 1, 7), (5, 1, 4)),
    ("exponential", None, (8, 1, 3), (5, 1, 3)),
]


@pytest.mark.parametrize(("topology", "senders", "brats", "panseg"), MIXING)
def test_transfers_and_mixing_are_those_of_the_notes(
    topology: Topology, senders: float | None, brats: tuple[float, ...], panseg: tuple[float, ...]
) -> None:
    for cases, (transfers, receive, mixing) in ((BRATS, brats), (PANSEG, panseg)):
        sent, received, took = simulated(Schedule(topology, 5, senders), cases, rounds=400)
        assert sent == pytest.approx(transfers, abs=0.15)
        assert received == pytest.approx(receive, abs=0.03)
        assert took == pytest.approx(mixing, rel=0.25)


def simulated(schedule: Schedule, cases: dict[str, int], rounds: int) -> tuple[float, float, float]:
    transfers, receivers, mixed, began = 0, 0, [], 0
    known = {site: {site} for site in cases}
    for number in range(rounds):
        pushes = schedule.pushes(number, cases)
        transfers, receivers = transfers + len(pushes), receivers + len(set(pushes.values()))
        before = {site: set(others) for site, others in known.items()}
        for sender, receiver in pushes.items():
            known[receiver] |= before[sender]
        if all(len(others) == len(cases) for others in known.values()):
            mixed.append(number + 1 - began)
            known, began = {site: {site} for site in cases}, number + 1
    return transfers / rounds, receivers / rounds / len(cases), statistics.mean(mixed)


# ------------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("topology", ["bernoulli", "uniform_push"])
def test_failures_halve_the_probability_of_a_peer(topology: Topology) -> None:
    assert [likelihood(failures) for failures in (0, 1, 2, 3, 4, 5, 10**6)] == [1, 1 / 2, 1 / 4, 1 / 8, *[1 / 16] * 3]
    schedule, failures = Schedule(topology, 1, 100.0), {"MCF": 2, "AHN": 99}
    first = Counter(schedule.candidates(number, "NYU", PANSEG, failures)[0] for number in range(4000))
    total = sum(map(likelihood, (2, 99, 0, 0)))
    for peer in PANSEG.keys() - {"NYU"}:
        p = likelihood(failures.get(peer, 0)) / total
        assert abs(first[peer] - 4000 * p) <= 4 * math.sqrt(4000 * p * (1 - p))


@pytest.mark.parametrize("topology", ["derangement", "ring", "exponential", "matching"])
def test_a_planned_partner_that_failed_mostly_gives_way_to_a_random_peer(topology: Topology) -> None:
    schedule, rounds, kept_partner, other = Schedule(topology, 1), 2000, 0, Counter[str]()
    for number in range(rounds):
        planned = schedule.candidates(number, "a", BRATS)[0]
        found = schedule.candidates(number, "a", BRATS, {planned: 4})
        assert set(found) == BRATS.keys() - {"a"}, "all are tried in the end"
        kept_partner += found[0] == planned
        other[found[0]] += 1
    # 1/16 by the schedule, and a sixteenth as likely as six others where the draw is random
    expected = 1 / 16 + 15 / 16 * (1 / 16) / (6 + 1 / 16)
    assert abs(kept_partner - rounds * expected) <= 4 * math.sqrt(rounds * expected)
    assert len(other) == 7


def test_a_failure_does_not_change_what_others_do() -> None:
    schedule = Schedule("derangement", 1)
    planned = schedule.pushes(8, BRATS)
    for site in BRATS:
        unrelated = next(peer for peer in BRATS if peer not in (site, planned[site]))
        assert schedule.candidates(8, site, BRATS, {unrelated: 9})[0] == planned[site]


# ------------------------------------------------------------------------------------------------------------- versions


def version(site: str, epoch: int = 0, **vector: int) -> Version:
    return Version(site, vector, epoch)


def test_26_a_version_that_came_already_is_a_replay() -> None:
    offer = version("b", b=3, c=5)
    assert judge(offer, {}, 0) == "accept"
    assert judge(offer, {"b": 2}, 0) == "accept"
    assert judge(offer, {"b": 3}, 0) == "replay"
    assert judge(offer, {"b": 4, "c": 1}, 0) == "replay"
    assert judge(version("b"), {}, 0) == "replay", "nothing was published yet"


def test_26_a_model_of_another_time_is_stale() -> None:
    for epoch, expected in ((50, "accept"), (49, "stale"), (150, "accept"), (151, "stale")):
        assert judge(version("b", epoch=epoch, b=4), {}, 100, max_epoch_distance=50) == expected
        assert judge(version("b", epoch=epoch, b=4), {}, 100) == "accept"


VECTORS = st.dictionaries(st.sampled_from("abcd"), st.integers(0, 100))


@given(VECTORS, VECTORS, VECTORS)
def test_29_vectors_only_grow_in_whatever_order_models_come(
    one: dict[str, int], other: dict[str, int], third: dict[str, int]
) -> None:
    own, first, second = version("a", **one), version("b", **other), version("c", **third)
    both = own.influenced_by(first).influenced_by(second)
    assert both == own.influenced_by(second).influenced_by(first)
    assert both == both.influenced_by(first)
    assert both.site == "a"
    assert all(both.vector[site] >= counter for site, counter in one.items())
    assert (both.vector["b"], both.vector["c"]) >= (first.counter, second.counter)
    following = both.published(7)
    assert (following.counter, following.epoch) == (both.counter + 1, 7)
    assert judge(following, {"a": both.counter}, 7) == "accept"
    assert {**following.vector, "a": 0} == {**both.vector, "a": 0}


def test_a_forged_vector_says_nothing_of_others() -> None:
    """It made all that a third site sent old, for good and at every site that it reached by way of others."""
    forged = version("m", m=1, c=2**53, a=2**53)
    own = version("a", a=3).influenced_by(forged)
    assert own.vector.get("c", 0) == 0
    assert judge(version("c", c=1), {"m": 1}, own.epoch) == "accept"
    assert own.published(0).counter < 2**53, "a counter beyond this is refused by every peer"


def test_a_restored_site_learns_how_far_it_had_counted() -> None:
    restored = version("a", a=3)
    assert restored.influenced_by(version("b", a=7, b=2)).published(5).counter == 8


def test_the_peer_used_least_is_next_then_the_newest() -> None:
    inbox = [version("b", b=9), version("c", c=2), version("d", d=4)]
    assert next_delivery(inbox, {"b": 1}) == inbox[2]
    assert next_delivery(inbox, {"b": 1, "d": 2}) == inbox[1]
    assert next_delivery(inbox, {}) == inbox[0]
    assert next_delivery([], {"b": 1}) is None


# --------------------------------------------------------------------------------------------------------- what is kept


@given(SCORES)
def test_19_local_and_merge_keep_what_they_say_whatever_the_scores(scores: dict[Candidate, float]) -> None:
    assert kept("local", scores) == "local"
    assert kept("merge", scores) == "merged"


@given(SCORES, st.floats(0, 0.1))
def test_19_the_best_is_kept_but_the_own_within_the_tolerance(scores: dict[Candidate, float], tolerance: float) -> None:
    chosen = kept("best", scores, tolerance)
    finite = {name: score for name, score in scores.items() if not math.isnan(score)}
    if "local" not in finite:
        assert not finite or finite[chosen] == max(finite.values())
    elif chosen == "local":
        assert max(finite.values()) <= finite["local"] + tolerance
    else:
        assert finite[chosen] == max(finite.values()) > finite["local"] + tolerance


def test_19_of_equals_the_one_that_was_there_stays() -> None:
    assert kept("best", {"incoming": 0.8, "local": 0.8, "before": 0.8}) == "local"
    assert kept("best", {"incoming": 0.8, "local": 0.7, "before": 0.8}) == "before"
    assert kept("best", {"incoming": 0.805, "local": 0.8}) == "local"
    assert kept("best", {"incoming": 0.806, "local": 0.8}) == "incoming"


def weights(seed: int) -> dict[str, Any]:
    drawn = np.random.default_rng(seed)
    return {
        "conv": drawn.normal(size=(3, 4)).astype(np.float32),
        "norm": drawn.normal(size=5).astype(np.float64),
        "scale": np.array(drawn.normal(), np.float32),
        "steps": np.array(seed),
    }


@given(st.floats(0, 1), st.integers(0, 99), st.integers(0, 99))
def test_the_merged_model_lies_between_the_two(weight: float, one: int, other: int) -> None:
    own, incoming = weights(one), weights(other)
    found = merged(own, incoming, weight, own_initial="x", incoming_initial="x")
    for name in ("conv", "norm", "scale"):
        assert isinstance(found[name], np.ndarray)
        assert found[name].dtype == own[name].dtype
        assert not np.shares_memory(found[name], own[name])
        expected = weight * own[name].astype(float) + (1 - weight) * incoming[name]
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)
        if weight == 1 or one == other:
            np.testing.assert_array_equal(found[name], own[name])
    assert found["steps"] == one


def test_20_models_that_began_differently_or_look_differently_are_not_merged() -> None:
    with pytest.raises(DisagreementError, match="started from other weights"):
        merged(weights(0), weights(1), 0.5, own_initial="x", incoming_initial="y")
    for change in ({"more": np.zeros(2)}, {"conv": np.zeros((4, 3), np.float32)}):
        with pytest.raises(DisagreementError, match=f"other tensors than this site's: {next(iter(change))}"):
            merged(weights(0), {**weights(1), **change}, 0.5, own_initial="x", incoming_initial="x")
