from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from planning_sites import preprocessed, read, set_paths
from workers import look_in_threads

from nnunet_fed.agreement.fingerprint import LocalFingerprint
from nnunet_fed.planners import joining, planning


@pytest.fixture(autouse=True)
def _look_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    look_in_threads(monkeypatch)


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return set_paths(monkeypatch, tmp_path)


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """No worker processes: a made-up fingerprint, and preprocessing that only makes the folder; returns its calls."""
    calls: list[list[str]] = []

    def made_up(dataset_id: int, total_cases: int, processes: int) -> LocalFingerprint:
        return LocalFingerprint(
            [[1.0, 1.0, 1.0]] * 2,
            [[20, 22, 24]] * 2,
            [0.9] * 2,
            [np.arange(9, dtype=np.float32)] * 2,
            {"organ": [float(dataset_id), 2.5], "lesion": []},
        )

    def preprocess(dataset_id: int, plans_name: str, configurations: list[str], processes: list[int]) -> None:
        calls.append(list(configurations))
        plans = read(dataset_id, f"{plans_name}.json")
        for name in configurations:
            (preprocessed(dataset_id) / plans["configurations"][name]["data_identifier"]).mkdir()

    for module in (planning, joining):
        monkeypatch.setattr(module, "extract", made_up)
    monkeypatch.setattr(planning, "preprocess_dataset", preprocess)
    return calls
