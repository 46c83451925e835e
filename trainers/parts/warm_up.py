"""nnU-Net's warm-up, Primus' among others, where a training is more than one network from its first epoch on.

``nnUNetTrainer_warmup`` has two schedules, of which it notes the one that it has (``training_stage``), and takes the
second one in one certain epoch. Source: ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nnunetv2.training.nnUNetTrainer.variants.lr_schedule.nnUNetTrainer_warmup import nnUNetTrainer_warmup

_STAGE, _AFTER = "training_stage", "train"


def leave_if_over(trainer: Any) -> None:
    """Let a trainer have the second schedule that has skipped the epoch in which it takes it."""
    if isinstance(trainer, nnUNetTrainer_warmup) and trainer.current_epoch > trainer.warmup_duration_whole_net:
        trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers(_AFTER)


@contextmanager
def as_at_first(trainer: Any) -> Iterator[None]:
    """Let a trainer make a new optimizer within; otherwise it hands out again the one that it has."""
    stage = getattr(trainer, _STAGE, None)
    if stage is None:
        yield
        return
    setattr(trainer, _STAGE, None)
    try:
        yield
    finally:
        setattr(trainer, _STAGE, stage)


def forget(trainer: Any) -> None:
    """Let a trainer begin anew."""
    if hasattr(trainer, _STAGE):
        setattr(trainer, _STAGE, None)
