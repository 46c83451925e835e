"""What nnU-Net's training log says of the epochs. Reading a checkpoint would need torch; the text does not."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_LINE = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+: (.*?)\s*$")
_EPOCH = re.compile(r"Epoch (\d+)")
_VALUES = {
    "train_loss": re.compile(r"train_loss (\S+)"),
    "val_loss": re.compile(r"val_loss (\S+)"),
    "seconds": re.compile(r"Epoch time: (\S+) s"),
}
_DICE = re.compile(r"Pseudo dice \[(.*)\]")
_NUMBER = re.compile(r"(?:^|\()(nan|-?\d[\d.]*(?:e[+-]?\d+)?)")


@dataclass
class TrainingLog:
    """Values by number of the epoch, counted from 0."""

    train_loss: dict[int, float] = field(default_factory=dict)
    val_loss: dict[int, float] = field(default_factory=dict)
    dice: dict[int, float] = field(default_factory=dict)
    """nnU-Net's pseudo Dice of validation patches, mean over the classes that occur."""
    seconds: dict[int, float] = field(default_factory=dict)


def read_training_log(texts: Iterable[str]) -> TrainingLog:
    """Read the logs of one training, oldest first; a training continued with ``--c`` has several.

    What a later log says of an epoch replaces what an earlier one said.
    """
    log = TrainingLog()
    for text in texts:
        epoch = None
        for line in text.splitlines():
            match = _LINE.match(line)
            if match is None:
                continue
            said = match[1]
            if found := _EPOCH.fullmatch(said):
                epoch = int(found[1])
            elif epoch is not None:
                _take(log, epoch, said)
    return log


def _take(log: TrainingLog, epoch: int, said: str) -> None:
    for name, pattern in _VALUES.items():
        if (found := pattern.fullmatch(said)) and (number := _number(found[1])) is not None:
            getattr(log, name)[epoch] = number
    if found := _DICE.fullmatch(said):
        classes = [number for text in found[1].split(",") if (number := _number(text)) is not None]
        if classes:
            log.dice[epoch] = sum(classes) / len(classes)


def _number(text: str) -> float | None:
    """The number in ``0.5`` or ``np.float32(0.5)``; ``None`` for NaN."""
    found = _NUMBER.search(text.strip())
    return None if found is None or found[1] == "nan" else float(found[1])
