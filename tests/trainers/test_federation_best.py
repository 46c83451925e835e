"""``best = "federation"``: the same round, and the same bits, at all sites."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from at_coordinator import AtCoordinator
from in_process import InProcess, same_arrays
from pseudo_dice import give_pseudo_dice

from nnunet_fed.errors import RoundClosedError
from nnunet_fed.methods.tensors import shared_tensors, to_arrays
from nnunet_fed.trainers.nnUNetTrainerDitto import nnUNetTrainerDitto
from nnunet_fed.trainers.nnUNetTrainerFedAdam import nnUNetTrainerFedAdam
from nnunet_fed.trainers.nnUNetTrainerFedAvg import nnUNetTrainerFedAvg
from nnunet_fed.trainers.nnUNetTrainerFedGS import nnUNetTrainerFedGS
from nnunet_fed.trainers.parts.federation_best import BEST_MODEL, FederationBestTrainer

NAN = math.nan
FEDAVG = {"name": "fedavg"}
ROUNDS = 3
WITH_ONE_MODEL = [
    (nnUNetTrainerFedAvg, FEDAVG),
    (nnUNetTrainerFedAdam, {"name": "fedadam"}),
    (nnUNetTrainerFedGS, {"name": "fedgs", "threshold": 1.5, "log_base": 2.0}),
]
DICE = {"a": [0.9, 0.5, 0.1], "b": [0.2, 0.6, 0.7]}
"""With three training cases at a and five at b: means of 0.4625, 0.5625 and 0.475. Each site alone would keep another
round than the second, and so would a plain mean of both."""


def of_sites(dice: dict[str, list[float]], per_round: int = 1) -> Callable[[Any, int], float]:
    def of_epoch(trainer: Any, epoch: int) -> float:
        if epoch % per_round != per_round - 1:
            return 0.99  # of an epoch that ends no round
        values = dice[trainer.own_site().name]
        return values[min(epoch // per_round, len(values) - 1)]

    return of_epoch


def best_of(folder: str | Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(Path(folder) / "checkpoint_best.pth", map_location="cpu", weights_only=False)
    return loaded


def tensors(weights: dict[str, Any], like: Any) -> dict[str, Any]:
    return to_arrays({name: weights[name] for name in shared_tensors(like.bare(like.network))})


@pytest.mark.parametrize(("trainer", "method"), WITH_ONE_MODEL, ids=lambda value: str(value)[-10:])
def test_all_sites_keep_the_common_model_of_the_same_round(
    trainer: type[Any], method: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = InProcess(tmp_path, monkeypatch)
    give_pseudo_dice(monkeypatch, of_sites(DICE, 2))
    trained = sites.train(trainer, sites.study(rounds=ROUNDS, local_epochs=2, method=method, best="federation"))
    model = next(mean for key, mean in sites.rooms.means.items() if key.startswith("round-0001/model"))
    for one in trained.values():
        kept = best_of(one.output_folder)
        assert kept["current_epoch"] == 4
        assert same_arrays(tensors(kept["network_weights"], one), model)
        assert kept["federation"]["best"]["dice"] == pytest.approx(0.5625)


def test_without_it_nothing_is_exchanged_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = InProcess(tmp_path, monkeypatch)
    sites.train(nnUNetTrainerFedAvg, sites.study(method=FEDAVG))
    assert not [key for key in sites.rooms._contributions if "pseudo" in key or "best" in key]


def test_a_site_with_two_models_keeps_its_own_of_that_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is judged is what a site deploys; the global model of the round is in the checkpoint beside it."""
    sites = InProcess(tmp_path, monkeypatch)
    give_pseudo_dice(monkeypatch, of_sites(DICE))
    study = sites.study(rounds=ROUNDS, method={"name": "ditto"}, best="federation")
    trained = sites.train(nnUNetTrainerDitto, study)
    kept = {site: best_of(one.output_folder) for site, one in trained.items()}
    assert [one["current_epoch"] for one in kept.values()] == [2, 2]
    common = [tensors(one["federation"]["method"]["network"], trained["a"]) for one in kept.values()]
    assert same_arrays(common[0], common[1])
    assert same_arrays(common[0], sites.rooms.means["round-0001/model"])
    own = [tensors(one["network_weights"], trained["a"]) for one in kept.values()]
    assert not same_arrays(own[0], own[1])


