"""Ditto inside nnU-Net's training: federated averaging, and a personalized model that is pulled to its result."""

from __future__ import annotations

from typing import Any

from nnunet_fed.method_tables import Ditto
from nnunet_fed.methods.proximal import Proximal
from nnunet_fed.payload import Array
from nnunet_fed.tensors import shared_tensors
from nnunet_fed.trainers.two_models import TwoModelTrainer


class nnUNetTrainerDitto(TwoModelTrainer):  # noqa: N801
    """Two models, one step each on every batch (:mod:`nnunet_fed.methods.proximal`).

    The global model is that of a run of federated averaging, bit for bit. The personalized one, which is deployed,
    is not averaged; its steps are held to the global model of the round's start.
    """

    method = "ditto"

    proximal: Proximal

    def initialize(self) -> None:
        """Both networks; then hold the steps of the personalized one."""
        super().initialize()
        assert isinstance(self.study.method, Ditto)
        personal = self.bare(self.network)
        parameters = {name: tensor for name, tensor in personal.named_parameters() if tensor.requires_grad}
        self.proximal = Proximal(self.optimizer, parameters, self.study.method.pull_strength)

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """nnU-Net's step of the global model, then of the personalized one; the loss of the latter."""
        with self.global_branch():
            super().train_step(batch)
        result: dict[str, Any] = super().train_step(batch)
        return result

    def exchange(self, scope: str) -> None:
        """Replace the global model by the mean over the sites of the round."""
        self.load_shared(self.communicator.mean(f"{scope}/{self.MODEL}", self.shared_arrays(), self.site_weight))

    def load_shared(self, arrays: dict[str, Array]) -> None:
        """Take received tensors into the global model; the personalized one is pulled to them from here on."""
        super().load_shared(arrays)
        self.proximal.hold_to(shared_tensors(self.shared_network))

    def validate(self, save_probabilities: bool) -> None:
        """nnU-Net's validation of the personalized and of the global model."""
        super().validate(save_probabilities)
        self.validate_global(save_probabilities)

    def method_state(self) -> dict[str, Any]:
        """The global branch, and what it was at the round's start, if training goes on before the next exchange."""
        return {**super().method_state(), "anchor": {} if self._pending is not None else self.proximal.state_dict()}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`method_state`."""
        super().load_method_state(state)
        if state["anchor"]:
            self.proximal.load_state_dict(state["anchor"])
        else:
            self.proximal.hold_to(shared_tensors(self.shared_network))
