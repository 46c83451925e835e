"""The one figure of a validation: nnU-Net's mean foreground Dice, where classes may be missing. Source: ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def foreground_dice(summary: Mapping[str, Any]) -> float | None:
    """nnU-Net's mean foreground Dice, over the classes that occur.

    nnU-Net's own is not a number as soon as one class is in no reference and in no prediction.

    Args:
        summary: content of nnU-Net's ``summary.json``.

    Returns:
        nnU-Net's figure if all classes occur; ``None`` if none does.
    """
    dice = float(summary["foreground_mean"]["Dice"])
    if math.isfinite(dice):
        return dice
    classes = [float(metrics["Dice"]) for metrics in summary.get("mean", {}).values()]
    there = [value for value in classes if math.isfinite(value)]
    return sum(there) / len(there) if there else None
