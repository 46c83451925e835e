"""FedSM inside nnU-Net's training: a global and a personalized model on the same batches, and a selector."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nnunet_fed.errors import DisagreementError
from nnunet_fed.exchange.keys import key_of, round_of
from nnunet_fed.exchange.payload import Array, encode, measure
from nnunet_fed.methods.familiarity import Familiarity, fit_familiarity
from nnunet_fed.methods.fedsm import pull_round
from nnunet_fed.methods.selector import SelectorConfiguration, case_log_probabilities
from nnunet_fed.methods.selector_training import SelectorTraining
from nnunet_fed.methods.selector_validation import SelectorValidation, validate_selector
from nnunet_fed.methods.tensors import load_arrays, shared_tensors, to_arrays
from nnunet_fed.prediction.bundle import (
    SELECTOR_FILE,
    ValidationDice,
    fold_of,
    personal_checkpoint,
    write_checkpoint,
    write_fold,
    write_selector,
)
from nnunet_fed.study.methods.fedsm_options import FedSM
from nnunet_fed.trainers.fedsm.selector_cases import SelectorCases
from nnunet_fed.trainers.fedsm.super_validation import validate_global_and_super
from nnunet_fed.trainers.parts.two_models import TwoModelTrainer


class nnUNetTrainerFedSM(TwoModelTrainer):  # noqa: N801
    """Two models, one step each on every batch (:mod:`nnunet_fed.methods.fedsm`).

    The global model gets the batches that federated averaging would get, and is that of a run of federated averaging,
    bit for bit.
    """

    method = "fedsm"

    def configure_study(self) -> None:
        """Take the method's options."""
        super().configure_study()
        assert isinstance(self.study.method, FedSM)
        self.options = self.study.method
        self._batch = 0
        self._cases: dict[str, SelectorCases] = {}
        self._selector_validation: SelectorValidation | None = None
        self._familiarity: Familiarity | None = None
        self._own_site = ""
        self.selector: SelectorTraining

    # ------------------------------------------------------------------------------------------- two branches

    def initialize(self) -> None:
        """The personalized model, the global one, and the selector."""
        super().initialize()
        self.selector = SelectorTraining(
            self.selector_configuration,
            self.study.seed,
            self.options.selector_mode,
            self.options.selector_lr,
            self.device,
        )

    @property
    def selector_configuration(self) -> SelectorConfiguration:
        """Of the selector, from the plans and the study."""
        return SelectorConfiguration(
            channels=len(self.dataset_json.get("channel_names") or self.dataset_json["modality"]),
            classes=len(self.study.sites),
            patch_size=tuple(self.configuration_manager.patch_size),
            patches=self.options.selector_patches,
            header_features=self.options.selector_header_features,
        )

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
        learning_rate = self.optimizer.param_groups[0]["lr"]
        if not self._warms_up:
            pulled = pull_round(
                self.communicator, scope, shared_tensors(self.bare(self.network)), self.options.softpull_schedule,
                self.options.softpull_self_weight, learning_rate / self.initial_lr,
            )  # fmt: skip
            self.diagnostics.update(rho=pulled.rho, self_weight=pulled.self_weight, deviation=pulled.deviation)
        self._train_selector(scope)
        if self.current_epoch + 1 == self.num_epochs:
            self._share_at_last(scope)
        self.load_shared(self.communicator.mean(key_of(scope, self.MODEL), self.shared_arrays(), self.site_weight))
        if self._warms_up:
            self.personal_takes_global()

    def _train_selector(self, scope: str) -> None:
        losses = self.selector.train(
            self.communicator, scope, self.selector_cases("training"),
            1.0 if self.options.selector_class_balanced else float(self._training_cases),
            self.options.selector_steps_per_round,
        )  # fmt: skip
        self.diagnostics["selector_loss"] = losses[-1]
        # computed alike everywhere, published for sites that were away (rule 5 of the protocol)
        state = to_arrays(self.selector.state_dict())
        digests = self.communicator.gather(key_of(scope, "selector"), measure(encode(state))[0])
        if len(set(digests.values())) > 1:
            listed = ", ".join(f"{site}: {digest[:12]}" for site, digest in digests.items())
            raise DisagreementError(
                f"The sites' selectors differ after the same steps ({listed}). Install the same versions of nnunet_fed "
                "and numpy at all sites."
            )
        first = next(iter(digests)) == self.communicator.site
        self.communicator.mean(key_of(scope, "state"), _floats(state) if first else {}, float(first), exact=True)

    def catch_up(self, scope: str) -> None:
        """Take the selector as the others have it."""
        if round_of(scope) is not None:
            published = self.communicator.fetch(key_of(scope, "state"))
            self.selector.load_state_dict({name: torch.from_numpy(array) for name, array in published.items()})

    def selector_cases(self, which: str) -> SelectorCases:
        """This site's training or validation cases for the selector."""
        if which not in self._cases:
            training, validation = self.do_split()
            names = training if which == "training" else validation
            self._cases[which] = SelectorCases(self, names, self.selector_configuration)
        return self._cases[which]

    # ------------------------------------------------------------------------------------------- the end

    def _share_at_last(self, scope: str) -> None:
        """Judge the selector over the federation, and give every site all personalized models if the study says so."""
        own = case_log_probabilities(self.selector.network, self.selector_cases("validation"))
        found = validate_selector(self.communicator, scope, own, self.options.gamma)
        if self.options.familiarity_gate:
            self._familiarity = fit_familiarity(
                self.communicator, scope, self.selector_cases("training"), self.selector_cases("validation")
            )
        if self.options.share_personal:
            self._share_personal(scope)
        # last: a round that closes without this site in between leaves no half of a super model
        self._own_site, self._selector_validation = self.communicator.site, found

    def _share_personal(self, scope: str) -> None:
        folder = Path(self.output_folder)
        network = copy.deepcopy(self.bare(self.network))
        for site in self.communicator.sites:
            mine = site == self.communicator.site
            arrays = to_arrays(shared_tensors(self.bare(self.network))) if mine else {}
            received = self.communicator.mean(key_of(scope, f"personal-of-{site}"), arrays, float(mine), exact=True)
            if not mine and self.local_rank == 0 and not self.disable_checkpointing:
                load_arrays(shared_tensors(network), received)
                path = folder / personal_checkpoint(site)
                write_checkpoint(path, folder / "checkpoint_latest.pth", network.state_dict())

    def save_models(self, folder: Path) -> None:
        """Write the global model, the selector and the bundle of what the super model needs."""
        super().save_models(folder)
        write_selector(folder / SELECTOR_FILE, self.selector_configuration, self.selector.network)
        dice = None
        if self._resumed is not None and self.options.best_model_gate:  # --c after the end validates without the others
            entry = fold_of(folder.parent, self.fold)
            dice = None if entry is None else entry.validation_dice
        self.write_bundle(dice)

    def write_bundle(self, validation_dice: Mapping[str, ValidationDice] | None) -> None:
        """Describe the super model; without the last round's validation of the selector there is none."""
        found = self._selector_validation
        if found is None:
            self.print_to_log_file(
                "This site missed the last round: it has no super model. Predict with checkpoint_final.pth, its own "
                "model, or with checkpoint_global.pth."
            )
            return
        site = self._own_site
        others = [name for name in self.study.sites if name != site] if self.options.share_personal else []
        write_fold(
            Path(self.output_folder_base), self.fold, site=site, gamma=self.options.gamma,
            selector=self.selector_configuration, validation=found, shared=others,
            selector_min_accuracy=self.options.selector_min_accuracy, familiarity=self._familiarity,
            validation_dice=validation_dice,
        )  # fmt: skip
        facts = {
            "accuracy": found.accuracy, "accuracy_by_site": found.accuracy_by_site, "confusion": found.confusion,
            "share_routed_to_global": found.share_routed_to_global, "temperature": found.temperature,
            "trusted": found.accuracy >= self.options.selector_min_accuracy,
        }  # fmt: skip
        self.note_facts(selector=facts)
        self.print_to_log_file(f"Selector on the validation cases of all sites: {facts}")

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
        found = self._selector_validation
        return {
            **super().method_state(),
            "selector": self.selector.state_dict(),
            # plain values: a checkpoint is read where nnunet_fed is not installed, too
            "selector_validation": None if found is None else {**asdict(found), "site": self._own_site},
            "familiarity": None if self._familiarity is None else asdict(self._familiarity),
        }

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`method_state`."""
        super().load_method_state(state)
        self.selector.load_state_dict(state["selector"])
        if state["selector_validation"] is not None:
            found = dict(state["selector_validation"])
            self._own_site = found.pop("site")
            self._selector_validation = SelectorValidation(**found)
        if state["familiarity"] is not None:
            self._familiarity = Familiarity(**state["familiarity"])


def _floats(state: dict[str, Array]) -> dict[str, Array]:
    """A mean takes floating-point tensors; the number of steps is exact in float32 up to 16 million."""
    return {name: array.astype("float32") for name, array in state.items()}
