"""``nnunet_fed simulate`` on real processes, with nnU-Net's forked augmentation workers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from harness import environment

pytestmark = pytest.mark.e2e


def test_a_round_with_forked_augmentation_workers_and_a_site_too_small_for_folds(phantom: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    split = [sys.executable, "-m", "nnunet_fed", "split", str(phantom / "site_b"), str(small), "--sites", "1"]
    subprocess.run([*split, "--limit", "2"], check=True, timeout=60)
    out = tmp_path / "out"
    sites = ["--site", f"large={phantom / 'site_a'}", "--site", f"small={small / 'site_1'}"]
    subprocess.run(
        [sys.executable, "-m", "nnunet_fed", "simulate", *sites, "--method", "fedavg", "--rounds", "1", "--iterations",
         "3", "--val-iterations", "1", "--lr", "0.05", "--momentum", "0.9", "--out", str(out)],
        env=environment(nnUNet_n_proc_DA=2), check=True, timeout=400,
    )  # fmt: skip
    summary = json.loads((out / "summary.json").read_text())
    assert summary["method"] == "fedavg"
    assert summary["rounds"] == 1
    large, small_site = summary["sites"]["large"], summary["sites"]["small"]
    assert (large["train_cases"], large["val_cases"]) == (4, 1)
    assert (small_site["train_cases"], small_site["val_cases"], small_site["fold"]) == (2, 2, "all")
    assert set(large["dice_per_class"]) == {"organ", "lesion"}
    assert summary["mean_dice"] == large["dice"], "who validates on training cases is left out of the mean"
    assert large["bytes_sent"] > 700_000
    record = json.loads((out / "record.json").read_text())
    (run,) = [run for run in record["runs"].values() if run["purpose"] == "training"]
    (model,) = [collective for collective in run["collectives"] if collective["key"] == "round-0000/model"]
    assert {site: entry["weight"] for site, entry in model["sites"].items()} == {"large": 4.0, "small": 2.0}
    assert model["sites"]["large"]["bytes"] == large["bytes_sent"]


def test_a_failing_site_ends_the_run_with_its_own_words(phantom: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    split = [sys.executable, "-m", "nnunet_fed", "split", str(phantom / "site_b"), str(other), "--sites", "1"]
    subprocess.run(split, check=True, timeout=60)
    description = other / "site_1" / "dataset.json"
    content = json.loads(description.read_text())
    content["channel_names"] = {"0": "CT"}
    description.write_text(json.dumps(content))
    sites = ["--site", f"a={phantom / 'site_a'}", "--site", f"b={other / 'site_1'}"]
    run = subprocess.run(
        [sys.executable, "-m", "nnunet_fed", "simulate", *sites, "--rounds", "1", "--out", str(tmp_path / "out")],
        env=environment(), timeout=200, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    assert "channel" in run.stderr
    assert "CT" in run.stderr
    left = subprocess.run(["pgrep", "-f", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert left.stdout == ""
