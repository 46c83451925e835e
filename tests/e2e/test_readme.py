"""The README's walk-through, run literally; and its models in an environment without nnunet_fed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from documents import blocks, shell
from harness import PATIENCE, PLANS, environment, run, stock_environment, until

from nnunet_fed.study.site import Site
from nnunet_fed.transport.site.client import GrpcCommunicator

pytestmark = pytest.mark.e2e

PREDICT_WITHOUT_US = """
import sys
sys.modules["nnunet_fed"] = None
from nnunetv2.inference.predict_from_raw_data import predict_entry_point
predict_entry_point()
"""


def test_three_terminals_and_prediction(tmp_path: Path) -> None:
    scripts = blocks("README.md", "terminal")
    titles = list(scripts)
    assert [title.split(":")[0] for title in titles] == ["terminal 1", "terminal 2", "terminal 3", "terminal 2"]

    def terminal(script: str, name: str) -> subprocess.Popen[bytes]:
        # one site is enough that has what a user has
        return shell(script, tmp_path, tmp_path / name, environment if name == "terminal-3" else stock_environment)

    coordinator = terminal(scripts[titles[0]], "terminal-1")
    processes = [coordinator]
    try:
        ready = "'walk-through' for site_a, site_b"
        until(lambda: ready in (tmp_path / "terminal-1").read_text(), "the coordinator is ready", 60)
        # planning fails with no augmentation process, as in stock nnU-Net, unless our planner sees to it: it does
        sites = [terminal(scripts[title], title.split(":")[0].replace(" ", "-")) for title in titles[1:3]]
        processes += sites
        for site, log in zip(sites, ("terminal-2", "terminal-3"), strict=True):
            assert site.wait(PATIENCE) == 0, (tmp_path / log).read_text()[-3000:]
        watcher = GrpcCommunicator(Site(name="watcher", coordinator="127.0.0.1:7464", insecure=True))
        phases = {name: site["progress"]["phase"] for name, site in watcher.status()["sites"].items()}
        watcher.close()
        assert phases == {"site_a": "done", "site_b": "done"}
        os.killpg(coordinator.pid, signal.SIGTERM)
        assert coordinator.wait(20) in (0, -signal.SIGTERM)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    model = next((tmp_path / "site_a" / "results").rglob("fold_0")).parent
    assert (model / "fold_0" / "progress.png").is_file()
    summary = json.loads((model / "fold_0" / "validation" / "summary.json").read_text())
    assert summary["foreground_mean"]["Dice"] > 0.2

    # the walk-through's own prediction needs the exports of its terminal 2
    exports = "\n".join(line for line in scripts[titles[1]].splitlines() if line.startswith("export "))
    predict = terminal(f"{exports}\n{scripts[titles[3]]}", "prediction")
    assert predict.wait(PATIENCE) == 0, (tmp_path / "prediction").read_text()[-3000:]
    expected = {path.name for path in (tmp_path / "data" / "test" / "labelsTs").iterdir()}
    assert expected <= {path.name for path in (tmp_path / "predictions").iterdir()}

    images = tmp_path / "one"
    images.mkdir()
    first = min(expected).removesuffix(".nii.gz")
    (images / f"{first}_0000.nii.gz").symlink_to(tmp_path / "data" / "test" / "imagesTs" / f"{first}_0000.nii.gz")
    script = tmp_path / "predict.py"
    script.write_text(PREDICT_WITHOUT_US)
    for checkpoint in ("checkpoint_final.pth", "checkpoint_global.pth"):
        out = tmp_path / checkpoint.removesuffix(".pth")
        arguments = ["-i", images, "-o", out, "-d", 1, "-c", "3d_fullres", "-f", 0, "-tr", "nnUNetTrainerFedAvg"]
        arguments += ["-p", PLANS, "-chk", checkpoint, "-device", "cpu", "--disable_tta"]
        results = environment(nnUNet_results=tmp_path / "site_a" / "results")
        run([script, *arguments], results, tmp_path / "predict.log")
        assert (out / f"{first}.nii.gz").is_file()
