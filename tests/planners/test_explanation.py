"""The table at the end of planning says what this site would have planned alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planning_sites import SITE_A, SITE_B, plan, write_dataset
from rich.console import Console

from nnunet_fed.agreement.fingerprint import LocalFingerprint
from nnunet_fed.planners import planning
from nnunet_fed.planners.explanation import explanation_table


def fingerprint(spacing: float, length: int, intensity: float, cases: int) -> LocalFingerprint:
    values = np.linspace(intensity, intensity + 100, 50, dtype=np.float32)
    return LocalFingerprint([[spacing, 1.0, 1.0]] * cases, [[length] * 3] * cases, [1.0] * cases, [values, values])


@pytest.fixture
def scanners(raw: Path, instant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = {SITE_A: fingerprint(1.0, 60, 0, 2), SITE_B: fingerprint(2.0, 30, 500, 3)}
    write_dataset(raw, SITE_A, (0, 1))
    write_dataset(raw, SITE_B, (0, 1, 2))
    monkeypatch.setattr(planning, "extract", lambda dataset, total_cases, processes: made_up[dataset])


@pytest.mark.usefixtures("scanners")
@pytest.mark.parametrize("geometry", ["private", "lists"])
def test_which_data_made_the_difference(geometry: str) -> None:
    results = plan({"a": SITE_A, "b": SITE_B}, geometry=geometry)
    rows = {row.name: row for row in results["a"].explanation}
    assert (rows["training cases"].alone, rows["training cases"].federated) == ("2", "5")
    size = rows["3d_fullres: voxel size"]
    assert (size.alone, size.federated) == ("1 x 1 x 1", "2 x 1 x 1")
    assert size.cause == "voxel sizes of all cases"
    assert rows["3d_fullres: patch size"].alone != rows["3d_fullres: patch size"].federated
    low = rows["channel 0: percentile_00_5"]  # CT
    assert float(low.alone) < 1 < float(low.federated) + 1
    assert "channel 1: mean" not in rows, "MRI is normalized case by case"
    same = rows["channel 0: normalization"]
    assert (same.alone, same.cause) == (same.federated, "")
    console = Console(width=150, record=True)
    console.print(explanation_table(results["a"].explanation))
    assert "2 x 1 x 1" in console.export_text()


@pytest.mark.usefixtures("scanners")
@pytest.mark.parametrize("geometry", ["private", "lists"])
def test_a_site_that_is_alone_plans_the_same(geometry: str) -> None:
    rows = plan({"a": SITE_A}, geometry=geometry)["a"].explanation
    assert rows
    assert all(row.alone == row.federated for row in rows)


@pytest.mark.usefixtures("scanners")
def test_an_explanation_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("nothing to plan from")

    monkeypatch.setattr("nnunet_fed.planners.explanation.fingerprint_of", broken)
    result = plan({"a": SITE_A})["a"]
    assert result.explanation == ()
    assert "nothing to plan from" in caplog.text
