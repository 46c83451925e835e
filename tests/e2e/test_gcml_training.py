"""GCML by the stock command on real processes, with no coordinator: equality, absence, crashes, prediction."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from harness import (
    Planned,
    RunningFederation,
    RunningSite,
    Trained,
    peers,
    predict_without_us,
    same_bits,
    train_all,
    until,
)

pytestmark = pytest.mark.e2e

SITES = {"site_a": "site_a", "site_b": "site_b"}
GCML = {"name": "gcml", "topology": "ring", "ramp_steps": 4}
LOCKSTEP = {**GCML, "lockstep": True, "mutual_epochs": 2, "keep": "best"}


@pytest.fixture(scope="module")
def calm(planned: Planned, tmp_path_factory: pytest.TempPathFactory) -> RunningFederation:
    """Two peers in lockstep; epochs 1 and 2 of each are with the other's model."""
    with peers(planned, tmp_path_factory.mktemp("gcml") / "calm", SITES, method=LOCKSTEP, rounds=4) as running:
        train_all(running)
        return running


def phases(site: RunningSite) -> list[dict[str, Any]]:
    return [dict(phase) for phase in site.record()["mutual_phases"]]


def test_two_peers_learn_from_each_other_without_a_coordinator(calm: RunningFederation) -> None:
    for site, other in zip(calm.sites.values(), ("site_b", "site_a"), strict=True):
        (phase,) = phases(site)
        assert (phase["from"], phase["epoch"], phase["began"], phase["ended"]) == (other, 1, 1, 2)
        assert phase["scores"].keys() == {"local", "before", "incoming", "merged"}
        record = site.record()
        received = [entry for entry in record["transfers"] if entry["event"] == "received"]
        assert [entry["counter"] for entry in received][:2] == [1, 2]
        assert record["bytes_received"] == sum(entry["bytes"] for entry in received) > 3 * 300_000
        assert record["bytes_sent"] >= record["bytes_received"]
        names = {path.name for path in site.results.iterdir()}
        assert {"checkpoint_final.pth", "checkpoint_best.pth", "federation.json", "mailbox"} <= names
        assert "checkpoint_latest.pth" not in names
    assert not same_bits(*(site.checkpoint() for site in calm.sites.values()))


def test_28_killed_in_a_mutual_phase_and_resumed_the_study_ends_with_the_same_bits(
    planned: Planned, calm: RunningFederation, tmp_path: Path
) -> None:
    """And a peer process that is killed is started again."""
    with peers(planned, tmp_path / "run", SITES, method=LOCKSTEP, rounds=4) as running:
        a, b = running.sites.values()
        b.start()

        def processes() -> list[int]:
            found = subprocess.run(
                ["pgrep", "-f", f"nnunet_fed peer {b.results}"], capture_output=True, text=True, check=False
            )
            return [int(number) for number in found.stdout.split()]

        until(lambda: bool(processes()), "site_b has a peer process")
        os.kill(processes()[0], signal.SIGKILL)
        a.start()

        def in_phase() -> bool:
            path = a.results / "checkpoint_latest.pth"
            if not path.is_file():
                return False
            return a.checkpoint(path.name)["federation"]["method"]["incoming"] is not None

        until(in_phase, "site_a has a checkpoint from within a mutual phase")
        a.send(signal.SIGKILL)
        assert in_phase()
        a.start("--c")
        a.finish()
        b.finish()
    for name, site in running.sites.items():
        assert same_bits(site.checkpoint(), calm.sites[name].checkpoint())
        assert site.checkpoint()["current_epoch"] == 4
        timeless = [{**phase, "at": None} for phase in phases(site)]
        assert timeless == [{**phase, "at": None} for phase in phases(calm.sites[name])]
    assert any("started again" in event["text"] for event in b.record()["events"])


def test_12_a_peer_that_never_starts_changes_nothing(planned: Planned, alone: Trained, tmp_path: Path) -> None:
    with peers(planned, tmp_path / "one", SITES, method=GCML) as running:
        one = running.sites["site_a"]
        one.start()
        one.finish()
        left = subprocess.run(["pgrep", "-f", str(one.results)], capture_output=True, text=True, check=False)
        assert left.stdout == "", "the peer process has ended, too"
    plain = alone.sites["site_a"].checkpoint()
    assert same_bits(one.checkpoint(), plain), "one site is plain nnU-Net"
    assert one.checkpoint()["logging"]["mean_fg_dice"] == plain["logging"]["mean_fg_dice"]
    assert one.record()["mutual_phases"] == []


def test_sites_that_pull_at_random_learn_from_each_other(planned: Planned, tmp_path: Path) -> None:
    data, method = {**SITES, "site_c": "site_a"}, {**GCML, "topology": "bernoulli", "mode": "pull"}
    with peers(planned, tmp_path / "run", data, method=method, rounds=6) as running:
        train_all(running)
    transfers = {name: site.record()["transfers"] for name, site in running.sites.items()}
    pulled = {
        (name, entry["peer"], entry["counter"])
        for name, entries in transfers.items()
        for entry in entries
        if entry["event"] == "received"
    }
    given = {
        (entry["peer"], name, entry["counter"])
        for name, entries in transfers.items()
        for entry in entries
        if entry["event"] == "sent" and entry["verdict"] == "pulled"
    }
    assert pulled
    assert pulled == given, "who received asked for it"
    learnt = {(name, p["from"], p["counter"]) for name, site in running.sites.items() for p in phases(site)}
    assert learnt
    assert learnt <= pulled


@pytest.mark.parametrize("kept", ["final", "best"])
def test_32_the_model_predicts_with_stock_nnunet(
    calm: RunningFederation, phantom: Path, tmp_path: Path, kept: str
) -> None:
    site = calm.sites["site_b"]
    predict_without_us(site, phantom / "test" / "imagesTs", tmp_path / "out", f"checkpoint_{kept}.pth")
    images = {path.name.replace("_0000", "") for path in (phantom / "test" / "imagesTs").iterdir()}
    assert {path.name for path in (tmp_path / "out").glob("*.nii.gz")} == images
    final, best = (site.checkpoint(f"checkpoint_{name}.pth") for name in ("final", "best"))
    assert final["trainer_name"] == best["trainer_name"] == "nnUNetTrainer"
    assert final["network_weights"].keys() == best["network_weights"].keys()
