"""Steps that are held to the global model of the round's start: what FedProx and Ditto share. Source: ours."""

from __future__ import annotations

from typing import Any

import torch

from nnunet_fed.exchange.payload import Array
from nnunet_fed.methods.proximal import Proximal
from nnunet_fed.methods.tensors import shared_tensors
from nnunet_fed.trainers.parts.federated_trainer import FederatedTrainer


class ProximalTrainer(FederatedTrainer):
    """Holds the optimizer's steps to the shared tensors as they were last received."""

    HOLDS_OPTIMIZER = "holds the steps of the first one"
    proximal: Proximal

    def hold(self, network: torch.nn.Module, strength: float) -> None:
        """Begin to hold the steps of ``self.optimizer``, which trains ``network``."""
        parameters = {name: tensor for name, tensor in network.named_parameters() if tensor.requires_grad}
        self.proximal = Proximal(self.optimizer, parameters, strength)

    def load_shared(self, arrays: dict[str, Array]) -> None:
        """Take received tensors into the network; they are what the round's steps are held to."""
        super().load_shared(arrays)
        self.proximal.hold_to(shared_tensors(self.shared_network))

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
