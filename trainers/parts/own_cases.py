"""Whether a site has the cases that its fold names: told in a sentence before it joins, and nobody waits for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunet_fed.datasets.findings import counted
from nnunet_fed.datasets.folds import FOLDS, SPLITS, cases_of, read_folds, shown
from nnunet_fed.datasets.preprocessed import is_complete
from nnunet_fed.errors import ConfigurationError

if TYPE_CHECKING:
    from nnunet_fed.trainers.parts.fold_trainer import FoldTrainer
    from nnunet_fed.trainers.parts.study_trainer import StudyTrainer


def require_preprocessed(trainer: StudyTrainer) -> None:
    """See that preprocessing is complete; raises :class:`ConfigurationError` if it is not."""
    folder = Path(trainer.preprocessed_dataset_folder)
    if not is_complete(folder):
        raise ConfigurationError(
            f"{trainer.configuration_name} of {trainer.plans_manager.dataset_name} is not preprocessed, or not "
            f"completely ({folder}). Give the command 'nnunet_fed plan_and_preprocess' again: it goes on from there."
        )


def require_fold(trainer: FoldTrainer) -> None:
    """See that the cases of the trainer's fold are preprocessed; what no fold names is told in the log.

    Raises:
        ConfigurationError: there are too few cases for nnU-Net's cross-validation, or a case of the fold is not there.
    """
    folder, splits = Path(trainer.preprocessed_dataset_folder), Path(trainer.preprocessed_dataset_folder_base) / SPLITS
    there = set(infer_dataset_class(str(folder)).get_identifiers(str(folder)))
    if trainer.fold == "all" or trainer.trains_on_all_cases:
        return
    if not splits.is_file():
        if len(there) < FOLDS:
            raise ConfigurationError(
                f"{trainer.plans_manager.dataset_name} has {counted(len(there), 'case')}, too few for folds: nnU-Net's "
                f"cross-validation needs {FOLDS}. Train on all of them, as planning has said: {_remedy(trainer)}"
            )
        return
    folds = read_folds(splits)
    fold = folds[trainer.fold] if trainer.fold < len(folds) else {"train": [], "val": []}
    gone = sorted({case for part in fold.values() for case in part} - there)
    if gone:
        raise ConfigurationError(
            f"Fold {trainer.fold} in {splits} has {shown(gone)} of which nothing is preprocessed in {folder}. Give the "
            "command 'nnunet_fed plan_and_preprocess' again: it takes cases out of the folds that are gone."
        )
    unused = sorted(there - cases_of(folds))
    if unused:
        trainer.print_to_log_file(
            f"{shown(unused)} of {len(there)} in no fold of {splits}, and trained on in none. "
            "'nnunet_fed plan_and_preprocess' adds new cases to the folds."
        )


def _remedy(trainer: FoldTrainer) -> str:
    if trainer.study.folds:
        return "set 'fold = \"all\"' in site.toml, and give this command again."
    plans = trainer.plans_manager
    of_trainer = f"-tr {type(trainer).__name__} -p {plans.plans_name}"
    return f"nnUNetv2_train {plans.dataset_name} {trainer.configuration_name} all {of_trainer}"
