"""A method from outside the package: a trainer in a folder of ``nnUNet_extTrainer``. docs/new_method.md explains it."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field, field_validator

from nnunet_fed.study.method_table import MethodTable

EXTERNAL_TRAINERS = "nnUNet_extTrainer"
"""nnU-Net's variable of the folders in which it looks for trainers."""


class Custom(MethodTable):
    """A trainer of a user's, and its options, which the trainer's own ``Options`` check."""

    TITLE = "Custom"
    SINCE = 3
    name: Literal["custom"]
    trainer: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Name of the trainer's class, and of its file."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Of the method, by name; numbers, texts, true and false, and lists of them."""

    @property
    def trainer_name(self) -> str:
        """Name of the trainer that does it."""
        return self.trainer

    @property
    def fine_tuning(self) -> int:
        """Epochs of fine-tuning after the rounds, if the trainer has the option."""
        found = self.options.get("finetune_epochs", 0)
        return found if isinstance(found, int) else 0

    @field_validator("options")
    @classmethod
    def _options_are_json(cls, options: dict[str, Any]) -> dict[str, Any]:
        for name, value in options.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError):  # a date, or an infinite number
                raise ValueError(f"{name}: use finite numbers, texts, true and false, and lists of them") from None
        return options
