"""A personalized and a global model in one training: what FedSM and Ditto share. Source: ours."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from nnunet_fed.methods.tensors import load_arrays, shared_tensors
from nnunet_fed.prediction.checkpoint_files import GLOBAL_CHECKPOINT
from nnunet_fed.trainers.parts.branch import Branch
from nnunet_fed.trainers.parts.federated_trainer import FederatedTrainer
from nnunet_fed.trainers.parts.further_validation import validate_below

GLOBAL = "global"
"""Folder of the global model's validation, below the fold's."""


class TwoModelTrainer(FederatedTrainer):
    """``self.network`` is the personalized model: nnU-Net validates, saves and deploys it. The global one is shared.

    A method says in its ``train_step`` when which of them trains.
    """

    HOLDS_OPTIMIZER = "trains a second model with an optimizer like the first one"
    _global: Branch

    def initialize(self) -> None:
        """nnU-Net's network for the personalized model, and a copy of it for the global one."""
        super().initialize()
        self._global = Branch.beside(self)

    def global_branch(self) -> AbstractContextManager[None]:
        """Let nnU-Net's functions work on the global model within."""
        return self._global.in_place_of_own(self)

    @property
    def shared_network(self) -> torch.nn.Module:
        """The global model."""
        return self.bare(self._global.network)

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Of both branches."""
        return [self.optimizer, self._global.optimizer]

    def personal_takes_global(self) -> None:
        """Let the personalized model have the weights of the global one."""
        load_arrays(shared_tensors(self.bare(self.network)), self.shared_arrays())

    def prepare(self) -> None:
        """The personalized model begins as the global one."""
        self.personal_takes_global()

    def on_train_epoch_start(self) -> None:
        """nnU-Net's, for both branches."""
        super().on_train_epoch_start()
        self._global.begin_epoch(self)

    def save_models(self, folder: Path) -> None:
        """Write the global model."""
        with self.global_branch():
            self.save_for_prediction(str(folder / GLOBAL_CHECKPOINT))

    def validate_global(self, save_probabilities: bool) -> None:
        """What stands in ``validation`` of the personalized model, in ``global/validation`` of the global one."""
        with self.global_branch():
            validate_below(self, GLOBAL, save_probabilities)

    def method_state(self) -> dict[str, Any]:
        """The global branch."""
        return {**super().method_state(), **self._global.state()}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`method_state`."""
        super().load_method_state(state)
        self._global.load_state(state)
