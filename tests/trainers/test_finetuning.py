"""The phases of a training that fine-tunes: learning rates, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.methods import METHODS
from nnunet_fed.trainers.nnUNetTrainerFedOAP import PRETRAINED, check_pretrained_weights, nnUNetTrainerFedOAP
from nnunet_fed.trainers.parts.finetuning import TwoPhaseLRScheduler


def rate(schedule: TwoPhaseLRScheduler, optimizer: torch.optim.Optimizer, epoch: int) -> float:
    schedule.step(epoch)
    value: float = optimizer.param_groups[0]["lr"]
    return value


@given(epochs=st.integers(1, 50), alone=st.integers(1, 10), factor=st.floats(0.01, 1), order=st.randoms())
def test_9_the_learning_rate_is_a_function_of_the_epoch(epochs: int, alone: int, factor: float, order: Any) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    schedule = TwoPhaseLRScheduler(optimizer, 0.01, epochs, factor * 0.01, alone)
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


def test_pretrained_weights_of_another_network(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    own, stock = tmp_path / "own.pth", tmp_path / "stock.pth"
    torch.save({"network_weights": network.state_dict()}, own)
    torch.save({"network_weights": network[:1].state_dict()}, stock)
    check_pretrained_weights(network, ["nnUNetv2_train", PRETRAINED, str(own)])
    check_pretrained_weights(network, ["nnUNetv2_train", "1"])
    with pytest.raises(ConfigurationError, match=r"not of a network of FedOAP, they lack 1.bias and 1 more"):
        check_pretrained_weights(network, ["nnUNetv2_train", PRETRAINED, str(stock)])
    with pytest.raises(ConfigurationError, match="there is no such file"):
        check_pretrained_weights(network, [sys.argv[0], PRETRAINED, str(tmp_path / "none.pth")])


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
