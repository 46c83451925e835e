"""FedProx inside nnU-Net's training."""

from __future__ import annotations

from typing import Any

from nnunet_fed.method_tables import FedProx
from nnunet_fed.methods.proximal import Proximal
from nnunet_fed.payload import Array
from nnunet_fed.tensors import shared_tensors
from nnunet_fed.trainers.nnUNetTrainerFedAvg import nnUNetTrainerFedAvg


class nnUNetTrainerFedProx(nnUNetTrainerFedAvg):  # noqa: N801
    """Federated averaging of models that are held near the one of the round's start (:mod:`..methods.proximal`)."""

    method = "fedprox"

    proximal: Proximal

    def initialize(self) -> None:
        """As in nnU-Net; then hold the optimizer's steps."""
        super().initialize()
        assert isinstance(self.study.method, FedProx)
        parameters = {name: tensor for name, tensor in self.shared_network.named_parameters() if tensor.requires_grad}
        self.proximal = Proximal(self.optimizer, parameters, self.study.method.mu)

    def load_shared(self, arrays: dict[str, Array]) -> None:
        """Take received tensors into the network; they are what the round's steps are held to."""
        super().load_shared(arrays)
        self.proximal.hold_to(shared_tensors(self.shared_network))

    def on_train_epoch_start(self) -> None:
        """A site that fine-tunes alone is held to nothing."""
        if self.is_finetuning:
            self.proximal.release()
        super().on_train_epoch_start()

    def method_state(self) -> dict[str, Any]:
        """What the steps are held to, if training goes on from there before the next exchange."""
        return {**super().method_state(), "anchor": {} if self._pending is not None else self.proximal.state_dict()}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`method_state`."""
        super().load_method_state(state)
        if state["anchor"]:
            self.proximal.load_state_dict(state["anchor"])
        else:
            self.proximal.hold_to(shared_tensors(self.shared_network))
