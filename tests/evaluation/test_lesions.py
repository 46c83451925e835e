"""Lesions are measured and compared as by hand, and small ones are the smallest fifth of all sites' lesions."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_fed.evaluation.lesions import (
    CaseResult,
    Lesion,
    aggregate,
    combined,
    evaluate,
    foreground_classes,
    lesion_volumes,
    small_lesion_thresholds,
)
from nnunet_fed.exchange.communicator import LocalFederation

LABELS = {"background": 0, "lesion": 1}
REGIONS = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
CUBE = (1.0, 1.0, 1.0)


def array(*boxes: tuple[Any, ...], shape: tuple[int, ...] = (4, 8, 8)) -> Any:
    """Boxes of a label: (label, z, y, x), where each of the last three is a number or a slice."""
    labels = np.zeros(shape, np.float32)
    for label, *place in boxes:
        labels[tuple(place)] = label
    return labels


def compare(
    reference: Any, prediction: Any, labels: Any = LABELS, threshold: float | None = 4.0
) -> dict[str, CaseResult]:
    return evaluate(reference, prediction, CUBE, labels, dict.fromkeys(foreground_classes(labels), threshold))


# ------------------------------------------------------------------------------------------- volumes


def test_voxels_that_touch_at_a_corner_are_one_lesion() -> None:
    labels = array((1, 0, 0, 0), (1, 1, 1, 1), (1, 3, 5, 5), (1, 3, 5, 7))
    assert lesion_volumes(labels, (3.0, 0.5, 0.5), LABELS) == {"lesion": [1.5, 0.75, 0.75]}


def test_a_region_is_the_union_of_its_labels() -> None:
    labels = array((1, 0, 0, slice(0, 3)), (2, 0, 0, slice(3, 5)), (3, 0, 0, slice(5, 8)), (2, 3, 5, 5))
    assert lesion_volumes(labels, CUBE, REGIONS) == {"whole": [5.0, 1.0], "core": [2.0, 1.0]}


def test_a_single_slice_is_measured_by_its_area() -> None:
    labels = array((1, 0, 0, 0), (1, 0, 1, 1), (1, 0, 5, 5), shape=(1, 8, 8))
    assert lesion_volumes(labels, (999.0, 0.5, 2.0), LABELS) == {"lesion": [2.0, 1.0]}


def test_nothing_to_measure() -> None:
    assert lesion_volumes(array(), CUBE, LABELS) == {"lesion": []}


def test_the_order_of_axes_does_not_change_a_bit() -> None:
    labels = array((1, slice(0, 3), slice(0, 3), slice(0, 3)))
    volumes = {
        lesion_volumes(labels, spacing, LABELS)["lesion"][0]
        for spacing in itertools.permutations((0.7, 1.1, float(np.float32(1.35))))
    }
    assert len(volumes) == 1


# ------------------------------------------------------------------------------------------- thresholds


def agreed(sites: list[dict[str, list[float]]]) -> dict[str, float | None]:
    names = [f"site-{number}" for number in range(len(sites))]
    answers = LocalFederation(names, deadline=5).run(
        lambda seat: small_lesion_thresholds(seat, "planning/lesions", sites[names.index(seat.site)])
    )
    first, *others = answers.values()
    assert all(other == first for other in others)
    return first


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 4000), st.sampled_from((0.7, 1.0, 1.0 / 3.0, 1.35**3)), st.integers(0, 2)), min_size=1
    )
)
def test_thresholds_are_those_of_the_pool(lesions: list[tuple[int, float, int]]) -> None:
    sites: list[dict[str, list[float]]] = [{"lesion": [], "none": []} for _ in range(3)]
    for voxels, unit, site in lesions:
        sites[site]["lesion"].append(voxels * unit)
    pooled = [voxels * unit for voxels, unit, _ in lesions]
    threshold = agreed(sites)["lesion"]
    assert threshold == np.quantile(pooled, 0.2)
    assert threshold is not None
    assert sum(volume <= threshold for volume in pooled) >= len(pooled) / 5


def test_a_class_that_no_site_has_and_sites_that_list_classes_in_another_order() -> None:
    assert agreed([{"a": [1.0, 2.0], "b": [], "c": [7.0]}, {"c": [], "b": [], "a": [3.0]}]) == {
        "a": pytest.approx(1.4),
        "b": None,
        "c": 7.0,
    }
    assert agreed([{"a": []}, {"a": []}]) == {"a": None}


# ------------------------------------------------------------------------------------------- comparison


def test_one_lesion_found_one_missed_one_made_up() -> None:
    reference = array((1, 0, 0, slice(0, 4)), (1, 2, 4, slice(0, 5)))
    prediction = array((1, 0, 0, slice(2, 5)), (1, 3, 7, 7))
    assert compare(reference, prediction)["lesion"] == CaseResult(
        (Lesion(4.0, True, True, 2 * 2 / (4 + 3)), Lesion(5.0, False, False, 0.0)), false_positives=1
    )


def test_one_predicted_blob_over_two_lesions_counts_for_each() -> None:
    reference = array((1, 0, 0, slice(0, 2)), (1, 0, 0, slice(4, 8)))
    prediction = array((1, 0, 0, slice(0, 8)))
    found = compare(reference, prediction)["lesion"]
    assert [lesion.dice for lesion in found.lesions] == [2 * 2 / (2 + 8), 2 * 4 / (4 + 8)]
    assert found.false_positives == 0


def test_two_predicted_pieces_of_one_lesion_are_one_prediction() -> None:
    reference = array((1, 0, 0, slice(0, 8)))
    prediction = array((1, 0, 0, slice(0, 3)), (1, 0, 0, slice(5, 8)), (1, 3, 0, 0))
    (lesion,) = compare(reference, prediction)["lesion"].lesions
    assert lesion.dice == 2 * 6 / (8 + 6)


def test_what_is_predicted_where_nobody_has_labelled_does_not_count() -> None:
    reference = array((2, 0, 0, slice(0, 2)), (1, 0, 1, slice(0, 2)), (3, 0, slice(2, 8), slice(None)))
    prediction = array((2, 0, 0, slice(0, 2)), (1, 0, slice(1, 4), slice(0, 2)), (1, 0, 6, 6))
    found = compare(reference, prediction, REGIONS)
    assert found["whole"] == CaseResult((Lesion(4.0, True, True, 1.0),), 0)
    assert found["core"] == CaseResult((Lesion(2.0, True, True, 1.0),), 0)


def test_two_dimensions() -> None:
    reference = array((1, 0, 0, 0), (1, 0, 1, 1), shape=(1, 8, 8))
    assert compare(reference, reference)["lesion"].lesions == (Lesion(2.0, True, True, 1.0),)


def test_a_case_without_lesions() -> None:
    assert compare(array(), array())["lesion"] == CaseResult((), 0)
    assert compare(array(), array((1, 0, 0, 0)))["lesion"] == CaseResult((), 1)


def test_without_a_threshold_no_lesion_is_small_or_large() -> None:
    reference = array((1, 0, 0, 0))
    for thresholds in ({"lesion": None}, {}):
        found = evaluate(reference, reference, CUBE, LABELS, thresholds)
        assert found["lesion"].lesions == (Lesion(1.0, None, True, 1.0),)
        content = aggregate([found])
        assert content["lesions"]["lesion"] == {"small": 0, "large": 0, "all": 1, "false_positives": 0}
        assert (content["dice_small"]["lesion"], content["dice_lesions"]["lesion"]) == (None, 1.0)


# ------------------------------------------------------------------------------------------- means

SMALL, MISSED, LARGE = Lesion(1.0, True, True, 0.5), Lesion(2.0, True, False, 0.0), Lesion(9.0, False, True, 0.8)


def test_means_over_lesions() -> None:
    found = aggregate(
        [
            {"a": CaseResult((SMALL, LARGE), 1), "b": CaseResult((), 0)},
            {"a": CaseResult((MISSED,), 2), "b": CaseResult((), 0)},
        ]
    )
    assert found == {
        "lesions": {
            "a": {"small": 2, "large": 1, "all": 3, "false_positives": 3},
            "b": {"small": 0, "large": 0, "all": 0, "false_positives": 0},
        },
        "dice_small": {"a": 0.25, "b": None},
        "dice_large": {"a": 0.8, "b": None},
        "dice_lesions": {"a": pytest.approx(1.3 / 3), "b": None},
        "lesion_recall_small": {"a": 0.5, "b": None},
        "lesion_recall_large": {"a": 1.0, "b": None},
        "lesion_recall": {"a": pytest.approx(2 / 3), "b": None},
    }


LESION = st.builds(Lesion, st.just(1.0), st.sampled_from((True, False, None)), st.booleans(), st.floats(0, 1))
CASE = st.fixed_dictionaries({"a": st.builds(CaseResult, st.lists(LESION).map(tuple), st.integers(0, 3))})


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(CASE, min_size=1), max_size=3))
def test_pooled_means_are_those_over_all_lesions(sites: list[list[dict[str, CaseResult]]]) -> None:
    pooled = combined([aggregate(cases) for cases in sites])
    together = aggregate([case for cases in sites for case in cases])
    assert pooled["lesions"] == together["lesions"]
    for metric, by_class in together.items():
        if metric != "lesions":
            assert pooled[metric] == pytest.approx(by_class)


def test_labels_as_texts_and_fractions_are_those_numbers() -> None:
    written = {"background": "0", "organ": "1", "lesion": 2.0, "ignore": 3}
    assert foreground_classes(written) == {"organ": (1,), "lesion": (2,)}
