"""What version 0.1 left on disk in the middle of a study goes on with this version, whatever the method.

Each site is a thread, of which one trains at a time; between them is the real network. Real processes: ``tests/e2e``.
"""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from left_behind import CPU, Site01, quick_nnunet, train_together
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from serving import Served
from typer.testing import CliRunner
from version_0_1 import SITES, STUDIES, LeftBehind

from nnunet_fed.cli.app import app
from nnunet_fed.exchange.keys import scope_of
from nnunet_fed.simulation.simulate import free_ports
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.toml import to_toml
from nnunet_fed.transport.site.client import GrpcCommunicator

COORDINATED = [method for method in STUDIES if method != "gcml"]


@pytest.fixture(autouse=True)
def nnunet(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_nnunet(monkeypatch)


def contributions(record: dict[str, Any], key: str) -> dict[str, Any]:
    """By site, to the collective of that key."""
    found = [c for run in record["runs"].values() for c in run["collectives"] if c["key"] == key]
    assert len(found) == 1
    sites: dict[str, Any] = found[0]["sites"]
    return sites


def scopes_beside_rounds(record: dict[str, Any]) -> set[str]:
    """Of the trainings, without the number that may follow."""
    trainings = [run for run in record["runs"].values() if run["purpose"] == "training"]
    scopes = {scope_of(collective["key"]) for run in trainings for collective in run["collectives"]}
    return {re.sub(r"-\d+$", "", scope) for scope in scopes} - {"round"}


@pytest.mark.parametrize("method", COORDINATED)
def test_a_study_goes_on(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, facts = LeftBehind(method, tmp_path / "study"), STUDIES[method]
    study = Federation.read(left.study_file)
    assert study.digest_of_fold(study.fold) == facts["digest"]
    sites = [Site01(left, name, method, monkeypatch) for name in SITES]
    before = [site.checkpoint("checkpoint_latest.pth") for site in sites]
    pending = [state["federation"]["pending"] is not None for state in before]
    assert pending == [method != "local"] * len(sites), "killed in the exchange"

    with ExitStack() as stack:
        served = Served(study, left.state, stack)
        watcher = GrpcCommunicator(served.settings("watcher"))
        stack.callback(watcher.close)
        earlier = watcher.status(record=True)
        train_together(sites, served, monkeypatch)
        record = watcher.status(record=True)

    epochs = study.epochs + getattr(study.method, "finetune_epochs", 0)
    for site, state in zip(sites, before, strict=True):
        site.assert_went_on(state, epochs, study.iterations_per_epoch)
        assert (site.fold / f"checkpoint_{study.method.LAST_MODEL}.pth").is_file()
        scopes = [entry["scope"] for entry in site.record()["rounds"]]
        assert scopes == [f"round-{number:04d}" for number in range(study.rounds)]
    assert list(record["runs"]) == facts["runs"]
    assert scopes_beside_rounds(record) <= {*study.method.SCOPES_BEFORE, *study.method.SCOPES_AFTER}
    assert record["digest"] == facts["digest"]
    for key, given in facts["open"].items():
        assert {site: told["digest"] for site, told in contributions(earlier, key).items()} == given
        now = contributions(record, key)
        assert now.keys() == set(SITES)
        for site in given:
            assert now[site] == contributions(earlier, key)[site], "what was contributed stands"


def test_peers_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other: a site reads a letter that waits, another one goes on with a model that it was trying."""
    left = LeftBehind("gcml", tmp_path / "study")
    study = Federation.read(left.study_file)
    assert study.digest == STUDIES["gcml"]["digest"]
    sites = [Site01(left, name, "gcml", monkeypatch) for name in SITES]
    peers = {name: f"127.0.0.1:{port}" for name, port in zip(SITES, free_ports(len(SITES)), strict=True)}
    letters = sorted(path.name for path in (sites[0].fold / "mailbox" / "inbox").iterdir())
    assert letters
    assert sites[1].checkpoint("checkpoint_latest.pth")["federation"]["method"]["incoming"] is not None
    for site in sites:
        settings = {"name": site.name, "coordinator": "127.0.0.1:1", "insecure": True, "peers": peers}
        file = left.site(site.name) / "site.toml"
        file.write_text(to_toml({**settings, "listen": peers[site.name]}))
        monkeypatch.setenv("nnUNet_fed_site", str(file))
        before, phases = site.checkpoint("checkpoint_latest.pth"), site.record()["mutual_phases"]
        trainer = site.trainer()
        trainer.run_training()
        trainer.perform_actual_validation()
        site.assert_went_on(before, study.epochs, study.iterations_per_epoch)
        assert len(site.record()["mutual_phases"]) > len(phases)
        assert site.record()["mutual_phases"][: len(phases)] == phases
    first, second = (site.record()["mutual_phases"][-1] for site in sites)
    assert f"{first['from']}@{first['counter']}" in letters
    assert second["from"] == SITES[0]


@pytest.mark.parametrize("method", STUDIES)
def test_stock_nnunet_predicts(method: str, tmp_path: Path) -> None:
    """With the checkpoint that version 0.1 was killed with, where our trainers are asked for only if they must be."""
    left = LeftBehind(method, tmp_path)
    fold = left.fold(SITES[0])
    predictor = nnUNetPredictor(use_mirroring=False, device=CPU, perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(
        str(fold.parent), (int(fold.name.removeprefix("fold_")),), "checkpoint_latest.pth"
    )
    assert type(predictor.network).__name__ == ("FedOAPNetwork" if method == "fedoap" else "PlainConvUNet")
    (image,) = left.images.iterdir()
    voxels, properties = SimpleITKIO().read_images([str(image)])
    segmentation = predictor.predict_single_npy_array(voxels, properties)
    assert segmentation.shape == voxels.shape[1:]
    assert set(np.unique(segmentation)) <= {0, 1, 2}


def test_a_finished_training_is_validated_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = LeftBehind("finished", tmp_path)
    monkeypatch.delenv("nnUNet_fed_skip_validation")
    site = Site01(left, SITES[0], "fedavg", monkeypatch)
    files = [site.fold / "validation" / name for name in ("summary.json", "lesions.json")]
    before = [json.loads(file.read_text()) for file in files]
    for file in files:
        file.unlink()
    site.trainer(validation=True).perform_actual_validation()
    summary, lesions = (json.loads(file.read_text()) for file in files)
    assert summary["foreground_mean"] == before[0]["foreground_mean"]
    assert summary["mean"] == before[0]["mean"]
    assert lesions == before[1]


def test_report_of_a_finished_study(tmp_path: Path) -> None:
    left = LeftBehind("finished", tmp_path)
    done = CliRunner().invoke(app, ["report", str(left.folder), "--out", str(tmp_path / "report.html")])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "report.html").read_text()
    for site, told in json.loads((left.folder / "summary.json").read_text())["sites"].items():
        assert site in page
        assert f"{told['dice']['final']:.3f}" in page


def test_report_of_a_coordinator_in_the_middle_of_a_study(tmp_path: Path) -> None:
    left = LeftBehind("fedavg", tmp_path)
    done = CliRunner().invoke(app, ["report", str(left.state), "--out", str(tmp_path / "report.html")])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "report.html").read_text()
    assert all(told in page for told in (*SITES, "iterations_per_epoch", "joined"))
