"""Federated training by the stock command, on real processes: equality, crashes, absence."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from faults import REPETITIONS
from harness import (
    PATIENCE,
    PLANS,
    Planned,
    Trained,
    environment,
    federation,
    kill_in_exchange,
    run,
    same_bits,
    train_all,
    until,
)

pytestmark = pytest.mark.e2e

PLAIN_TRAINING = """
import itertools, random, sys
import numpy as np, torch
from batchgeneratorsv2.transforms.noise import gaussian_blur
from nnunetv2.run.run_training import get_trainer_from_args
torch.set_num_threads(1)
trainer = get_trainer_from_args("1", "3d_fullres", 0, "nnUNetTrainer", "{plans}", device=torch.device("cpu"))
trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = {epochs}, 4, 1
trainer.initial_lr = 0.05
configure = trainer.configure_optimizers
def with_momentum():
    optimizer, schedule = configure()
    optimizer.param_groups[0]["momentum"] = 0.9
    return optimizer, schedule
trainer.configure_optimizers = with_momentum
looks = itertools.count()
gaussian_blur.time = lambda: next(looks) ** 2  # what is measured first seems faster: the blur that is ours, too
random.seed(0), np.random.seed(0), torch.manual_seed(0)
trainer.run_training()
"""


def test_all_that_left_a_site_is_listed(undisturbed: Trained) -> None:
    for site in undisturbed.sites.values():
        lines = (site.results / "outgoing.jsonl").read_text().splitlines()
        uploads = [entry for entry in map(json.loads, lines) if entry["what"] == "upload"]
        assert sum(entry["bytes"] for entry in uploads if entry["key"].startswith("round-")) == sum(
            entry["bytes_sent"] for entry in site.record()["rounds"]
        )
        models = [entry for entry in uploads if entry["verb"] == "mean"]
        assert all(len(entry["tensors"]) > 10 for entry in models)
        assert not any(str(site.folder) in line or "case" in line for line in lines)


def test_one_site_is_plain_nnunet_and_equal_sites_are_one_site(
    planned: Planned, alone: Trained, tmp_path: Path
) -> None:
    with federation(planned, tmp_path / "two", {"a": "site_a", "b": "site_a"}, weighting="uniform") as two:
        train_all(two)
    federated = alone.sites["site_a"].checkpoint()

    paths = {f"nnUNet_{what}": tmp_path / "plain" / what for what in ("raw", "preprocessed", "results")}
    planned.restudy("site_a", planned.study, paths["nnUNet_preprocessed"])
    script = tmp_path / "plain.py"
    script.write_text(PLAIN_TRAINING.format(plans=PLANS, epochs=3))
    run([script], environment(**paths), tmp_path / "plain.log")
    (final,) = paths["nnUNet_results"].rglob("checkpoint_final.pth")
    plain = torch.load(final, map_location="cpu", weights_only=False)

    assert same_bits(federated, plain)
    for site in two.sites.values():
        assert same_bits(site.checkpoint(), federated)
    assert federated["current_epoch"] == plain["current_epoch"]
    assert federated["logging"]["mean_fg_dice"] == plain["logging"]["mean_fg_dice"]


def test_everything_that_stock_nnunet_writes_is_written(undisturbed: Trained) -> None:
    for site in undisturbed.sites.values():
        names = {path.name for path in site.results.iterdir()}
        assert {"checkpoint_final.pth", "checkpoint_best.pth", "checkpoint_global.pth", "federation.json"} <= names
        assert "debug.json" in names
        assert "checkpoint_latest.pth" not in names, "as in stock nnU-Net"
        assert not [name for name in names if name.endswith((".part", ".new"))]
        assert {"plans.json", "dataset.json", "dataset_fingerprint.json"} <= {
            path.name for path in site.results.parent.iterdir()
        }
    a, b = (site.checkpoint() for site in undisturbed.sites.values())
    assert all(torch.equal(a["network_weights"][name], b["network_weights"][name]) for name in a["network_weights"])
    assert a["trainer_name"] == "nnUNetTrainer"
    record = undisturbed.sites["site_a"].record()
    assert [entry["scope"] for entry in record["rounds"]] == ["round-0000", "round-0001", "round-0002"]
    assert record["rounds"][0]["weights"] == {"site_a": 4.0, "site_b": 4.0}
    assert record["bytes_sent"] > 3 * 300_000


def test_killed_sites_go_on_bit_identically(planned: Planned, undisturbed: Trained, tmp_path: Path) -> None:
    with federation(planned, tmp_path / "run", {"site_a": "site_a", "site_b": "site_b"}) as running:
        a, b = running.sites["site_a"], running.sites["site_b"]
        kill_in_exchange(running, "model")
        until(lambda: running.closed("round-0001/model"), "the second round is over")

        # between rounds: b trains, and its last checkpoint is the one after the second round
        until(lambda: b.checkpoint("checkpoint_latest.pth")["federation"]["pending"] is None, "b has a checkpoint")
        b.send(signal.SIGKILL)
        b.start("--c")
        a.finish()
        b.finish()
        events = [(event["site"], event["text"]) for event in running.happened()["events"]]

        a.start()
        assert a.process is not None
        assert a.process.wait(PATIENCE) != 0
        refusal = a.log.read_text().splitlines()[-1]
        assert refusal.startswith("Error: Site 'site_a' has already contributed")
        assert "--c" in refusal
        assert "new-attempt" in refusal

    for name, site in running.sites.items():
        assert same_bits(site.checkpoint(), undisturbed.sites[name].checkpoint())
    assert ("site_a", "joined with --c") in events
    assert ("site_a", "continued with --c in epoch 1") in events
    assert ("site_b", "continued with --c in epoch 2") in events
    assert len(a.record()["rounds"]) == 3


@pytest.mark.parametrize("repetition", range(REPETITIONS // 2))
def test_a_coordinator_killed_at_random_instants_of_a_training(
    planned: Planned, undisturbed: Trained, tmp_path: Path, repetition: int
) -> None:
    chance = random.Random(repetition)
    with federation(planned, tmp_path / "run", {"site_a": "site_a", "site_b": "site_b"}) as running:
        for site in running.sites.values():
            site.start()
        until(lambda: bool(running.happened()["runs"]), "a site has joined")
        for _ in range(5):
            time.sleep(chance.uniform(0, 4))
            running.restart()
        for site in running.sites.values():
            site.finish()
    for name, site in running.sites.items():
        assert same_bits(site.checkpoint(), undisturbed.sites[name].checkpoint())


def test_a_paused_site_catches_up_and_ends_with_the_others(planned: Planned, tmp_path: Path) -> None:
    # a method whose rounds have several collectives, and which needs more than the model from them
    method = {"name": "fedgs", "variant": "fedgs_norm", "threshold": 2, "truncation_guard": False}
    changes = {"rounds": 8, "min_sites": 1, "deadline_minutes": 0.25, "method": method}
    with federation(planned, tmp_path / "run", {"site_a": "site_a", "site_b": "site_b"}, **changes) as running:
        a, b = running.sites["site_a"], running.sites["site_b"]
        a.start()
        b.start()
        until(lambda: running.closed("round-0000/model"), "the first round is over")
        b.send(signal.SIGSTOP)
        until(lambda: running.closed("round-0002/model"), "two rounds have gone on without b")
        b.send(signal.SIGCONT)
        a.finish()
        b.finish()
        status = running.happened()
    events = [event["text"] for event in status["events"] if event["site"] == "site_b"]
    assert "absent from round-0001/factor" in events
    assert "came back" in events
    assert any(text.startswith("caught up from epoch") for text in events)
    final = {name: site.checkpoint() for name, site in running.sites.items()}
    assert final["site_b"]["current_epoch"] == final["site_a"]["current_epoch"] == 8
    assert len(final["site_b"]["logging"]["train_losses"]) == 8
    weights = [checkpoint["network_weights"] for checkpoint in final.values()]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    last = b.record()["rounds"][-1]
    assert last["scope"] == "round-0007"
    assert list(last["weights"]) == ["site_a", "site_b"]


def test_a_finished_training_needs_no_coordinator(undisturbed: Trained, tmp_path: Path) -> None:
    site = undisturbed.sites["site_a"].copied(tmp_path / "site_a")  # others read what it writes
    before = site.checkpoint()
    for arguments in (["--val"], ["--c"]):
        site.start(*arguments)
        site.finish()
    assert same_bits(before, site.checkpoint())
