"""``nnunet_fed selftest`` with one method, its kill included."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from harness import environment, run

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        not os.environ.get("NNUNET_FED_SELFTEST"), reason="takes a minute or two: set NNUNET_FED_SELFTEST to run it"
    ),
]


def test_one_method(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "nnunet_fed", "selftest", "--device", "cpu", "--methods", "fedavg"]
    words += ["--out", tmp_path / "out", "--json", tmp_path / "figures.json"]
    run(words, environment(), tmp_path / "log", tmp_path / "printed")
    content = json.loads((tmp_path / "figures.json").read_text())
    assert content["verdict"] == "All 4 parts passed on cpu."
    assert [part["part"] for part in content["parts"]] == ["data and planning", "nnU-Net", "fedavg", "kill -9 and --c"]
    for part in content["parts"][1:3]:
        assert part["step_seconds"] > 0
        assert part["peak_memory"] > 1e8
        assert (part["compiled"], part["mixed_precision"]) == (False, False)
    log = (tmp_path / "out" / "killed" / "sites" / "site_b" / "train.log").read_text()
    assert "continued with --c in epoch 1" in log
    assert "| fedavg | passed |" in (tmp_path / "printed").read_text()
