"""The four verbs among the threads of one process."""

from __future__ import annotations

import random
import threading
from typing import Any

import numpy as np
import pytest

from nnunet_fed.errors import DeadlineError, NoContributionError, RefusedError
from nnunet_fed.exchange.communicator import Array, Collectives, LocalCommunicator, LocalFederation

SITES = ("c", "a", "d", "b")


class InOrder:
    """Lets the sites go one by one, in a given order of arrival."""

    def __init__(self, federation: LocalFederation, order: list[str]):
        self._turns = {site: threading.Event() for site in order}
        self._next = dict(zip(order, [*order[1:], None], strict=True))
        self._turns[order[0]].set()
        exchange = federation.exchange

        def in_order(key: str, site: str, value: Any) -> dict[str, Any]:
            self._turns[site].wait(30)
            with federation._changed:  # released once this site waits, and so has handed in
                following = self._next[site]
                if following is not None:
                    self._turns[following].set()
                return exchange(key, site, value)

        federation.exchange = in_order  # type: ignore[method-assign]


def test_sites_are_summed_in_the_order_of_their_names_whoever_comes_first() -> None:
    # float64 addition is not associative: each of these orders has another sum
    values = dict(zip("abcd", (1e16, 1.0, -1e16, 1.0), strict=True))
    results = set()
    for seed in range(6):
        order = random.Random(seed).sample(SITES, len(SITES))
        federation = LocalFederation(SITES)
        InOrder(federation, order)
        answers = federation.run(lambda seat: float(seat.sum("r/s", np.array(values[seat.site]))))
        assert len(set(answers.values())) == 1
        results.add(answers["a"])
    assert results == {((1e16 + 1.0) - 1e16) + 1.0}

    results = set()
    for order in (list("abcd"), list("dcba")):
        federation = LocalFederation(SITES)
        InOrder(federation, order)
        means = federation.run(lambda seat: seat.mean("r/m", {"w": np.array([values[seat.site]])}, 1)["w"].tobytes())
        results |= set(means.values())
    assert results == {np.array([(((1e16 + 1.0) - 1e16) + 1.0) / 4]).tobytes()}


def test_gathered_values_are_sorted_by_site() -> None:
    federation = LocalFederation(SITES)
    InOrder(federation, list("dbca"))
    gathered = federation.run(lambda seat: seat.gather("r/g", {"of": seat.site, "n": [1, None, "é"]}))
    for answer in gathered.values():
        assert list(answer) == ["a", "b", "c", "d"]
        assert answer["d"] == {"of": "d", "n": [1, None, "é"]}
    assert gathered["a"]["b"] is not gathered["c"]["b"], "no site sees what another does to its answer"


def test_seats_know_the_sites_sorted() -> None:
    seat = LocalFederation(SITES).communicator("c")
    assert (seat.site, seat.sites) == ("c", ("a", "b", "c", "d"))
    checked: Collectives = seat
    assert checked.sites == seat.sites
    with pytest.raises(RefusedError, match="no site 'x' in this federation of a, b, c, d"):
        LocalFederation(SITES).communicator("x")


