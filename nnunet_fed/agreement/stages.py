"""Configurations of nnU-Net's plans that build on others: the stages of its cascade."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIRST_STAGES = {"3d_cascade_fullres": "3d_lowres"}
"""By the second stage of a cascade, as nnU-Net's planners name them, for those who have no plans yet."""


def stages_of(configuration: str) -> tuple[str, ...]:
    """What is trained, one after the other, until a configuration is."""
    first = FIRST_STAGES.get(configuration)
    return (configuration,) if first is None else (first, configuration)


def to_preprocess(plans: Mapping[str, Any], configuration: str) -> tuple[str, ...]:
    """Configurations whose preprocessed cases the training of a configuration needs, with its stages; its own last.

    Args:
        plans: nnU-Net's.
        configuration: one of them.
    """
    content = plans["configurations"][configuration]
    first = content.get("previous_stage")
    return (*(() if first is None else to_preprocess(plans, first)), content.get("inherits_from", configuration))
