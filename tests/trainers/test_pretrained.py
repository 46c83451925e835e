"""Trainings that start from pretrained weights: each method, whichever site has which file, and a file that is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import InProcess
from nnunetv2.run import run_training

from nnunet_fed.errors import ConfigurationError, DisagreementError
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.methods import METHODS
from nnunet_fed.trainers.nnUNetTrainerFedAvg import nnUNetTrainerFedAvg
from nnunet_fed.trainers.plugin import nnunet_fed_trainers as plugin

WITH_COORDINATOR = [name for name in METHODS if name not in ("custom", "gcml")]
HEADS = ".seg_layers."
NO_STEPS = 1e-30
"""A learning rate with which a training ends with the weights with which it began, bit for bit."""


@pytest.fixture
def sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InProcess:
    monkeypatch.setenv("nnUNet_fed_debug", "1")
    return InProcess(tmp_path, monkeypatch)


@pytest.fixture
def file(sites: InProcess, tmp_path: Path) -> Path:
    """A checkpoint of a network of another seed, for other classes."""
    trainer = sites.make(nnUNetTrainerFedAvg, sites.study(method={"name": "fedavg"}, seed=7))["a"]
    trainer.initialize()
    with torch.no_grad():
        for tensor in trainer.network.parameters():  # a step without a length would still move a bias from 0
            tensor.add_(0.5)
    return write(tmp_path / "pretrained.pth", trainer.network.state_dict())


def write(path: Path, weights: dict[str, Any]) -> Path:
    with_heads = {name: torch.cat([tensor] * 3) if HEADS in name else tensor for name, tensor in weights.items()}
    torch.save({"network_weights": with_heads, "optimizer_state": {}}, path)
    return path


def weights_in(path: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=False)["network_weights"]
    return weights


def study_of(sites: InProcess, method: str, **settings: Any) -> Federation:
    options = {"fedgs": {"threshold": 1.5}, "fedsm": {"selector_steps_per_round": 1}}.get(method, {})
    study = {"rounds": 1, "iterations_per_epoch": 1, "initial_lr": NO_STEPS, "seed": 3}
    return sites.study(method={"name": method, **options}, **{**study, **settings})


def with_file(trainer: Any, file: Path | None, continues: bool = False) -> Any:
    """As ``nnUNetv2_train ... -pretrained_weights FILE`` does it."""
    run_training.maybe_load_checkpoint(trainer, continues, False, None if file is None else str(file))
    return trainer


def assert_has(network: dict[str, torch.Tensor], pretrained: dict[str, torch.Tensor]) -> None:
    taken = [name for name in pretrained if HEADS not in name]
    assert len(taken) > 10
    for name in taken:
        assert torch.equal(network[name], pretrained[name]), name


@pytest.mark.parametrize("method", WITH_COORDINATOR)
def test_all_models_of_a_method_start_from_the_file(sites: InProcess, file: Path, method: str) -> None:
    """The deployed one and the global one, at a site that is not the first by name, too."""
    trainers = sites.make(getattr(plugin, METHODS[method].own_trainer()), study_of(sites, method))
    for trainer in trainers.values():
        with_file(trainer, file)
    sites.run(trainers)
    for trainer in trainers.values():
        for name in ("final", METHODS[method].LAST_MODEL):
            assert_has(weights_in(Path(trainer.output_folder) / f"checkpoint_{name}.pth"), weights_in(file))