def test_the_mean_is_weighted_and_keeps_shapes_and_dtypes() -> None:
    def tensors(site: str) -> dict[str, Array]:
        value = ord(site) - ord("a")
        return {
            "matrix": np.full((2, 3), value, np.float32).T,
            "scalar": np.array(value, np.float64),
            "half": np.full(1, value, np.float16),
            "empty": np.zeros((0, 5), np.float32),
        }

    weights = {"a": 1.0, "b": 3.0, "c": 0.0, "d": 0.5}
    answers = LocalFederation(SITES).run(lambda seat: seat.mean("r/m", tensors(seat.site), weights[seat.site]))
    expected = (3.0 * 1 + 0.5 * 3) / 4.5
    for answer in answers.values():
        for name, array in tensors("a").items():
            assert (answer[name].dtype, answer[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(answer["matrix"], np.full((3, 2), np.float32(expected)))
        assert answer["scalar"] == expected
        assert answer["half"] == np.float16(expected)


def test_a_site_of_weight_0_gets_the_mean_without_tensors_of_its_own() -> None:
    def call(seat: LocalCommunicator) -> dict[str, Array]:
        return seat.mean("r/m", {"w": np.float32([5])} if seat.site == "a" else {}, float(seat.site == "a"))

    assert all(answer["w"] == 5 for answer in LocalFederation("ab").run(call).values())


def test_a_mean_to_which_nobody_contributes() -> None:
    def call(seat: LocalCommunicator) -> str:
        with pytest.raises(NoContributionError, match="'r/m'"):
            seat.mean("r/m", {"w": np.float32([1])}, 0.0)
        return "told"

    assert set(LocalFederation("ab").run(call).values()) == {"told"}


@pytest.mark.parametrize("weight", [-1.0, -1e-300, float("nan"), float("inf"), float("-inf")])
def test_bad_weights_are_refused_before_anything_is_sent(weight: float) -> None:
    seat = LocalFederation("ab").communicator("a")  # b never comes: a waiting call would end in DeadlineError
    with pytest.raises(RefusedError, match="weight of a site"):
        seat.mean("r/m", {"w": np.float32([1])}, weight)


@pytest.mark.parametrize(
    "other",
    [
        {"w": np.zeros(3, np.float32)},
        {"w": np.zeros((2, 1), np.float32)},
        {"w": np.zeros(2, np.float64)},
        {"v": np.zeros(2, np.float32)},
        {"w": np.zeros(2, np.float32), "v": np.zeros(2, np.float32)},
        {},
    ],
    ids=["shape", "dimensions", "dtype", "name", "more", "none"],
)
def test_every_site_is_refused_a_mean_of_different_tensors(other: dict[str, Array]) -> None:
    def call(seat: LocalCommunicator) -> str:
        with pytest.raises(RefusedError, match=r"'r/m' differ in names, shapes or dtypes"):
            seat.mean("r/m", {"w": np.zeros(2, np.float32)} if seat.site == "a" else other, 1)
        return "refused"

    assert set(LocalFederation("ab").run(call).values()) == {"refused"}


@pytest.mark.parametrize("other", [np.ones(1, np.int64), np.ones((), np.int64), np.ones(3, np.float64)])
def test_a_sum_of_different_arrays_is_refused_as_over_the_network(other: Array) -> None:
    with pytest.raises(RefusedError, match="shape or dtype"):
        LocalFederation("ab").run(lambda seat: seat.sum("r/s", np.ones(3, np.int64) if seat.site == "a" else other))


def test_a_mean_of_whole_numbers_is_refused_as_over_the_network() -> None:
    with pytest.raises(RefusedError, match="floating-point tensors only"):
        LocalFederation("ab").run(lambda seat: seat.mean("r/m", {"w": np.ones(3, np.int64)}, 1))


def test_what_a_site_does_to_its_arrays_later_is_not_seen_by_others() -> None:
    federation = LocalFederation("ab")
    handed_in = threading.Event()

    def call(seat: LocalCommunicator) -> Array:
        array = np.array([1, 2])
        if seat.site == "b":
            handed_in.wait(30)
            return seat.sum("r/s", array)
        waiting = threading.Thread(target=seat.sum, args=("r/s", array))
        waiting.start()
        while "r/s" not in federation._contributions:
            pass
        array[:] = 100
        handed_in.set()
        waiting.join(30)
        return seat.sum("r/s", array)

    answers = federation.run(call)
    assert answers["a"].tolist() == answers["b"].tolist() == [2, 4], "and a contribution stands once it is made"


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, object()])
def test_only_json_is_gathered(value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        LocalFederation("a").communicator("a").gather("r/g", value)


# --------------------------------------------------------------------------------------------------------------- errors


def test_the_deadline_names_the_key_and_who_is_missing() -> None:
    federation = LocalFederation("abcd", deadline=0.3)

    def call(seat: LocalCommunicator) -> None:
        if seat.site in "ac":
            seat.gather("round-0001/digests", 1)

    with pytest.raises(DeadlineError, match=r"'round-0001/digests' still misses b, d after 0.3 s"):
        federation.run(call)


def test_the_error_that_came_first_is_raised_and_not_the_deadlines_that_follow_from_it() -> None:
    federation = LocalFederation("abc", deadline=0.3)

    def call(seat: LocalCommunicator) -> None:
        if seat.site == "c":
            raise ZeroDivisionError("the cause")
        seat.gather("r/g", 1)

    with pytest.raises(ZeroDivisionError, match="the cause"):
        federation.run(call)


def test_answers_come_by_site() -> None:
    assert LocalFederation("ba").run(lambda seat: seat.site.upper()) == {"a": "A", "b": "B"}
