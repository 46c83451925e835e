"""Which model a site keeps as its best, where the pseudo Dice of some epochs, or of all, is undefined."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from in_process import InProcess, Killed
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from pseudo_dice import give_pseudo_dice

from nnunet_fed.trainers.nnUNetTrainerDitto import nnUNetTrainerDitto
from nnunet_fed.trainers.nnUNetTrainerFedAvg import nnUNetTrainerFedAvg
from nnunet_fed.trainers.parts.own_best import leave_out_undefined

NAN = math.nan


def checkpoint(trainer: Any, name: str) -> dict[str, Any]:
    path = Path(trainer.output_folder) / f"checkpoint_{name}.pth"
    loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
    return loaded


def log_of(trainer: Any) -> str:
    (path,) = Path(trainer.output_folder).glob("training_log_*.txt")
    return path.read_text()


@pytest.mark.parametrize(
    ("dice", "best"),
    [
        ([NAN, 0.5, NAN, 0.9], 4),
        ([0.9, NAN, 0.5, 0.4], 1),
        ([NAN, NAN, NAN, NAN], 4),
    ],
)
def test_the_best_of_the_epochs_with_a_dice(
    dice: list[float], best: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = InProcess(tmp_path, monkeypatch, {"a": 4})
    give_pseudo_dice(monkeypatch, lambda trainer, epoch: dice[epoch])
    trainer = sites.train(nnUNetTrainerFedAvg, sites.study(rounds=4, method={"name": "fedavg"}))["a"]
    assert checkpoint(trainer, "best")["current_epoch"] == best
    assert "New best EMA pseudo Dice: nan" not in log_of(trainer)
    undefined = next((number for number, value in enumerate(dice) if not math.isnan(value)), len(dice))
    assert log_of(trainer).count("checkpoint_best.pth is the newest model") == undefined


def test_a_site_without_foreground_among_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the newest model as its best, and the others are not touched; for two models at a site, too."""
    sites = InProcess(tmp_path, monkeypatch)
    give_pseudo_dice(monkeypatch, lambda trainer, epoch: NAN if trainer.own_site().name == "b" else [0.5, 0.1][epoch])
    trained = sites.train(nnUNetTrainerDitto, sites.study(method={"name": "ditto"}))
    assert [checkpoint(one, "best")["current_epoch"] for one in trained.values()] == [1, 2]
    best, final = (checkpoint(trained["b"], name)["network_weights"] for name in ("best", "final"))
    assert all(torch.equal(best[name], final[name]) for name in final)


def test_a_killed_training_keeps_what_its_choice_rests_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dice = [NAN, 0.5, NAN, 0.4]
    sites = InProcess(tmp_path, monkeypatch, {"a": 4})
    give_pseudo_dice(monkeypatch, lambda trainer, epoch: dice[epoch])
    study = sites.study(rounds=4, method={"name": "fedavg"})
    killed = sites.train_killed(nnUNetTrainerFedAvg, study, "round-0003/model")["a"]
    assert checkpoint(killed, "best")["current_epoch"] == 2
    assert killed.logger.get_value("ema_fg_dice", None)[1:] == [0.5, 0.5, pytest.approx(0.49)]


@given(dice=st.lists(st.floats(0, 1), min_size=1, max_size=20), folder=st.just("unused"))
def test_with_a_dice_in_every_epoch_the_average_is_nnunets(dice: list[float], folder: str) -> None:
    logger = MetaLogger(folder, False)
    for epoch, value in enumerate(dice):
        logger.log("mean_fg_dice", value, epoch)
        before = list(logger.get_value("ema_fg_dice", None))
        assert leave_out_undefined(logger.get_checkpoint(), epoch) == before[-1]
        assert logger.get_value("ema_fg_dice", None) == before


@pytest.mark.parametrize(("dice", "deployed"), [([NAN, 0.9, 0.5], 1), ([NAN, NAN, NAN], 2)])
def test_fine_tuning_deploys_the_best_epoch_with_a_dice(
    dice: list[float], deployed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = InProcess(tmp_path, monkeypatch, {"a": 4})
    give_pseudo_dice(monkeypatch, lambda trainer, epoch: [0.1, *dice][epoch])
    ended: list[dict[str, Any]] = []
    on_epoch_end = nnUNetTrainerFedAvg.on_epoch_end

    def noted(trainer: Any) -> None:
        ended.append({name: tensor.clone() for name, tensor in trainer.network.state_dict().items()})
        on_epoch_end(trainer)

    monkeypatch.setattr(nnUNetTrainerFedAvg, "on_epoch_end", noted)
    study = sites.study(rounds=1, method={"name": "fedavg", "finetune_epochs": 3})
    trainer = sites.train(nnUNetTrainerFedAvg, study)["a"]
    final = checkpoint(trainer, "final")["network_weights"]
    assert all(torch.equal(final[name], tensor) for name, tensor in ended[1 + deployed].items())
    assert "pseudo Dice nan" not in log_of(trainer)


def test_a_choice_of_version_0_1_that_was_undefined_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = InProcess(tmp_path, monkeypatch, {"a": 4})
    dice = [0.1, 0.2, 0.3, 0.9]
    give_pseudo_dice(monkeypatch, lambda trainer, epoch: dice[epoch])
    study = sites.study(rounds=1, method={"name": "fedavg", "finetune_epochs": 3})
    killed = sites.make(nnUNetTrainerFedAvg, study)["a"]
    step = killed.train_step

    def dying(batch: Any) -> Any:
        if killed.current_epoch == 2:
            raise Killed
        return step(batch)

    killed.train_step = dying
    with pytest.raises(Killed):
        sites.run({"a": killed})
    latest = Path(killed.output_folder) / "checkpoint_latest.pth"
    content = torch.load(latest, map_location="cpu", weights_only=False)
    content["federation"]["method"]["best_finetuned"], content["_best_ema"] = NAN, NAN
    torch.save(content, latest)
    resumed = sites.trainer(nnUNetTrainerFedAvg, study, "a")
    resumed.load_checkpoint(str(latest))
    sites.run({"a": resumed})
    assert resumed._best_finetuned == 0.9
    assert checkpoint(resumed, "best")["current_epoch"] == 4
