"""Federated averaging with server momentum inside nnU-Net's training."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from nnunet_fed.errors import RoundClosedError
from nnunet_fed.exchange.keys import key_of, last_round, scope_of_round, start_scope
from nnunet_fed.exchange.payload import Array
from nnunet_fed.methods.server_optimizer import difference, with_momentum
from nnunet_fed.methods.tensors import to_arrays
from nnunet_fed.study.method_table import MethodTable
from nnunet_fed.study.methods.fedavgm_options import FedAvgM
from nnunet_fed.trainers.parts.finetuning import FineTuningTrainer
from nnunet_fed.trainers.parts.publishing import from_next_source
from nnunet_fed.trainers.parts.rounds import NO_START


class nnUNetTrainerFedAvgM(FineTuningTrainer):  # noqa: N801
    """The global model goes on moving as it moved (:mod:`nnunet_fed.methods.server_optimizer`).

    All that the sites have to remember alike is the last step of the global model. It is the difference of two closed
    means: nothing is published for a site that was away.
    """

    method = "fedavgm"
    Options: ClassVar[type[MethodTable]] = FedAvgM
    options: FedAvgM

    def configure_study(self) -> None:
        """The global model has not moved yet."""
        super().configure_study()
        self._round_start: dict[str, Array] = {}
        self._last_step: dict[str, Array] = {}

    def exchange(self, scope: str) -> None:
        """Upload the trained weights, moved on; their mean is the next global model."""
        uploaded = with_momentum(
            self._round_start, self.shared_arrays(), self._last_step,
            self.options.server_lr, self.options.server_momentum,
        )  # fmt: skip
        self.average(scope, uploaded)

    def load_shared(self, arrays: dict[str, Array]) -> None:
        """Take received tensors into the network, and note how the global model has moved."""
        super().load_shared(arrays)
        # parameters only: a variance that is moved on beyond what was seen may become negative
        start = {name: arrays[name] for name, _ in self.shared_network.named_parameters() if name in arrays}
        self._last_step = difference(start, self._round_start)
        self._round_start = start

    def catch_up(self, scope: str) -> None:
        """The last step is the one between the two newest global models, whichever this site had."""
        self._last_step = {}
        if last_round(scope) >= 0:
            try:
                self._last_step = difference(self._round_start, self._model_before(last_round(scope)))
            except RoundClosedError:  # after rounds were undone, this may be the oldest that is kept
                self.happened(f"the model before {scope} is not kept: the global model goes on without momentum")

    def _model_before(self, number: int) -> dict[str, Array]:
        if number > 0:
            return self.communicator.fetch(key_of(scope_of_round(number - 1), self.MODEL))
        starts = [key_of(start_scope(source), self.MODEL) for source in range(len(self.study.sites))]
        return from_next_source(starts, self.communicator.fetch, NO_START)

    def method_state(self) -> dict[str, Any]:
        """The model of the round's start, and how it had moved."""
        kept = {"round_start": self._round_start, "last_step": self._last_step}
        tensors = {what: {name: torch.from_numpy(a) for name, a in arrays.items()} for what, arrays in kept.items()}
        return {**super().method_state(), **tensors}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`method_state`."""
        super().load_method_state(state)
        self._round_start, self._last_step = to_arrays(state["round_start"]), to_arrays(state["last_step"])
