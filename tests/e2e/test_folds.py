"""Folds at once at one coordinator, by the stock commands: trained twice, chosen from, and predicted with together."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from harness import PATIENCE, PLANS, Planned, RunningFederation, RunningSite, command, federation, run, until

pytestmark = pytest.mark.e2e

FOLDS = ("0", "1")
SITES = {"site_a": "site_a", "site_b": "site_b"}


@pytest.fixture(scope="module")
def trained(planned: Planned, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFederation]:
    """Two sites that train two folds of FedSM at once; neither finds folds, and each process may make them."""
    method = {"name": "fedsm", "selector_steps_per_round": 1, "selector_patches": 1, "selector_min_accuracy": 0.0}
    few = {"rounds": 1, "iterations_per_epoch": 2, "folds": [0, 1], "method": method}
    folder = tmp_path_factory.mktemp("folds") / "run"
    with federation(planned, folder, SITES, {"nnUNet_fed_skip_validation": ""}, **few) as running:
        for site in [*running.sites.values()]:
            for splits in (site.folder / "preprocessed").glob("*/splits_final.json"):
                splits.unlink()
            running.sites[f"{site.name}, fold 1"] = replace(site, fold="1")
        for site in running.sites.values():
            site.log = site.folder / f"train_{site.fold}.log"
            site.start()
        second_start_is_refused(running.sites["site_a"])
        for site in running.sites.values():
            site.finish()
        yield running


def second_start_is_refused(site: RunningSite) -> None:
    until((site.results / "training.lock").is_file, "the first has the folder")
    again = replace(site, process=None)
    again.log = site.folder / "again.log"
    again.start("--c")
    assert again.process is not None
    assert again.process.wait(PATIENCE) == 1
    said = again.log.read_text()
    assert f"Error: Fold 0 is trained or validated already in {site.results}: process " in said
    assert "Traceback" not in said


def words_of(name: str, site: RunningSite, *rest: object) -> list[object]:
    return [command(name), *rest, "-c", "3d_fullres", "-tr", site.trainer, "-p", PLANS, "-f", *FOLDS]


def test_each_fold_is_a_run_of_its_own_and_leaves_nothing_of_a_lease(trained: RunningFederation) -> None:
    trainings = trained.watcher.status()["trainings"].values()
    assert sorted(training["fold"] for training in trainings) == [0, 1]
    for training in trainings:
        assert {of["standing"] for of in training["sites"].values()} == {"left"}
    for site in trained.sites.values():
        record = site.record()
        assert (record["fold"], len(record["rounds"])) == (int(site.fold), 1)
        assert not [*site.folder.rglob("*.lock")]
    checkpoints = [trained.sites[name].checkpoint("checkpoint_global.pth") for name in ("site_a", "site_a, fold 1")]
    assert checkpoints[0]["network_weights"].keys() == checkpoints[1]["network_weights"].keys()
    weights = [next(iter(checkpoint["network_weights"].values())) for checkpoint in checkpoints]
    assert not weights[0].equal(weights[1])


def test_no_site_trains_on_its_own_cases_of_the_fold(trained: RunningFederation) -> None:
    for name in SITES:
        validated = []
        splits = json.loads(next(trained.folder.glob(f"{name}/preprocessed/*/splits_final.json")).read_text())
        for site in (trained.sites[name], trained.sites[f"{name}, fold 1"]):
            summary = json.loads((site.results / "validation" / "summary.json").read_text())
            cases = {Path(entry["prediction_file"]).name.split(".")[0] for entry in summary["metric_per_case"]}
            assert cases == set(splits[int(site.fold)]["val"])
            assert site.record()["training_cases"] == len(set(splits[int(site.fold)]["train"]) - cases) == 4
            validated += cases
        assert len(set(validated)) == 2


def test_the_best_configuration_is_found_and_all_folds_predict(
    trained: RunningFederation, phantom: Path, tmp_path: Path
) -> None:
    """Both by nnU-Net's commands with the sites' models, and by ours with the super model."""
    site, images = trained.sites["site_a"], phantom / "test" / "imagesTs"
    bundle = json.loads((site.results.parent / "fedsm_bundle.json").read_text())
    assert list(bundle["folds"]) == sorted(FOLDS), "each fold is in it, though they ended at once"
    run(words_of("nnUNetv2_find_best_configuration", site, "1", "-np", "1"), site.environment, tmp_path / "best.log")
    (merged,) = site.results.parent.glob("crossval_results_folds_0_1")
    assert len(json.loads((merged / "summary.json").read_text())["metric_per_case"]) == 2
    assert (site.results.parents[1] / "inference_instructions.txt").is_file()
    shared = ["-i", images, "-o", tmp_path / "own", "-d", "1", "-device", "cpu", "--disable_tta"]
    run(words_of("nnUNetv2_predict", site, *shared), site.environment, tmp_path / "own.log")
    ours = [sys.executable, "-m", "nnunet_fed", "predict", "-i", images, "-o", tmp_path / "super"]
    ours += ["-m", site.results.parent, "-f", *FOLDS, "-device", "cpu", "--disable_tta", "-npp", "1", "-nps", "1"]
    run(ours, site.environment, tmp_path / "super.log")
    for out in ("own", "super"):
        assert len([*(tmp_path / out).glob("*.nii.gz")]) == 2
    assert len(json.loads((tmp_path / "super" / "routing.json").read_text())["cases"]) == 2
