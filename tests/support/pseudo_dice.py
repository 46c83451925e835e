"""A pseudo Dice that a test gives, in the place of the one that nnU-Net finds in its validation patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


def give_pseudo_dice(monkeypatch: pytest.MonkeyPatch, of_epoch: Callable[[Any, int], float]) -> None:
    """Let each epoch of a trainer have the pseudo Dice that ``of_epoch(trainer, epoch)`` gives."""

    def log(trainer: Any, val_outputs: list[dict[str, Any]]) -> None:
        epoch = trainer.current_epoch
        dice = of_epoch(trainer, epoch)
        for name, value in {"mean_fg_dice": dice, "dice_per_class_or_region": [dice, dice], "val_losses": 0.5}.items():
            trainer.logger.log(name, value, epoch)

    monkeypatch.setattr(nnUNetTrainer, "on_validation_epoch_end", log)
