"""Ditto inside nnU-Net's training: federated averaging, and a personalized model that is pulled to its result."""

from __future__ import annotations

from typing import Any, ClassVar

from nnunet_fed.study.method_table import MethodTable
from nnunet_fed.study.methods.ditto_options import Ditto
from nnunet_fed.trainers.parts.proximal_trainer import ProximalTrainer
from nnunet_fed.trainers.parts.two_models import TwoModelTrainer


class nnUNetTrainerDitto(ProximalTrainer, TwoModelTrainer):  # noqa: N801
    """Two models, one step each on every batch (:mod:`nnunet_fed.methods.proximal`).

    The global model is that of a run of federated averaging, bit for bit. The personalized one, which is deployed,
    is not averaged; its steps are held to the global model of the round's start.
    """

    method = "ditto"
    Options: ClassVar[type[MethodTable]] = Ditto
    options: Ditto

    def initialize(self) -> None:
        """Both networks; then hold the steps of the personalized one."""
        super().initialize()
        self.hold(self.bare(self.network), self.options.pull_strength)

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """nnU-Net's step of the global model, then of the personalized one; the loss of the latter."""
        with self.global_branch():
            super().train_step(batch)
        result: dict[str, Any] = super().train_step(batch)
        return result

    def exchange(self, scope: str) -> None:
        """Replace the global model by the mean over the sites of the round."""
        self.average(scope)

    def validate(self, save_probabilities: bool) -> None:
        """nnU-Net's validation of the personalized and of the global model."""
        super().validate(save_probabilities)
        self.validate_global(save_probabilities)
