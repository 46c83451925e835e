"""The phases of a training that fine-tunes: learning rates, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from in_process import InProcess, Killed, same_arrays, same_training, weights
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.methods.tensors import shared_tensors
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.methods import METHODS
from nnunet_fed.trainers.nnUNetTrainerFedGS import nnUNetTrainerFedGS
from nnunet_fed.trainers.nnUNetTrainerFedOAP import nnUNetTrainerFedOAP
from nnunet_fed.trainers.parts.checkpoint import network_weights
from nnunet_fed.trainers.parts.finetuning import TwoPhaseLRScheduler


def rate(schedule: TwoPhaseLRScheduler, optimizer: torch.optim.Optimizer, epoch: int) -> float:
    schedule.step(epoch)
    value: float = optimizer.param_groups[0]["lr"]
    return value


@given(epochs=st.integers(1, 50), alone=st.integers(1, 10), factor=st.floats(0.01, 1), order=st.randoms())
def test_9_the_learning_rate_is_a_function_of_the_epoch(epochs: int, alone: int, factor: float, order: Any) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    rounds = PolyLRScheduler(optimizer, 0.01, epochs)
    schedule = TwoPhaseLRScheduler(rounds, epochs, optimizer, factor * 0.01, alone)
    assert optimizer.param_groups[0]["lr"] == 0.01, "as nnU-Net's own at the start"
    chosen = list(range(epochs + alone))
    order.shuffle(chosen)
    for epoch in chosen:  # in whatever order: a resumed training begins anywhere
        expected = 0.01 * (1 - epoch / epochs) ** 0.9
        if epoch >= epochs:
            expected = factor * 0.01 * (1 - (epoch - epochs) / alone) ** 0.9
        assert rate(schedule, optimizer, epoch) == expected


def test_every_method_has_a_trainer_that_nnunet_finds() -> None:
    from nnunet_fed.trainers.plugin import nnunet_fed_trainers as plugin

    for method, table in METHODS.items():
        if method != "custom":
            name = table.own_trainer()
            assert name in plugin.__all__
            assert getattr(plugin, name).method == method


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"finetune_epochs": -1}, "finetune_epochs"),
        ({"finetune_lr_factor": 0}, "finetune_lr_factor"),
        ({"tau": 1.5}, "tau"),
        ({"sigma": -0.1}, "sigma"),
        ({"perturbation_weight": 2}, "perturbation_weight"),
        ({"heads": 0}, "heads"),
        ({"adapter": "res4"}, "adapter"),
    ],
)
def test_options_outside_their_bounds(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Federation.model_validate({"name": "s", "sites": ["a"], "rounds": 1, "method": {"name": "fedoap", **options}})


@pytest.mark.parametrize(("training", "validation", "missing"), [(["a"], [], "validation"), ([], ["b"], "training")])
def test_a_fold_without_cases_is_refused(
    training: list[str], validation: list[str], missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = tuple(SimpleNamespace(identifiers=names) for names in (training, validation))
    monkeypatch.setattr(nnUNetTrainer, "get_tr_and_val_datasets", lambda trainer: sets)
    trainer = object.__new__(nnUNetTrainerFedOAP)
    trainer.fold, trainer.preprocessed_dataset_folder_base = 2, "somewhere"
    with pytest.raises(ConfigurationError, match=rf"Fold 2 has no {missing} case\. Correct .* in somewhere"):
        trainer.get_tr_and_val_datasets()


# --------------------------------------------------------------------------------------------------------------- FedGS

FEDGS = {"name": "fedgs", "variant": "fedgs_norm", "threshold": 1.5, "log_base": 2.0}


def test_fedgs_fine_tunes_without_counting_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = InProcess(tmp_path, monkeypatch)
    rounds = sites.train(nnUNetTrainerFedGS, sites.study(method=FEDGS))
    common = sites.rooms.means["round-0001/model"]
    study = sites.study(method={**FEDGS, "finetune_epochs": 2, "finetune_lr_factor": 0.5})
    tuned = sites.train(nnUNetTrainerFedGS, study)
    assert same_arrays(sites.rooms.means["round-0001/model"], common), "the rounds are the same"
    for site, one in tuned.items():
        assert one.current_epoch == 4
        assert (one.scaler.steps, one.scaler._before, one.scaler._residual) == (0, {}, {})
        assert rounds[site].diagnostics["scaled_share"] > 0
        folder = Path(one.output_folder)
        after_rounds, final = (network_weights(folder / f"checkpoint_{name}.pth") for name in ("global", "final"))
        assert all(
            torch.equal(tensor, torch.from_numpy(common[name]))
            for name, tensor in shared_tensors(rounds[site].network).items()
        )
        assert any(not torch.equal(after_rounds[name], final[name]) for name in final)
    assert not same_arrays(weights(tuned["a"].network), weights(tuned["b"].network)), "each site has its own"


def test_fedgs_goes_on_in_the_middle_of_its_fine_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = InProcess(tmp_path, monkeypatch, {"a": 4})
    study = sites.study(method={**FEDGS, "finetune_epochs": 2})
    calm = sites.train(nnUNetTrainerFedGS, study)["a"]
    killed = sites.make(nnUNetTrainerFedGS, study)["a"]
    step = killed.train_step

    def dying(batch: Any) -> Any:
        if killed.current_epoch == 3:
            raise Killed
        return step(batch)

    killed.train_step = dying
    with pytest.raises(Killed):
        sites.run({"a": killed})
    resumed = sites.trainer(nnUNetTrainerFedGS, study, "a")
    resumed.load_checkpoint(str(Path(resumed.output_folder) / "checkpoint_latest.pth"))
    assert resumed.is_finetuning
    sites.run({"a": resumed})
    assert same_training(resumed, calm)
