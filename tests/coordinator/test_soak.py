"""A short version of benchmarks/exchange/soak.py: nothing grows with the rounds but the record."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nnunet_fed.coordinator import round_closer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "exchange"
FLAT = ("file descriptors", "spool and results, kB", "rows beside the record")


def test_attempts_given_up_full_disks_and_sites_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import soak

    monkeypatch.setattr(round_closer, "NOTE_SECONDS", 0.05)
    samples = soak.soak(tmp_path, 60, 3, 100)
    found = soak.quarters(samples)
    for what in FLAT:
        before, after = found[what]
        assert after <= soak.MOST[what] * before, (what, samples)
    del sys.modules["soak"]
