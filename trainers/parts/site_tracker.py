"""Scalars for TensorBoard at a site. Written with tensorboardX, which needs no torch.

Source: ours. nnU-Net's own logger hands every value on to those in its ``loggers``; this is one of them, as the one for
Weights & Biases is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_fed.logs import open_tensorboard

FOLDER = "tensorboard"
"""Beside a site's checkpoints."""
_NOT_SHOWN = ("epoch_start_timestamps", "epoch_end_timestamps")


class SiteTracker:
    """One of nnU-Net's loggers: takes what nnU-Net logs in every epoch, and what a method tells in every round.

    Args:
        folder: of the fold; the event files go into a folder in it.
        epoch: the first one that is trained now.

    Raises:
        ConfigurationError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path, epoch: int):
        self._writer = open_tensorboard(folder / FOLDER, epoch or None)
        self._summaries: set[str] = set()

    def update_config(self, config: dict[str, Any]) -> None:
        """Nothing: the settings are in the plans and in ``federation.json``."""

    def log(self, key: str, value: float, step: int) -> None:
        """One of nnU-Net's values of an epoch."""
        if key not in _NOT_SHOWN:
            self._writer.add_scalar(f"nnunet/{key}", float(value), step)

    def log_summary(self, key: str, value: Any) -> None:
        """A value of the whole training, such as the Dice of the validation.

        Only the first of a key: it describes the model that the site deploys, later ones those validated besides.
        """
        if isinstance(value, int | float) and key not in self._summaries:
            self._summaries.add(key)
            self._writer.add_scalar(key, float(value), 0)

    def round_over(self, number: int, figures: Mapping[str, float]) -> None:
        """The method's figures of a round, counted from 1."""
        for name, value in figures.items():
            self._writer.add_scalar(f"federation/{name}", value, number)

    def close(self) -> None:
        """Have everything on disk, after the validation of the model that the site deploys."""
        self._writer.close()
