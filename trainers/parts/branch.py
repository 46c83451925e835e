"""A network that trains beside nnU-Net's own, by nnU-Net's own functions. Source: ours."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch

from nnunet_fed.trainers.parts.study_trainer import StudyTrainer
from nnunet_fed.trainers.parts.warm_up import as_at_first

B = TypeVar("B", bound="Branch")


@dataclass(eq=False, repr=False)
class Branch:
    """What nnU-Net's trainer has for one network, under its names: what overflows in one branch delays no other."""

    network: Any
    optimizer: torch.optim.Optimizer
    lr_scheduler: Any
    grad_scaler: Any

    @classmethod
    def of(cls, trainer: StudyTrainer) -> Branch:
        """That on which the trainer works now."""
        return Branch(**{field.name: getattr(trainer, field.name) for field in fields(Branch)})

    @classmethod
    def beside(cls: type[B], trainer: StudyTrainer, **facts: Any) -> B:
        """A copy of the trainer's network, as nnU-Net compiles and distributes it, with a fresh optimizer.

        Args:
            trainer: which goes on with what it has.
            facts: further fields of a subclass.
        """
        network: Any = copy.deepcopy(trainer.bare(trainer.network))
        if trainer._do_i_compile():
            network = torch.compile(network)
        own, trainer.network = trainer.network, network
        try:
            with as_at_first(trainer):
                optimizer, lr_scheduler = trainer.configure_optimizers()
        finally:
            trainer.network = own
        if trainer.is_ddp:
            devices = [trainer.local_rank] if trainer.device.type == "cuda" else None
            network = torch.nn.parallel.DistributedDataParallel(network, device_ids=devices)
        grad_scaler = None
        if trainer.grad_scaler is not None:
            grad_scaler = torch.amp.GradScaler(trainer.device.type)
            grad_scaler.load_state_dict(trainer.grad_scaler.state_dict())
        return cls(network, optimizer, lr_scheduler, grad_scaler, **facts)

    def hand_to(self, trainer: StudyTrainer, network: Any = None) -> None:
        """Let the trainer work on this branch from now on."""
        trainer.network = self.network if network is None else network
        trainer.optimizer, trainer.lr_scheduler = self.optimizer, self.lr_scheduler
        trainer.grad_scaler = self.grad_scaler

    @contextmanager
    def in_place_of_own(self, trainer: StudyTrainer, network: Any = None) -> Iterator[None]:
        """Let nnU-Net's functions work on this branch within.

        Args:
            trainer: whose functions they are.
            network: what they call in the place of this branch's own.
        """
        own = Branch.of(trainer)
        self.hand_to(trainer, network)
        try:
            yield
        finally:
            own.hand_to(trainer)

    def begin_epoch(self, trainer: StudyTrainer) -> None:
        """What nnU-Net does for its own network when an epoch of training starts, with the learning rates that it then
        has: a schedule of the base trainer's may know one optimizer only."""
        self.network.train()
        for group, own in zip(self.optimizer.param_groups, trainer.optimizer.param_groups, strict=True):
            group["lr"] = own["lr"]

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "network": StudyTrainer.bare(self.network).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "grad_scaler": None if self.grad_scaler is None else self.grad_scaler.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        StudyTrainer.bare(self.network).load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.grad_scaler is not None and state["grad_scaler"] is not None:
            self.grad_scaler.load_state_dict(state["grad_scaler"])
