"""FedSM by the stock commands: the branches against plain nnU-Net and FedAvg, crashes, and prediction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import (
    Planned,
    RunningFederation,
    Trained,
    command,
    federation,
    kill_in_exchange,
    predict_without_us,
    run,
    same_bits,
    train_all,
)

pytestmark = pytest.mark.e2e

SITES = {"site_a": "site_a", "site_b": "site_b"}


def fedsm(**options: Any) -> dict[str, Any]:
    return {"name": "fedsm", "selector_steps_per_round": 2, "selector_patches": 2, **options}


@pytest.fixture(scope="module")
def trained(planned: Planned, tmp_path_factory: pytest.TempPathFactory) -> RunningFederation:
    """Two sites, three rounds, with the validation of all three models."""
    folder = tmp_path_factory.mktemp("fedsm") / "run"
    method = fedsm(best_model_gate=True, selector_min_accuracy=0.0, gamma=0.0)
    with federation(planned, folder, SITES, {"nnUNet_fed_skip_validation": ""}, method=method) as running:
        train_all(running)
        return running


def weights_of(site: Any, name: str) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = site.checkpoint(name)["network_weights"]
    return weights


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_12_the_global_branch_is_federated_averaging(trained: RunningFederation, undisturbed: Trained) -> None:
    for name, site in trained.sites.items():
        averaged = undisturbed.sites[name].checkpoint()
        assert equal(weights_of(site, "checkpoint_global.pth"), averaged["network_weights"])
        assert not equal(weights_of(site, "checkpoint_final.pth"), averaged["network_weights"])
        assert same_bits(site.checkpoint("checkpoint_global.pth"), averaged), "its optimizer too"


def test_every_site_has_every_personalized_model(trained: RunningFederation) -> None:
    a, b = trained.sites.values()
    assert equal(weights_of(a, "checkpoint_personal_site_b.pth"), weights_of(b, "checkpoint_final.pth"))
    assert equal(weights_of(b, "checkpoint_personal_site_a.pth"), weights_of(a, "checkpoint_final.pth"))
    selectors = [site.results / "fedsm_selector.pth" for site in (a, b)]
    assert selectors[0].read_bytes() == selectors[1].read_bytes()
    assert (a.results.parent / "fedsm_bundle.json").is_file()


def test_three_models_are_validated(trained: RunningFederation) -> None:
    for site in trained.sites.values():
        for folder in ("validation", "global/validation", "super/validation"):
            summary = json.loads((site.results / folder / "summary.json").read_text())
            assert len(summary["metric_per_case"]) == 1
            assert (site.results / folder / "lesions.json").is_file()
        bundle = json.loads((site.results.parent / "fedsm_bundle.json").read_text())["folds"]["0"]
        assert bundle["validation_dice"].keys() == SITES.keys(), "the gate has been agreed on"
        record = site.record()
        assert sum(map(sum, record["selector"]["confusion"])) == 2
        assert sum(record["super_model_choices"].values()) == 1
        assert all(entry["diagnostics"]["deviation"] > 0 for entry in record["rounds"])


def test_17_what_a_site_sends(trained: RunningFederation) -> None:
    for name, site in trained.sites.items():
        entries = [json.loads(line) for line in (site.results / "outgoing.jsonl").read_text().splitlines()]
        sent = {
            entry["key"].partition("/")[2]: entry["bytes"]
            for entry in entries
            if entry["what"] == "upload" and entry["key"].startswith("round-0001/")
        }
        assert sent["model"] == sent["personal"], "two models"
        selector = sent["selector-0"]
        assert selector == sent["selector-1"] < sent["model"]
        rest = sum(sent.values()) - 2 * sent["model"] - 2 * selector
        state = 3 * selector if name == "site_a" else 0
        assert 0 <= rest - state < 5000, "but for a few numbers; the first site publishes the selector and its moments"


def test_2_without_pull_a_personalized_model_is_local_training_and_19_a_crash_changes_nothing(
    planned: Planned, undisturbed: Trained, alone: Trained, tmp_path: Path
) -> None:
    method = fedsm(softpull_self_weight=1.0, share_personal=False)
    with federation(planned, tmp_path / "crash", SITES, method=method) as crash:
        kill_in_exchange(crash, "personal-sites")
        for site in crash.sites.values():
            site.finish()
    with federation(planned, tmp_path / "site_b", {"site_b": "site_b"}) as other:
        train_all(other)
    for name, site in crash.sites.items():
        assert same_bits(site.checkpoint("checkpoint_global.pth"), undisturbed.sites[name].checkpoint())
        assert not list(site.results.glob("checkpoint_personal_*"))
        by_itself = {**alone.sites, **other.sites}[name]
        assert same_bits(site.checkpoint(), by_itself.checkpoint()), "one site is plain nnU-Net"


def test_the_super_model_predicts_as_stock_nnunet_does_with_the_chosen_checkpoint(
    trained: RunningFederation, phantom: Path, tmp_path: Path
) -> None:
    site = trained.sites["site_a"]
    images, model = phantom / "test" / "imagesTs", site.results.parent

    def predict(name: str, *arguments: Any) -> None:
        words = [command("nnunet_fed"), "predict", "-i", images, "-m", model, "-o", tmp_path / name, *arguments]
        words += ["-device", "cpu", "--disable_tta", "-npp", 0, "-nps", 0]
        run(words, site.environment, tmp_path / "predict.log")

    predict("super")
    predict("forced", "--force", "site_b")
    predict_without_us(site, images, tmp_path / "stock", "checkpoint_personal_site_b.pth")

    routing = json.loads((tmp_path / "super" / "routing.json").read_text())["cases"]
    assert {f"{case}.nii.gz" for case in routing} == {path.name for path in (tmp_path / "super").glob("*.nii.gz")}
    assert len(routing) == len(list(images.iterdir()))
    for case, entry in routing.items():
        stock_bytes = (tmp_path / "stock" / f"{case}.nii.gz").read_bytes()
        assert (tmp_path / "forced" / f"{case}.nii.gz").read_bytes() == stock_bytes
        if entry["choice"] == "site_b":
            assert (tmp_path / "super" / f"{case}.nii.gz").read_bytes() == stock_bytes
