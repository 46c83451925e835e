"""``nnunet_fed simulate`` on real processes, with nnU-Net's forked augmentation workers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import PATIENCE, environment, run

pytestmark = pytest.mark.e2e


def test_a_round_with_forked_augmentation_workers_and_a_site_too_small_for_folds(phantom: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    split = [sys.executable, "-m", "nnunet_fed", "split", str(phantom / "site_b"), str(small), "--sites", "1"]
    subprocess.run([*split, "--limit", "2"], check=True, timeout=60)
    out = tmp_path / "out"
    sites = ["--site", f"large={phantom / 'site_a'}", "--site", f"small={small / 'site_1'}"]
    words = [sys.executable, "-m", "nnunet_fed", "simulate", *sites, "--method", "fedavg", "--rounds", "1"]
    words += ["--iterations", "3", "--val-iterations", "1", "--lr", "0.05", "--momentum", "0.9", "--cross-site"]
    words += ["--trainer", "nnUNetTrainerDA5"]
    run([*words, "--out", out], environment(nnUNet_n_proc_DA=2), tmp_path / "log", tmp_path / "printed")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["method"] == "fedavg"
    assert summary["rounds"] == 1
    large, small_site = summary["sites"]["large"], summary["sites"]["small"]
    assert (large["train_cases"], large["val_cases"]) == (4, 1)
    assert (small_site["train_cases"], small_site["val_cases"], small_site["fold"]) == (2, 2, "all")
    assert set(large["dice_per_class"]) == {"organ", "lesion"}
    assert summary["mean_dice"] == large["dice"], "who validates on training cases is left out of the mean"
    assert large["bytes_sent"] > 300_000
    for final in out.glob("sites/*/nnUNet_results/*/nnUNetTrainerFedAvg__*/fold_*/checkpoint_final.pth"):
        assert torch.load(final, map_location="cpu", weights_only=False)["trainer_name"] == "nnUNetTrainerDA5"
    results_by_lesion_size(out, summary, (tmp_path / "printed").read_text())
    dice = {name: site["dice"]["final"] for name, site in summary["sites"].items()}
    assert summary["cross_site"] == {"large": dice, "small": dice}, "the common model, validated by both ways"
    record = json.loads((out / "record.json").read_text())
    (training,) = [one for one in record["runs"].values() if one["purpose"] == "training"]
    (model,) = [collective for collective in training["collectives"] if collective["key"] == "round-0000/model"]
    assert {site: entry["weight"] for site, entry in model["sites"].items()} == {"large": 4.0, "small": 2.0}
    assert training["cross_site"] == summary["cross_site"]
    assert model["sites"]["large"]["bytes"] == large["bytes_sent"]


def results_by_lesion_size(out: Path, summary: dict[str, Any], shown: str) -> None:
    plans = [
        json.loads(path.read_text()) for path in out.glob("sites/*/nnUNet_preprocessed/*/nnUNetFedSmallPlans.json")
    ]
    assert len(plans) == 2
    thresholds = plans[0]["federation"]["small_lesions"]
    assert thresholds == plans[1]["federation"]["small_lesions"] == summary["small_lesions"]
    assert 0 < thresholds["lesion"] < thresholds["organ"]
    for site, cases in (("large", 1), ("small", 2)):
        (path,) = out.glob(f"sites/{site}/nnUNet_results/*/*/fold_*/validation/lesions.json")
        content = json.loads(path.read_text())
        assert len(content.pop("cases")) == cases
        assert {name: summary["sites"][site][name] for name in content} == content
        assert content["lesions"]["organ"]["all"] == cases
    for name in ("lesions", "dice_small", "dice_large", "lesion_recall_small"):
        assert summary[name] == summary["sites"]["large"][name], "the other site has no validation cases"
    assert "By lesion size" in shown


def test_a_failing_site_ends_the_run_with_its_own_words(phantom: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    split = [sys.executable, "-m", "nnunet_fed", "split", str(phantom / "site_b"), str(other), "--sites", "1"]
    subprocess.run(split, check=True, timeout=60)
    description = other / "site_1" / "dataset.json"
    content = json.loads(description.read_text())
    content["channel_names"] = {"0": "CT"}
    description.write_text(json.dumps(content))
    sites = ["--site", f"a={phantom / 'site_a'}", "--site", f"b={other / 'site_1'}"]
    simulation = subprocess.run(
        [sys.executable, "-m", "nnunet_fed", "simulate", *sites, "--rounds", "1", "--out", str(tmp_path / "out")],
        env=environment(), timeout=PATIENCE, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert simulation.returncode == 2
    assert "Traceback" not in simulation.stderr
    assert "channel" in simulation.stderr
    assert "CT" in simulation.stderr
    left = subprocess.run(["pgrep", "-f", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert left.stdout == ""
