"""FedAdam inside nnU-Net's training."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, ClassVar

import torch

from nnunet_fed.errors import NoContributionError
from nnunet_fed.exchange.keys import key_of, last_round
from nnunet_fed.exchange.payload import Array
from nnunet_fed.methods.server_optimizer import AdamMoments, difference
from nnunet_fed.methods.tensors import to_arrays
from nnunet_fed.study.method_table import MethodTable
from nnunet_fed.study.methods.fedadam_options import FedAdam
from nnunet_fed.trainers.parts.finetuning import FineTuningTrainer
from nnunet_fed.trainers.parts.publishing import (
    digest_of_arrays,
    from_next_source,
    publish,
    publish_computed,
    require_equal,
)


class nnUNetTrainerFedAdam(FineTuningTrainer):  # noqa: N801
    """Adam on the mean of the sites' updates, done alike at each (:mod:`nnunet_fed.methods.server_optimizer`).

    The model after the step is published each round: it is what a late site trains from. The moments are twice its
    size, and published only in a round in which a site has not got them.
    """

    method = "fedadam"
    Options: ClassVar[type[MethodTable]] = FedAdam
    options: FedAdam

    def configure_study(self) -> None:
        """No moments yet."""
        super().configure_study()
        self.moments = AdamMoments(self.options.beta_1, self.options.beta_2, self.options.tau)
        self._round_start: dict[str, Array] = {}

    def initialize(self) -> None:
        """As in nnU-Net; moments of its parameters."""
        super().initialize()
        parameters = {name for name, _ in self.shared_network.named_parameters()}
        shared = self.shared_arrays()
        self.moments.begin(shared, [name for name in shared if name in parameters])

    def exchange(self, scope: str) -> None:
        """Take the mean of the updates, do Adam's step on it, and load the model, which one site publishes."""
        own = difference(self.shared_arrays(), self._round_start)
        update = self.communicator.mean(key_of(scope, "update"), own, self.site_weight)
        sources = self._agree_on_moments(scope)
        model = self.moments.step(self._round_start, update, self.options.server_lr, last_round(scope))
        # should all of them have gone away, the others have computed the same
        with suppress(NoContributionError):
            model = publish_computed(self.communicator, key_of(scope, self.MODEL), sources, model)
        self.load_shared(model)

    def _agree_on_moments(self, scope: str) -> list[str]:
        """Let every site of the round have the newest moments among them; returns those that had them already.

        Raises:
            DisagreementError: moments of the same round differ.
        """
        own = {"round": self.moments.number, "digest": digest_of_arrays(self.moments.tensors())}
        told = self.communicator.gather(key_of(scope, "moments"), own)
        newest = max(entry["round"] for entry in told.values())
        digests = {site: entry["digest"] for site, entry in told.items() if entry["round"] == newest}
        require_equal(digests, "The sites' moments of FedAdam differ after the same rounds")
        if len(digests) < len(told):
            self.moments.take(self._published_moments(scope, list(digests)), newest)
        return list(digests)

    def _published_moments(self, scope: str, sources: list[str]) -> dict[str, Array]:
        """The moments of the first of the sources that is still there; those who have them compare."""

        def from_source(numbered: tuple[int, str]) -> dict[str, Array]:
            key, source = key_of(scope, f"state-{numbered[0]}"), numbered[1]
            if self.communicator.site in sources:
                return publish_computed(self.communicator, key, [source], self.moments.tensors())
            return publish(self.communicator, key, source, dict)

        nobody = "The sites that had the moments of FedAdam have all gone away."
        return from_next_source(enumerate(sources), from_source, nobody)

    def load_shared(self, arrays: dict[str, Array]) -> None:
        """Take received tensors into the network; they are the start of a round."""
        super().load_shared(arrays)
        self._round_start = arrays

    def method_state(self) -> dict[str, Any]:
        """The model of the round's start, and the moments."""
        kept = {"round_start": self._round_start, "moments": self.moments.tensors()}
        tensors = {what: {name: torch.from_numpy(a) for name, a in arrays.items()} for what, arrays in kept.items()}
        return {**super().method_state(), **tensors, "moments_round": self.moments.number}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`method_state`."""
        super().load_method_state(state)
        self._round_start = to_arrays(state["round_start"])
        self.moments.take(to_arrays(state["moments"]), state["moments_round"])
