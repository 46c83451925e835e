"""What FedSM's sites find out of the super model in the last round, and its files. Source: ours."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_fed.errors import NoContributionError
from nnunet_fed.exchange.keys import key_of
from nnunet_fed.methods.familiarity import Familiarity, fit_familiarity
from nnunet_fed.methods.selector import case_log_probabilities
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
from nnunet_fed.trainers.parts.publishing import publish

if TYPE_CHECKING:
    from nnunet_fed.trainers.nnUNetTrainerFedSM import nnUNetTrainerFedSM


@dataclass(frozen=True)
class Findings:
    """Of the last round, in which all sites looked at the selector together."""

    site: str
    """This site."""
    selector: SelectorValidation
    familiarity: Familiarity | None
    shared: tuple[str, ...] | None
    """The other sites that have shared their personalized models; ``None``: all of them, as in version 0.1."""

    def plain(self) -> dict[str, Any]:
        """For a checkpoint, which is read where nnunet_fed is not installed, too."""
        return {
            "selector_validation": {**asdict(self.selector), "site": self.site},
            "familiarity": None if self.familiarity is None else asdict(self.familiarity),
            "shared": self.shared,
        }

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Findings | None:
        """The inverse of :meth:`plain`; ``None``: the last round is not over."""
        if values["selector_validation"] is None:
            return None
        validation, familiar = dict(values["selector_validation"]), values["familiarity"]
        site = validation.pop("site")
        familiarity = None if familiar is None else Familiarity(**familiar)
        return cls(site, SelectorValidation(**validation), familiarity, values.get("shared"))


NOTHING = {"selector_validation": None, "familiarity": None, "shared": None}
"""In the place of :meth:`Findings.plain` while there are none."""


def share_at_last(trainer: nnUNetTrainerFedSM, scope: str) -> Findings:
    """Judge the selector over the federation, and give every site all personalized models if the study says so.

    A round that closes without this site in between leaves no half of a super model: it raises.
    """
    communicator, options = trainer.communicator, trainer.options
    training, validation = trainer.selector_cases("training"), trainer.selector_cases("validation")
    own = case_log_probabilities(trainer.selector.network, validation)
    found = validate_selector(communicator, scope, own, options.gamma)
    familiarity = None
    if options.familiarity_gate:
        familiarity = fit_familiarity(communicator, scope, training, validation)
    shared = _share_personal(trainer, scope) if options.share_personal else ()
    return Findings(communicator.site, found, familiarity, shared)


def _share_personal(trainer: nnUNetTrainerFedSM, scope: str) -> tuple[str, ...]:
    """Hand the personalized models round; returns the other sites that have given theirs."""
    communicator, folder, own = trainer.communicator, Path(trainer.output_folder), trainer.bare(trainer.network)
    network, shared = copy.deepcopy(own), []
    for site in communicator.sites:
        key = key_of(scope, f"personal-of-{site}")
        try:
            received = publish(communicator, key, site, partial(to_arrays, shared_tensors(own)))
        except NoContributionError:
            trainer.happened(f"the personalized model of {site} was not shared: that site was away")
            continue
        if site == communicator.site:
            continue
        shared.append(site)
        if trainer.local_rank == 0 and not trainer.disable_checkpointing:
            load_arrays(shared_tensors(network), received)
            path = folder / personal_checkpoint(site)
            write_checkpoint(path, folder / "checkpoint_latest.pth", network.state_dict())
    return tuple(shared)


def save_super_model(trainer: nnUNetTrainerFedSM, folder: Path) -> None:
    """Write the selector and the bundle of what the super model needs."""
    write_selector(folder / SELECTOR_FILE, trainer.selector.configuration, trainer.selector.network)
    dice = None
    if trainer._resumed is not None and trainer.options.best_model_gate:  # --c after the end validates without others
        entry = fold_of(folder.parent, trainer.fold)
        dice = None if entry is None else entry.validation_dice
    write_bundle(trainer, dice)


def write_bundle(trainer: nnUNetTrainerFedSM, validation_dice: Mapping[str, ValidationDice] | None) -> None:
    """Describe the super model; without the last round's findings there is none."""
    found = trainer.found
    if found is None:
        trainer.print_to_log_file(
            "This site missed the last round: it has no super model. Predict with checkpoint_final.pth, its own "
            "model, or with checkpoint_global.pth."
        )
        return
    options, selector = trainer.options, found.selector
    others = found.shared
    if others is None:
        others = tuple(name for name in trainer.study.sites if name != found.site and options.share_personal)
    write_fold(
        Path(trainer.output_folder_base), trainer.fold, site=found.site, gamma=options.gamma,
        selector=trainer.selector.configuration, validation=selector, shared=others,
        selector_min_accuracy=options.selector_min_accuracy, familiarity=found.familiarity,
        validation_dice=validation_dice,
    )  # fmt: skip
    facts = {
        "accuracy": selector.accuracy, "accuracy_by_site": selector.accuracy_by_site, "confusion": selector.confusion,
        "share_routed_to_global": selector.share_routed_to_global, "temperature": selector.temperature,
        "trusted": selector.accuracy >= options.selector_min_accuracy,
    }  # fmt: skip
    trainer.note_facts(selector=facts)
    trainer.print_to_log_file(f"Selector on the validation cases of all sites: {facts}")
