"""A personalized and a global model in one training: what FedSM and Ditto share. Source: ours."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nnunet_fed.methods.tensors import load_arrays, shared_tensors
from nnunet_fed.prediction.checkpoint_files import GLOBAL_CHECKPOINT
from nnunet_fed.trainers.parts.federated_trainer import FederatedTrainer
from nnunet_fed.trainers.parts.further_validation import validate_below

GLOBAL = "global"
"""Folder of the global model's validation, below the fold's."""
_BRANCH = ("network", "optimizer", "lr_scheduler", "grad_scaler")
"""What a branch has of its own, as nnU-Net calls it."""


class TwoModelTrainer(FederatedTrainer):
    """``self.network`` is the personalized model: nnU-Net validates, saves and deploys it. The global one is shared.

    Each branch has a network, an optimizer, a schedule and a gradient scaler of its own. A method says in its
    ``train_step`` when which of them trains.
    """

    network: Any
    grad_scaler: Any

    def configure_study(self) -> None:
        """There is no global branch yet."""
        super().configure_study()
        self._global_branch: dict[str, Any] = {}

    def initialize(self) -> None:
        """nnU-Net's network for the personalized model, and a copy of it for the global one."""
        super().initialize()
        network: Any = copy.deepcopy(self.bare(self.network))
        if self._do_i_compile():
            network = torch.compile(network)
        personal = {name: getattr(self, name) for name in _BRANCH}
        self.network = network
        self.optimizer, self.lr_scheduler = self.configure_optimizers()
        if self.is_ddp:
            self.network = torch.nn.parallel.DistributedDataParallel(network, device_ids=[self.local_rank])
        self.grad_scaler = None if self.grad_scaler is None else torch.amp.GradScaler("cuda")
        self._global_branch = {name: getattr(self, name) for name in _BRANCH}
        self._set_branch(personal)

    def _set_branch(self, branch: dict[str, Any]) -> None:
        for name, value in branch.items():
            setattr(self, name, value)

    @contextmanager
    def global_branch(self) -> Iterator[None]:
        """Let nnU-Net's functions work on the global model within."""
        personal = {name: getattr(self, name) for name in _BRANCH}
        self._set_branch(self._global_branch)
        try:
            yield
        finally:
            self._set_branch(personal)

    @property
    def shared_network(self) -> torch.nn.Module:
        """The global model."""
        return self.bare(self._global_branch["network"])

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Of both branches."""
        return [self.optimizer, self._global_branch["optimizer"]]

    def personal_takes_global(self) -> None:
        """Let the personalized model have the weights of the global one."""
        load_arrays(shared_tensors(self.bare(self.network)), self.shared_arrays())

    def prepare(self) -> None:
        """The personalized model begins as the global one."""
        self.personal_takes_global()

    def on_train_epoch_start(self) -> None:
        """nnU-Net's, for both branches."""
        super().on_train_epoch_start()
        self._global_branch["network"].train()
        self._global_branch["lr_scheduler"].step(self.current_epoch)

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
        branch = self._global_branch
        return {
            **super().method_state(),
            "network": self.shared_network.state_dict(),
            "optimizer": branch["optimizer"].state_dict(),
            "grad_scaler": None if branch["grad_scaler"] is None else branch["grad_scaler"].state_dict(),
        }

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`method_state`."""
        super().load_method_state(state)
        self.shared_network.load_state_dict(state["network"])
        self._global_branch["optimizer"].load_state_dict(state["optimizer"])
        if self._global_branch["grad_scaler"] is not None and state["grad_scaler"] is not None:
            self._global_branch["grad_scaler"].load_state_dict(state["grad_scaler"])
