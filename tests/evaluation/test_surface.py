"""Hand-computed shapes; the spacing is along z, y, x."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from nnunet_fed.evaluation.surface import Scores, evaluate_surfaces

LABELS = {"background": 0, "organ": 1}
SPACING = (3.0, 2.0, 1.0)
Array = npt.NDArray[np.int64]


def cube(shape: tuple[int, int, int] = (12, 12, 12)) -> Array:
    array = np.zeros(shape, np.int64)
    array[min(3, shape[0] - 1) : 7, 3:7, 3:7] = 1
    return array


def score(reference: Array, prediction: Array, tolerance: float = 1.0, **labels: Any) -> Scores:
    return evaluate_surfaces(reference, prediction, SPACING, {**LABELS, **labels}, tolerance)["organ"]


def test_a_perfect_prediction() -> None:
    assert score(cube(), cube()) == Scores(1.0, 0.0, 1.0)


@pytest.mark.parametrize(("axis", "step"), list(enumerate(SPACING)))
def test_a_shift_by_a_voxel_is_as_far_as_the_voxel_is_long(axis: int, step: float) -> None:
    found = score(cube(), np.roll(cube(), 1, axis), tolerance=step)
    assert found.dice == pytest.approx(0.75)
    assert found.hd95 == pytest.approx(step)
    assert found.nsd == 1.0, "all of the surface lies within the tolerance"
    less = score(cube(), np.roll(cube(), 1, axis), tolerance=0.9 * step)
    assert less.nsd is not None
    assert 0 < less.nsd < 1, "only the faces along the shift do"


def test_two_voxels_far_apart() -> None:
    one, other = np.zeros((2, 4, 4, 12), np.int64)
    one[2, 2, 2] = other[2, 2, 8] = 1
    assert score(one, other) == Scores(0.0, 6.0, 0.0)


def test_what_is_undefined() -> None:
    empty = np.zeros_like(cube())
    assert score(empty, empty) == Scores(None, None, None)
    assert score(cube(), empty) == score(empty, cube()) == Scores(0.0, None, 0.0)


def test_a_single_slice_has_an_outline() -> None:
    flat = cube((1, 12, 12))
    found = score(flat, np.roll(flat, 1, 1), tolerance=2.0)
    assert found == Scores(0.75, 2.0, 1.0), "the thickness of a slice, 3 mm, does not count"


def test_what_is_predicted_where_nobody_labelled_does_not_count() -> None:
    reference, prediction = cube(), cube()
    reference[:2], prediction[:2] = 2, 1
    assert score(reference, prediction, ignore=2) == Scores(1.0, 0.0, 1.0)


def test_a_region_is_the_union_of_its_values() -> None:
    reference, prediction = cube(), cube()
    reference[3], prediction[4] = 2 * reference[3], 2 * prediction[4]
    labels = {"background": 0, "whole": [1, 2], "core": 2}
    found = evaluate_surfaces(reference, prediction, SPACING, labels, 1.0)
    assert found["whole"] == Scores(1.0, 0.0, 1.0)
    assert found["core"].dice == 0.0