@pytest.mark.parametrize(
    ("dice", "best"),
    [
        ({"a": [NAN] * 3, "b": [NAN, 0.8, 0.7]}, 2),  # no vote
        ({"a": [0.9, NAN, NAN], "b": [NAN, 0.6, NAN]}, 1),  # of whom there is
        ({"a": [NAN] * 3, "b": [NAN] * 3}, 3),  # the newest
        ({"a": [0.5] * 3, "b": [0.5] * 3}, 1),  # the earliest of equals
    ],
)
def test_a_site_without_a_dice_has_no_vote(
    dice: dict[str, list[float]], best: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = InProcess(tmp_path, monkeypatch)
    give_pseudo_dice(monkeypatch, of_sites(dice))
    trained = sites.train(nnUNetTrainerFedAvg, sites.study(rounds=ROUNDS, method=FEDAVG, best="federation"))
    for one in trained.values():
        kept = best_of(one.output_folder)
        assert kept["current_epoch"] == best
        assert same_arrays(tensors(kept["network_weights"], one), sites.rooms.means[f"round-000{best - 1}/model"])


def test_fine_tuning_leaves_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = InProcess(tmp_path, monkeypatch)
    give_pseudo_dice(monkeypatch, lambda trainer, epoch: [0.5, 0.4, 0.9, 0.95][epoch])
    study = sites.study(method={**FEDAVG, "finetune_epochs": 2}, best="federation")
    for one in sites.train(nnUNetTrainerFedAvg, study).values():
        assert best_of(one.output_folder)["current_epoch"] == 1


# --------------------------------------------------------------------------------------------------- killed and away


def test_a_killed_training_keeps_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = InProcess(tmp_path, monkeypatch)
    study = sites.study(rounds=ROUNDS, method=FEDAVG, best="federation", val_iterations_per_epoch=2)
    calm = {site: best_of(one.output_folder) for site, one in sites.train(nnUNetTrainerFedAvg, study).items()}
    for key in ("round-0001/pseudo-dice", "round-0002/best"):
        for site, one in sites.train_killed(nnUNetTrainerFedAvg, study, key).items():
            kept = best_of(one.output_folder)
            assert kept["federation"]["best"] == calm[site]["federation"]["best"]
            assert all(torch.equal(kept["network_weights"][n], t) for n, t in calm[site]["network_weights"].items())
            assert kept["logging"]["mean_fg_dice"] == calm[site]["logging"]["mean_fg_dice"]


def test_killed_between_its_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vote is in the checkpoint from which it goes on, and the best model not yet on disk."""
    sites = InProcess(tmp_path, monkeypatch)
    give_pseudo_dice(monkeypatch, of_sites(DICE))
    study = sites.study(rounds=ROUNDS, method=FEDAVG, best="federation")
    trained = sites.make(nnUNetTrainerFedAvg, study)
    save = FederationBestTrainer.save_at_epoch_start

    def dying(trainer: Any, name: str) -> None:
        if name == "checkpoint_best.pth" and trainer.current_epoch == 2:
            raise KeyboardInterrupt
        save(trainer, name)

    with monkeypatch.context() as patch:
        patch.setattr(FederationBestTrainer, "save_at_epoch_start", dying)
        with pytest.raises(KeyboardInterrupt):
            sites.run(trained)
    resumed = {site: sites.trainer(nnUNetTrainerFedAvg, study, site) for site in sites.cases}
    for one in resumed.values():
        assert best_of(one.output_folder)["current_epoch"] == 1
        one.load_checkpoint(str(Path(one.output_folder) / "checkpoint_latest.pth"))
    sites.run(resumed)
    for one in resumed.values():
        kept = best_of(one.output_folder)
        assert kept["current_epoch"] == 2
        assert same_arrays(tensors(kept["network_weights"], one), sites.rooms.means["round-0001/model"])


def test_a_vote_that_closed_without_a_site_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = InProcess(tmp_path, monkeypatch)
    give_pseudo_dice(monkeypatch, of_sites(DICE))
    trained = sites.make(nnUNetTrainerFedAvg, sites.study(rounds=ROUNDS, method=FEDAVG, best="federation"))
    start = nnUNetTrainerFedAvg.on_train_start

    def late(trainer: Any) -> None:
        start(trainer)
        add = trainer.communicator.sum

        def closed(key: str, array: Any) -> Any:
            sites.rooms.means[key] = {"value": add(key, array)}
            raise RoundClosedError(key)

        if trainer.own_site().name == "b":
            trainer.communicator.sum = closed

    monkeypatch.setattr(nnUNetTrainerFedAvg, "on_train_start", late)
    sites.run(trained)
    assert [best_of(one.output_folder)["current_epoch"] for one in trained.values()] == [2, 2]


@pytest.mark.parametrize("method", ["fedavg", "ditto"])
def test_at_a_coordinator_a_site_that_was_away_takes_the_best_model(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """b is away in the second round, which is the best, and in the third; it comes back for the last one."""
    trainer = {"fedavg": nnUNetTrainerFedAvg, "ditto": nnUNetTrainerDitto}[method]
    sites = AtCoordinator(tmp_path, monkeypatch)
    give_pseudo_dice(monkeypatch, of_sites({"a": [0.3, 0.9, 0.4, 0.1], "b": [0.2, 0.9, 0.4, 0.1]}))
    settings = {"rounds": 4, "method": {"name": method}, "best": "federation"}
    study = sites.study(**settings)
    alone = sites.study(**settings, min_sites=1, deadline_minutes=0.003)
    key = "round-0001/model"
    sites.go(trainer, study, dying=dict.fromkeys("ab", key))
    sites.go(trainer, study, alone, continues=True, sites="a", dying={"a": "round-0003/model"})
    record = sites.go(trainer, study, continues=True)
    kept = [best_of(sites.results(site)) for site in "ab"]
    assert sites.record("a")["best_of_federation"] == {"round": 1, "pseudo_dice": 0.9}
    assert sites.record("b")["best_of_federation"] == {"round": 1, "pseudo_dice": 0.9}
    same = all(torch.equal(kept[1]["network_weights"][name], one) for name, one in kept[0]["network_weights"].items())
    events = [event["text"] for event in record["events"] if event["site"] == "b"]
    if method == "fedavg":
        assert same
        assert any("took the federation's best model, of round-0001" in text for text in events)
    else:
        assert kept[1]["current_epoch"] == 1, "the best of the rounds that it was in"
        assert any("has no model of its own of that round" in text for text in events)
    given = [c["key"] for run in record["runs"].values() for c in run.get("collectives", [])]
    assert (f"round-0003/{BEST_MODEL}" in given) == (method == "fedavg")
    assert np.isfinite(kept[1]["logging"]["train_losses"]).all()
