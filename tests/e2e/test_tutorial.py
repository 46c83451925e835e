"""docs/tutorial.md, followed literally."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
from documents import ROOT, blocks, shell
from harness import PATIENCE

pytestmark = pytest.mark.e2e

PAGE = "docs/tutorial.md"


def test_from_two_folders_of_images_to_a_report(tmp_path: Path) -> None:
    steps = blocks(PAGE, "step")
    assert (ROOT / PAGE).read_text().count("```bash") == len(steps), "a block without a number would not be run"
    folder = tmp_path / "empty"
    folder.mkdir()
    said = {}
    for title, script in steps.items():
        log = tmp_path / title.split(":")[0]
        process = shell(script, folder, log)
        try:
            assert process.wait(PATIENCE) == 0, log.read_text()[-3000:]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # the simulation ends its sites, which no other signal reaches
                process.wait()
        said[title.split(":")[0]] = log.read_text()
    assert '"labels"' in said["step 1"]
    for column in ("Train. cases", "Val. cases", "Dice", "Sent", "Received", "By lesion size"):
        assert column in said["step 2"], "a column that the page explains"
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert set(summary["sites"]) == {"site_a", "site_b"}
    assert min(site["dice"]["final"] for site in summary["sites"].values()) > 0.2
    told(folder, said["step 3"])
    page = (folder / "run" / "report.html").read_text()
    assert {f'id="{section}"' for section in ("study", "data", "dice", "training", "traffic", "images")} <= set(
        re.findall(r'id="[a-z]+"', page)
    )


def told(folder: Path, listed: str) -> None:
    """The files that the page names are there."""
    table = (ROOT / PAGE).read_text().split("## 3.")[1].split("## 4.")[0]
    [fold] = folder.glob("run/sites/site_a/nnUNet_results/*/*/fold_0")
    names = re.findall(r"`([^`]+)`", "".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE)))
    assert len(names) == 10
    for name in names:
        places = [
            folder / name.replace("SITE", "site_a"),
            folder / "run" / "sites" / "site_a" / name,
            fold / name.removeprefix(".../fold_0/"),
        ]
        assert any(place.exists() for place in places), name
    assert "checkpoint_final.pth" in listed
    assert '"what"' in listed
