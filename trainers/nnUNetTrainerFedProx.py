"""FedProx inside nnU-Net's training."""

from __future__ import annotations

from nnunet_fed.study.methods.fedprox_options import FedProx
from nnunet_fed.trainers.nnUNetTrainerFedAvg import nnUNetTrainerFedAvg
from nnunet_fed.trainers.parts.proximal_trainer import ProximalTrainer


class nnUNetTrainerFedProx(ProximalTrainer, nnUNetTrainerFedAvg):  # noqa: N801
    """Federated averaging of models that are held near the round's start (:mod:`nnunet_fed.methods.proximal`)."""

    method = "fedprox"

    def initialize(self) -> None:
        """As in nnU-Net; then hold the optimizer's steps."""
        super().initialize()
        assert isinstance(self.study.method, FedProx)
        self.hold(self.shared_network, self.study.method.mu)

    def on_train_epoch_start(self) -> None:
        """A site that fine-tunes alone is held to nothing."""
        if self.is_finetuning:
            self.proximal.release()
        super().on_train_epoch_start()
