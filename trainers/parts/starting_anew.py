"""A site that starts anew in a training that goes on: its rounds were undone, or its state is not finite. Source: ours.

It becomes a site that comes late: what its method knows is as before the first epoch, for every method alike, and the
model is the federation's newest. Its log stays, up to the epoch from which it goes on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nnunet_fed.files import move
from nnunet_fed.prediction.checkpoint_files import LATEST_CHECKPOINT
from nnunet_fed.trainers.parts import warm_up

if TYPE_CHECKING:
    from nnunet_fed.trainers.parts.catching_up import CatchingUpTrainer
    from nnunet_fed.trainers.parts.study_trainer import StudyTrainer

UNDONE = "undone"
"""Folder, beside the checkpoints, for those of rounds that were undone."""


def begin_anew(trainer: StudyTrainer) -> None:
    """Give a trainer the network, the optimizer and the method's state that it has before the first epoch."""
    trainer.take_study()
    trainer._best_ema = None
    if trainer.grad_scaler is not None:
        trainer.grad_scaler = torch.amp.GradScaler(trainer.device.type)
    trainer.was_initialized = False
    warm_up.forget(trainer)
    trainer.initialize()
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)


def is_finite(trainer: CatchingUpTrainer) -> bool:
    """Whether every tensor that a checkpoint of the training would hold is finite; figures may be undefined."""
    optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
    return _is_finite([trainer.bare(trainer.network).state_dict(), optimizers, trainer.method_state()])


def _is_finite(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, np.ndarray):
        return not np.issubdtype(value.dtype, np.floating) or bool(np.isfinite(value).all())
    return not isinstance(value, list | tuple) or all(map(_is_finite, value))


def set_aside(folder: Path, into: str = UNDONE, kept: Collection[str] = (LATEST_CHECKPOINT,)) -> None:
    """Move checkpoints away: nnU-Net would go on from them, or predict with them.

    Args:
        folder: of the fold.
        into: name of the folder in it to which they go.
        kept: names of those that stay.
    """
    for path in folder.glob("checkpoint_*.pth"):
        if path.name not in kept:
            (folder / into).mkdir(exist_ok=True)
            move(path, folder / into / path.name)
