"""FedProx inside nnU-Net's training."""

from __future__ import annotations

from typing import ClassVar

from nnunet_fed.study.method_table import MethodTable
from nnunet_fed.study.methods.fedprox_options import FedProx
from nnunet_fed.trainers.nnUNetTrainerFedAvg import nnUNetTrainerFedAvg
from nnunet_fed.trainers.parts.proximal_trainer import ProximalTrainer


class nnUNetTrainerFedProx(ProximalTrainer, nnUNetTrainerFedAvg):  # noqa: N801
    """Federated averaging of models that are held near the round's start (:mod:`nnunet_fed.methods.proximal`)."""

    method = "fedprox"
    Options: ClassVar[type[MethodTable]] = FedProx
    options: FedProx

    def initialize(self) -> None:
        """As in nnU-Net; then hold the optimizer's steps."""
        super().initialize()
        self.hold(self.shared_network, self.options.mu)

    def on_train_epoch_start(self) -> None:
        """A site that fine-tunes alone is held to nothing."""
        if self.is_finetuning:
            self.proximal.release()
        super().on_train_epoch_start()
