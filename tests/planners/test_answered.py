"""How often a site answers while planning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.exchange.communicator import LocalCommunicator, LocalFederation
from nnunet_fed.planners.answered import MOST, AnsweredCollectives


def test_a_question_gets_a_bounded_number_of_different_answers(tmp_path: Path) -> None:
    path = tmp_path / "data" / "answered.json"

    def seat() -> AnsweredCollectives:
        """Of a new planning."""
        return AnsweredCollectives(LocalCommunicator(LocalFederation(["a"]), "a"), path)

    for _ in range(2):
        for number in range(MOST):
            assert seat().sum("planning/x", np.array([number])).tolist() == [number]
    with pytest.raises(ConfigurationError, match=f"'planning/x' in {MOST} different ways.*delete .*answered.json"):
        seat().sum("planning/x", np.array([MOST]))
    assert seat().sum("planning/y", np.array([MOST])).tolist() == [MOST]
