"""The mean foreground Dice where classes do not occur."""

from __future__ import annotations

from math import nan

import pytest

from nnunet_fed.evaluation.foreground import foreground_dice


@pytest.mark.parametrize(
    ("nnunets", "classes", "expected"),
    [
        (0.7, [0.6, 0.8], 0.7),
        (nan, [0.6, nan], 0.6),
        (nan, [nan, 0.0], 0.0),
        (nan, [nan, nan], None),
    ],
    ids=["all occur", "one does not", "what is made up counts", "none does"],
)
def test_the_mean_over_the_classes_that_occur(nnunets: float, classes: list[float], expected: float | None) -> None:
    means = {str(number): {"Dice": value} for number, value in enumerate(classes, 1)}
    assert foreground_dice({"foreground_mean": {"Dice": nnunets}, "mean": means}) == expected
