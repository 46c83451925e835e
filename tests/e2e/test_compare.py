"""``nnunet_fed compare`` on real processes, killed while it trains, and called again."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from harness import PATIENCE, environment, until
from warm import Forked

pytestmark = pytest.mark.e2e
METHODS = ("pooled", "fedavg")


def start(phantom: Path, out: Path, said: Path) -> Forked:
    sites = [part for site in ("site_a", "site_b") for part in ("--site", f"{site}={phantom / site}")]
    return Forked(
        [sys.executable, "-m", "nnunet_fed", "compare", *sites, "--methods", ",".join(METHODS), "--seeds", "1",
         "--rounds", "1", "--iterations", "2", "--val-iterations", "1", "--lr", "0.05", "--momentum", "0.9",
         "--threads", "1", "--out", str(out)],
        environment(), said / "errors", said / "printed",
    )  # fmt: skip


def end_what_is_left(out: Path) -> None:
    """Of an arm whose comparison was killed: each of its processes leads a session of its own, and has a log there."""
    for process in (int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdecimal()):
        with suppress(OSError):  # it has ended, or is another user's
            if Path(f"/proc/{process}/fd/1").readlink().is_relative_to(out):
                os.killpg(process, signal.SIGKILL)


def initial_weights(run: Path) -> str:
    """Digest on which the sites of an arm agreed."""
    text = (run / "record.json").read_text()
    [training] = [one for one in json.loads(text)["runs"].values() if one["purpose"] == "training"]
    [common] = [one for one in training["collectives"] if one["key"] == "start/model"]
    return str(common["digest"])


def test_a_killed_comparison_goes_on_with_the_arm_that_it_was_at(phantom: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed = start(phantom, out, tmp_path)
    try:
        until(
            lambda: any(out.glob("unfinished/fedavg-0-*/sites/site_a/train.log")),
            "the second arm has started",
        )
        killed.kill()
        killed.wait()
    finally:
        end_what_is_left(out)
    assert [path.name for path in (out / "runs").iterdir()] == ["pooled-0"]
    finished = (out / "runs" / "pooled-0" / "summary.json").stat()

    for said in ("printed", "errors"):
        (tmp_path / said).unlink()
    run_again = start(phantom, out, tmp_path)
    try:
        status = run_again.wait(PATIENCE)
    finally:
        run_again.send_signal(signal.SIGTERM)
    printed, errors = ((tmp_path / said).read_text() for said in ("printed", "errors"))
    assert status == 0, errors
    assert "pooled, seed 0, is there already" in errors
    assert (out / "runs" / "pooled-0" / "summary.json").stat().st_mtime_ns == finished.st_mtime_ns
    assert sorted(path.name for path in (out / "runs").iterdir()) == ["fedavg-0", "pooled-0"]
    assert "Differences in Dice" in printed
    content = json.loads((out / "compare.json").read_text())
    rows = list(csv.DictReader((out / "compare.csv").open()))
    same_cases_and_figures(out, content, rows)
    assert "# Comparison" in (out / "compare.md").read_text()


def same_cases_and_figures(out: Path, content: dict[str, Any], rows: list[dict[str, str]]) -> None:
    assert tuple(content["methods"]) == METHODS
    assert len({initial_weights(out / "runs" / f"{method}-0") for method in METHODS}) == 1
    scored = {
        name: [(row["site"], row["case"], row["class"]) for row in rows if row["method"] == name] for name in METHODS
    }
    assert scored["pooled"] == scored["fedavg"]
    assert {site for site, _, _ in scored["pooled"]} == {"site_a", "site_b"}
    sites = json.loads((out / "runs" / "fedavg-0" / "summary.json").read_text())["sites"]
    for site, summary in sites.items():
        dice = content["methods"]["fedavg"]["dice"][site]["mean"]
        assert dice == pytest.approx(summary["dice"]["final"]), "that of nnU-Net's own validation"
    pooled = json.loads((out / "runs" / "pooled-0" / "summary.json").read_text())["sites"]["pooled"]
    assert (pooled["train_cases"], pooled["val_cases"]) == (8, 2)
    assert content["methods"]["fedavg"]["bytes"] > 1e6
