from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_fed.evaluation.intervals import Interval, deviation, interval, paired

QUICK = 200
"""Resamples."""
scores = st.lists(st.floats(0, 1), min_size=2, max_size=8)
sites = st.lists(scores, min_size=1, max_size=4)


def by_case(values: list[list[float]]) -> list[dict[str, float]]:
    return [{f"case_{number}": value for number, value in enumerate(of_site)} for of_site in values]


def test_the_interval_of_a_known_distribution() -> None:
    values = np.random.default_rng(1).normal(0.5, 0.1, 400)
    found = interval([values.tolist()])
    assert found.mean == pytest.approx(values.mean())
    assert found.low is not None
    assert found.high is not None
    # of a mean of many normal values the percentile interval is that of the normal distribution
    half = 1.96 * values.std() / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_every_site_counts_the_same() -> None:
    assert interval([[1.0, 1.0], [0.0] * 50]) == Interval(0.5, 0.5, 0.5)


def test_of_a_single_case_there_is_no_interval() -> None:
    assert interval([[0.5]]) == Interval(0.5, None, None)
    assert interval([[0.5], [0.2, 0.4]]).low is None
    assert interval([]) == interval([[]]) == Interval(None, None, None)


def test_a_site_without_values_does_not_count() -> None:
    assert interval([[0.2, 0.4], []]) == interval([[0.2, 0.4]])


@settings(max_examples=30, deadline=None)
@given(sites)
def test_identical_methods_differ_by_nothing(values: list[list[float]]) -> None:
    assert paired(by_case(values), by_case(values), QUICK) == Interval(0.0, 0.0, 0.0)


@settings(max_examples=30, deadline=None)
@given(sites, st.randoms())
def test_the_order_of_the_cases_changes_nothing(values: list[list[float]], order: random.Random) -> None:
    other = [order.sample(of_site, len(of_site)) for of_site in values]
    assert interval(values, QUICK) == interval(other, QUICK)


@settings(max_examples=30, deadline=None)
@given(sites, sites)
def test_the_difference_the_other_way_round(first: list[list[float]], second: list[list[float]]) -> None:
    number = min(len(first), len(second))
    one, other = by_case(first[:number]), by_case(second[:number])
    there, back = paired(one, other, QUICK), paired(other, one, QUICK)
    assert there.mean is not None
    assert back.mean == pytest.approx(-there.mean)


def test_only_cases_that_both_methods_have_count() -> None:
    first, second = {"x": 0.5, "y": 0.9, "z": 1.0}, {"x": 0.25, "y": 0.65}
    assert paired([first], [second]) == Interval(pytest.approx(0.25), pytest.approx(0.25), pytest.approx(0.25))


def test_pairing_sees_what_the_spread_of_the_cases_hides() -> None:
    hard_and_easy = np.linspace(0.1, 0.9, 9)
    better = hard_and_easy + 0.02
    found = paired(by_case([better.tolist()]), by_case([hard_and_easy.tolist()]))
    assert found.low == pytest.approx(0.02)
    lone = interval([better.tolist()])
    assert lone.low is not None
    assert lone.low < hard_and_easy.mean()


def test_deviation_over_seeds() -> None:
    assert deviation([0.5]) is None
    assert deviation([0.1, 0.2, 0.3]) == pytest.approx(0.1)
