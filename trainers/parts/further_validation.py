"""nnU-Net's validation of models that a site has besides the one it deploys. Source: ours."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nnunet_fed.evaluation.foreground import foreground_dice
from nnunet_fed.trainers.parts.cascade import without_next_stages
from nnunet_fed.trainers.parts.lesion_report import evaluate_lesions
from nnunet_fed.trainers.parts.study_trainer import StudyTrainer


def validate_weights(
    trainer: StudyTrainer, weights: Mapping[str, torch.Tensor], name: str, save_probabilities: bool
) -> None:
    """What stands in ``validation`` of the deployed model, in ``NAME/validation`` of another one.

    Args:
        trainer: whose validation cases are predicted; it has its own weights again afterwards.
        weights: ``state_dict`` of this trainer's network.
        name: folder below the fold's.
        save_probabilities: as in nnU-Net.
    """
    with weights_of(trainer, weights):
        validate_below(trainer, name, save_probabilities)


def validate_below(trainer: StudyTrainer, name: str, save_probabilities: bool) -> None:
    """The same for the network as it is."""
    with below(trainer, name):
        predict_cases(trainer, trainer.do_split()[1], save_probabilities)
        evaluate_lesions(trainer)


def mean_dice(folder: Path) -> float | None:
    """The mean foreground Dice in ``validation`` of a folder; ``None`` where there is nothing to compare."""
    return foreground_dice(json.loads((folder / "validation" / "summary.json").read_text(encoding="utf-8")))


def predict_cases(trainer: StudyTrainer, cases: Sequence[str], save_probabilities: bool) -> None:
    """nnU-Net's validation of some of the cases, with a network that a cascade's next stage does not go on from."""
    trainer.__dict__["do_split"] = lambda: ([], list(cases))
    try:
        with without_next_stages(trainer):
            trainer.base_trainer.perform_actual_validation(trainer, save_probabilities)
    finally:
        del trainer.__dict__["do_split"]


@contextmanager
def below(trainer: StudyTrainer, name: str) -> Iterator[None]:
    """Let nnU-Net write its validation into a folder of its own."""
    folder = trainer.output_folder
    trainer.output_folder = str(Path(folder) / name)
    try:
        yield
    finally:
        trainer.output_folder = folder


@contextmanager
def weights_of(trainer: StudyTrainer, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let the trainer's network have other weights."""
    with weights_kept(trainer) as network:
        network.load_state_dict(weights)
        yield


@contextmanager
def weights_kept(trainer: StudyTrainer) -> Iterator[torch.nn.Module]:
    """The trainer's network, to be given other weights; it has its own again afterwards."""
    network: torch.nn.Module = trainer.bare(trainer.network)
    own: dict[str, Any] = copy.deepcopy(network.state_dict())
    try:
        yield network
    finally:
        network.load_state_dict(own)
