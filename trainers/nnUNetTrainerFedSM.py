"""FedSM inside nnU-Net's training: a global and a personalized model on the same batches, and a selector."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch

from nnunet_fed.exchange.keys import key_of, round_of
from nnunet_fed.methods.fedsm import pull_round
from nnunet_fed.methods.selector_training import SelectorTraining
from nnunet_fed.methods.tensors import shared_tensors, to_arrays
from nnunet_fed.study.method_table import MethodTable
from nnunet_fed.study.methods.fedsm_options import FedSM
from nnunet_fed.trainers.fedsm.selector_cases import SelectorCases, configuration_of
from nnunet_fed.trainers.fedsm.super_model import NOTHING, Findings, save_super_model, share_at_last
from nnunet_fed.trainers.fedsm.super_validation import validate_global_and_super
from nnunet_fed.trainers.parts.publishing import digest_of_arrays, fetch_published, publish_computed, require_equal
from nnunet_fed.trainers.parts.two_models import TwoModelTrainer


class nnUNetTrainerFedSM(TwoModelTrainer):  # noqa: N801
    """Two models, one step each on every batch (:mod:`nnunet_fed.methods.fedsm`).

    The global model gets the batches that federated averaging would get, and is that of a run of federated averaging,
    bit for bit.
    """

    method = "fedsm"
    Options: ClassVar[type[MethodTable]] = FedSM
    options: FedSM
    selector: SelectorTraining

    def configure_study(self) -> None:
        """Nothing is found of the super model yet."""
        super().configure_study()
        self._batch = 0
        self._cases: dict[str, SelectorCases] = {}
        self.found: Findings | None = None

    def initialize(self) -> None:
        """The personalized model, the global one, and the selector."""
        super().initialize()
        self.selector = SelectorTraining(
            configuration_of(self), self.study.seed, self.options.selector_mode, self.options.selector_lr, self.device
        )

    def _connect(self) -> None:
        """The sites are those that the selector tells apart, whatever names have come or gone since the planning."""
        super()._connect()
        self.communicator.sites = self.study.sites

    # ------------------------------------------------------------------------------------------- two branches

    @property
    def _warms_up(self) -> bool:
        return self.current_epoch // self.study.local_epochs < self.options.warm_up_rounds

    def on_train_epoch_start(self) -> None:
        """Both models train on the first batch of an epoch."""
        super().on_train_epoch_start()
        self._batch = 0

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """nnU-Net's step of the global model, then of the personalized one; the loss of the latter, if it trains."""
        with self.global_branch():
            result: dict[str, Any] = super().train_step(batch)
        if not self._warms_up and self._batch % self.options.personal_every == 0:
            result = super().train_step(batch)
        self._batch += 1
        return result

    # ------------------------------------------------------------------------------------------- the exchange

    def exchange(self, scope: str) -> None:
        """Pull the personalized model, train the selector, and average the global model; at last share the models."""
        if not self._warms_up:
            pulled = pull_round(
                self.communicator, scope, shared_tensors(self.bare(self.network)), self.options.softpull_schedule,
                self.options.softpull_self_weight, self.optimizer.param_groups[0]["lr"] / self.initial_lr,
            )  # fmt: skip
            self.diagnostics.update(rho=pulled.rho, self_weight=pulled.self_weight, deviation=pulled.deviation)
        self._train_selector(scope)
        if self.current_epoch + 1 == self.num_epochs:
            self.found = share_at_last(self, scope)
        self.average(scope)
        if self._warms_up:
            self.personal_takes_global()

    def _train_selector(self, scope: str) -> None:
        losses = self.selector.train(
            self.communicator, scope, self.selector_cases("training"),
            1.0 if self.options.selector_class_balanced else float(self._training_cases),
            self.options.selector_steps_per_round,
        )  # fmt: skip
        self.diagnostics["selector_loss"] = losses[-1]
        state = to_arrays(self.selector.state_dict())
        digests = self.communicator.gather(key_of(scope, "selector"), digest_of_arrays(state))
        require_equal(digests, "The sites' selectors differ after the same steps")
        # a mean takes floating-point tensors; the number of steps is exact in float32 up to 16 million
        floats = {name: array.astype("float32") for name, array in state.items()}
        publish_computed(self.communicator, key_of(scope, "state"), digests, floats)

    def catch_up(self, scope: str) -> None:
        """Take the selector as the others have it."""
        if round_of(scope) is not None:
            published = fetch_published(self.communicator, key_of(scope, "state"), len(self.study.sites))
            self.selector.load_state_dict({name: torch.from_numpy(array) for name, array in published.items()})

    def selector_cases(self, which: str) -> SelectorCases:
        """This site's training or validation cases for the selector."""
        if which not in self._cases:
            training, validation = self.do_split()
            names = training if which == "training" else validation
            self._cases[which] = SelectorCases(self, names, self.selector.configuration)
        return self._cases[which]

    # ------------------------------------------------------------------------------------------- the end

    def save_models(self, folder: Path) -> None:
        """Write the global model and the super model."""
        super().save_models(folder)
        save_super_model(self, folder)

    @property
    def validates_together(self) -> bool:
        """With the gate the sites compare the validations of their models."""
        return self.options.best_model_gate or super().validates_together

    def validate(self, save_probabilities: bool) -> None:
        """nnU-Net's validation of the personalized, the global and the super model."""
        super().validate(save_probabilities)
        validate_global_and_super(self, save_probabilities)

    # ------------------------------------------------------------------------------------------- checkpoints

    def method_state(self) -> dict[str, Any]:
        """The global branch, the selector, and what the last round found of it."""
        found = NOTHING if self.found is None else self.found.plain()
        return {**super().method_state(), "selector": self.selector.state_dict(), **found}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`method_state`."""
        super().load_method_state(state)
        self.selector.load_state_dict(state["selector"])
        self.found = Findings.from_plain(state)
