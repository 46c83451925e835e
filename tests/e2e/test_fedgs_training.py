"""FedGS by the stock command: properties 1, 3 and 16 of the method's notes on whole trainings, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from harness import PATIENCE, Planned, RunningFederation, Trained, federation, kill_in_exchange, same_bits, train_all

pytestmark = pytest.mark.e2e

SITES = {"site_a": "site_a", "site_b": "site_b"}


def fedgs(**options: Any) -> dict[str, Any]:
    return {"name": "fedgs", **options}


@pytest.fixture(scope="module")
def normalised(planned: Planned, tmp_path_factory: pytest.TempPathFactory) -> RunningFederation:
    """The variant with the most state: R, and the mean factor of the round before."""
    folder = tmp_path_factory.mktemp("normalised") / "run"
    with federation(planned, folder, SITES, method=fedgs(variant="fedgs_norm", classes=["lesion"])) as running:
        train_all(running)
        return running


def test_1_without_strength_it_is_federated_averaging(planned: Planned, undisturbed: Trained, tmp_path: Path) -> None:
    with federation(planned, tmp_path / "run", SITES, method=fedgs(strength=0)) as running:
        train_all(running)
    for name, site in running.sites.items():
        assert same_bits(site.checkpoint(), undisturbed.sites[name].checkpoint())
        assert [entry["diagnostics"]["best_scalar"] for entry in site.record()["rounds"]] == [1, 1, 1]


def test_3_local_training_is_that_of_federated_averaging(normalised: RunningFederation, undisturbed: Trained) -> None:
    scaled = False
    for name, site in normalised.sites.items():
        mine, theirs = (run.sites[name].checkpoint() for run in (normalised, undisturbed))
        losses, others = (checkpoint["logging"]["train_losses"] for checkpoint in (mine, theirs))
        assert losses[0] == others[0], "the first round begins alike: no step feels its factor, calibration is unseen"
        scaled = scaled or site.record()["rounds"][0]["diagnostics"]["scaled_share"] > 0
        assert not same_bits(mine, theirs)
    assert scaled


def test_16_killed_sites_send_what_they_would_have_sent(
    planned: Planned, normalised: RunningFederation, tmp_path: Path
) -> None:
    method = fedgs(variant="fedgs_norm", classes=["lesion"])
    with federation(planned, tmp_path / "run", SITES, method=method) as running:
        kill_in_exchange(running, "factor")
        for site in running.sites.values():
            site.finish()
    for name, site in running.sites.items():
        assert same_bits(site.checkpoint(), normalised.sites[name].checkpoint())
        mine, theirs = (run.sites[name].record()["rounds"] for run in (running, normalised))
        assert [entry["diagnostics"] for entry in mine] == [entry["diagnostics"] for entry in theirs]


def test_17_diagnostics_are_in_the_record_and_the_log(normalised: RunningFederation) -> None:
    for site in normalised.sites.values():
        rounds = site.record()["rounds"]
        assert len(rounds) == 3
        for entry in rounds:
            figures = entry["diagnostics"]
            assert all(math.isfinite(value) for value in figures.values())
            assert {"best_scalar", "residual", "federation_mean_factor"} < figures.keys()
            assert 1 <= figures["mean_factor"] <= 3
            assert 0 <= figures["scaled_share"] <= 1
        assert "fedgs in round-0002: mean_factor" in site.log.read_text()


def test_a_study_without_any_lesion_ends_in_a_sentence(planned: Planned, tmp_path: Path) -> None:
    with federation(planned, tmp_path / "run", SITES, method=fedgs(classes=["ghost"])) as running:
        for site in running.sites.values():
            (dataset,) = (site.folder / "preprocessed").glob("*/dataset.json")
            content = json.loads(dataset.read_text())
            content["labels"]["ghost"] = 3
            dataset.write_text(json.dumps(content))
            site.start()
        for site in running.sites.values():
            assert site.process is not None
            assert site.process.wait(PATIENCE) == 1
            last = site.log.read_text().splitlines()[-1]
            assert last.startswith("Error: No patch of any site holds a whole lesion of the classes ghost")
