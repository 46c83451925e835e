"""Federated quantiles are numpy's on the pooled values, bit for bit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nnunet_fed.agreement.quantiles import Moments, Quantiles, moments, quantiles
from nnunet_fed.errors import DisagreementError, FederationError
from nnunet_fed.exchange.communicator import LocalFederation

PERCENTAGES = np.array((0.0, 0.5, 50.0, 99.5, 100.0))
Array = np.ndarray[Any, Any]
Sites = list[list[Array]]


class Counting:
    """A seat that counts its sums and the bytes of the largest."""

    def __init__(self, communicator: Any):
        self._communicator = communicator
        self.site, self.sites = communicator.site, communicator.sites
        self.keys: list[str] = []
        self.largest = 0

    def sum(self, key: str, array: Array) -> Array:
        self.keys.append(key)
        self.largest = max(self.largest, array.nbytes)
        result: Array = self._communicator.sum(key, array)
        return result


def federated(sites: Sites, probabilities: Any = PERCENTAGES / 100) -> tuple[Quantiles, Counting]:
    names = [f"site-{number}" for number in range(len(sites))]

    def function(communicator: Any) -> tuple[Quantiles, Counting]:
        seat = Counting(communicator)
        return quantiles(seat, "planning/intensity/0", sites[names.index(seat.site)], probabilities), seat  # type: ignore[arg-type]

    answers = LocalFederation(names, deadline=5).run(function)
    for answer, _ in answers.values():
        np.testing.assert_array_equal(answer.values, answers[names[0]][0].values)
    return answers[names[0]]


def federated_moments(sites: Sites) -> Moments:
    names = [f"site-{number}" for number in range(len(sites))]
    run = LocalFederation(names, deadline=5).run
    return run(lambda seat: moments(seat, "planning/m", sites[names.index(seat.site)]))[names[0]]


def check(sites: Sites) -> Counting:
    answer, seat = federated(sites)
    # nnU-Net stacks the channels, which promotes all of them together
    pooled = [np.concatenate([site[channel] for site in sites]) for channel in range(len(sites[0]))]
    dtype = np.result_type(*pooled)
    for channel, values in enumerate(pooled):
        values = values.astype(dtype)
        expected = np.percentile(values, PERCENTAGES)
        assert expected.dtype == np.float64
        np.testing.assert_array_equal(answer.values[channel], expected)
        assert answer.values[channel, 0] == values.min()
        assert answer.values[channel, -1] == values.max()
        ordered = np.sort(values)
        for (low, high), probability in zip(answer.neighbours[channel], PERCENTAGES / 100, strict=True):
            place = (len(values) - 1) * probability
            assert (low, high) == (ordered[math.floor(place)], ordered[math.ceil(place)])
        assert answer.neighbours[channel, 2].mean() == np.median(values.astype(np.float64))
        assert answer.count[channel] == len(values)
    return seat


def floats(dtype: type, *, low: float, high: float) -> st.SearchStrategy[Array]:
    spread = st.floats(low, high, width=32 if dtype is np.float32 else 64, allow_nan=False)
    ties = st.sampled_from([-1.5, -0.0, 0.0, 1.0, 1 + 2**-23, 7.0])
    return st.integers(0, 60).flatmap(lambda n: arrays(dtype, n, elements=spread) | arrays(dtype, n, elements=ties))


def some_sites(channel: st.SearchStrategy[Array]) -> st.SearchStrategy[Sites]:
    def filled(sites: Sites) -> bool:
        return all(any(len(site[channel]) for site in sites) for channel in range(len(sites[0])))

    def shape(channels: int) -> st.SearchStrategy[Sites]:
        return st.lists(st.lists(channel, min_size=channels, max_size=channels), min_size=1, max_size=5).filter(filled)

    return st.integers(1, 3).flatmap(shape)


@settings(max_examples=150, deadline=None)
@given(some_sites(floats(np.float32, low=-(2.0**126), high=2.0**126)))
def test_float32_is_numpy_on_the_pool_in_four_sums(sites: Sites) -> None:
    seat = check(sites)
    assert len(seat.keys) == 4
    assert len(set(seat.keys)) == 4
    assert all(key.startswith("planning/intensity/0/") for key in seat.keys)
    assert seat.largest <= len(sites[0]) * 8 * 2**11 * 8


@settings(max_examples=60, deadline=None)
@given(some_sites(floats(np.float32, low=-1000, high=1000) | floats(np.float64, low=-1e300, high=1e300)))
def test_float64_at_some_sites_is_numpy_on_the_pool(sites: Sites) -> None:
    assert len(check(sites).keys) in (4, 7)


def test_empty_float64_array_promotes_without_more_rounds() -> None:
    # a case without foreground contributes [], and numpy then pools in float64
    values = np.array([0.1, 3333.3333], np.float32)
    narrow, wide = [[values[:1]], [values[1:]]], [[values[:1]], [values[1:]], [np.array([])]]
    assert len(check(wide).keys) == 4
    check(narrow)
    assert not np.array_equal(federated(narrow)[0].values, federated(wide)[0].values)


def test_large_realistic_samples() -> None:
    rng = np.random.default_rng(1)
    check(
        [
            [np.round(rng.normal(40, 200, n)).astype(np.float32), rng.gamma(2, 30, n).astype(np.float32)]
            for n in (9999, 50001, 3)
        ]
    )


def test_any_probability() -> None:
    rng = np.random.default_rng(2)
    sites = [[rng.normal(size=n).astype(np.float32)] for n in (100, 37)]
    probabilities = np.linspace(0, 1, 41)
    answer, _ = federated(sites, probabilities)
    np.testing.assert_array_equal(answer.values[0], np.quantile(np.concatenate([s[0] for s in sites]), probabilities))


@settings(max_examples=60, deadline=None)
@given(some_sites(floats(np.float32, low=-1e5, high=1e5)))
def test_moments_are_those_of_the_pool(sites: Sites) -> None:
    answer = federated_moments(sites)
    for channel in range(len(sites[0])):
        pooled = np.concatenate([site[channel] for site in sites]).astype(np.float64)
        scale = 1e-12 * np.abs(pooled).max()
        np.testing.assert_allclose(answer.mean[channel], pooled.mean(), rtol=1e-12, atol=scale)
        np.testing.assert_allclose(answer.std[channel], pooled.std(), rtol=1e-12, atol=scale)
        assert answer.count[channel] == len(pooled)


def test_std_survives_a_large_mean() -> None:
    values = np.array([1e9, 1e9 + 1, 1e9 + 2, 1e9 + 3])
    answer = federated_moments([[values[:1]], [values[1:]]])
    np.testing.assert_allclose(answer.std[0], np.std([0, 1, 2, 3]), rtol=1e-12)


@pytest.mark.parametrize("function", [federated, federated_moments])
def test_no_values_at_any_site(function: Any) -> None:
    some, none = np.ones(3, np.float32), np.ones(0, np.float32)
    with pytest.raises(FederationError, match=r"No site has a value .* \(channel 1\)"):
        function([[some, none], [some, none]])


@pytest.mark.parametrize("function", [federated, federated_moments])
def test_value_that_is_not_finite(function: Any) -> None:
    with pytest.raises(FederationError, match=r"site-0.*not finite"):
        function([[np.array([1, np.nan], np.float32)]])


# ---------------------------------------------------------------------------------------------- a coordinator that lies


class Liar:
    """A seat whose coordinator leads the search for a median to the site's largest value."""

    site, sites = "a", ("a", "b", "c")

    def __init__(self, values: Array, others: int):
        self._largest, self._others = values.max(), others
        self.asked: list[Array] = []

    def sum(self, key: str, array: Array) -> Array:
        self.asked.append(array)
        if key.endswith("counts"):
            return array + np.array([0, 0, self._others])
        lie = np.array(array)
        for row in lie:  # whatever was said before, the others' values lie around this site's largest one
            row[np.flatnonzero(row)[-1]] += 10 * self._others
        return lie


@pytest.mark.parametrize("others", [0, 10, 1000])
def test_a_lie_that_does_not_add_up_ends_the_search(others: int) -> None:
    """It gave away the exact maximum of the site, asked for a median."""
    values = np.random.default_rng(0).normal(size=101).astype(np.float32)
    liar = Liar(values, others)
    if others == 0:  # which is no lie
        assert quantiles(liar, "planning/x", [values], [0.5]).values[0, 0] == np.median(values)
        return
    with pytest.raises(DisagreementError, match="sum for 'planning/x' cannot be"):
        quantiles(liar, "planning/x", [values], [0.5])
    assert len(liar.asked) == 2, "the counts and the first, coarse, histogram: intervals of a factor of 4"


def test_a_sum_below_the_sites_own_part_is_refused() -> None:
    class Below(Liar):
        def sum(self, key: str, array: Array) -> Array:
            super().sum(key, array)
            return array if key.endswith("counts") else np.roll(array, 1, axis=1)

    values = np.arange(10, dtype=np.float32)
    with pytest.raises(DisagreementError, match="does not go with this site's own counts"):
        quantiles(Below(values, 0), "planning/x", [values], [0.5])
