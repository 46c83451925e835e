"""Which cases a site trains on: its part of the fold that the study trains. Source: ours."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from nnunet_fed.datasets.folds import SPLITS
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.leases import in_turn
from nnunet_fed.study.federation import Fold
from nnunet_fed.study.trained_fold import trained_fold
from nnunet_fed.trainers.parts.cascade import require_previous_stage
from nnunet_fed.trainers.parts.own_cases import require_fold
from nnunet_fed.trainers.parts.study_trainer import StudyTrainer


class FoldTrainer(StudyTrainer):
    """nnU-Net's split as ``site.toml`` maps it, and a sentence where a case is missing."""

    def fold_of_study(self) -> Fold:
        """The fold of the study that this command trains.

        Raises:
            ConfigurationError: site.toml is missing or wrong, or this site does not train the command's fold.
        """
        return trained_fold(self.fold, self.study, self.own_site()).study

    @property
    def trains_on_all_cases(self) -> bool:
        """Whether this site trains on all its cases in a fold with a number, as it did when it began."""
        if self._resumed is not None:
            return bool(self._resumed.get("all_cases"))
        return self.fold != "all" and trained_fold(self.fold, self.study, self.own_site()).all_cases

    def do_split(self) -> Any:
        """nnU-Net's split; all cases for training and for validation where ``site.toml`` says so.

        nnU-Net makes the split if there is none. Two folds may start at once, and one would find half a file.
        """
        if self.trains_on_all_cases:
            self.print_to_log_file(f"This site trains on all its cases in fold {self.fold}, as site.toml says.")
            fold, self.fold = self.fold, "all"
            try:
                return super().do_split()
            finally:
                self.fold = fold
        splits = Path(self.preprocessed_dataset_folder_base) / SPLITS
        being_made = splits.with_suffix(".lock")
        with nullcontext() if splits.is_file() and not being_made.exists() else in_turn(being_made):
            return super().do_split()

    def get_dataloaders(self) -> Any:
        """nnU-Net's, once it is sure that there are the fold's cases; raises :class:`ConfigurationError` if not."""
        require_fold(self)
        return super().get_dataloaders()

    def get_tr_and_val_datasets(self) -> Any:
        """nnU-Net's data sets; notes the number of training cases.

        Raises:
            ConfigurationError: there is no training or no validation case, or the previous stage has not predicted one.
        """
        training, validation = super().get_tr_and_val_datasets()
        for kind, cases in (("training", training), ("validation", validation)):
            if not cases.identifiers:
                raise ConfigurationError(
                    f"Fold {self.fold} has no {kind} case. Correct splits_final.json in "
                    f"{self.preprocessed_dataset_folder_base}, or train fold 'all', which validates on all cases."
                )
        require_previous_stage(self, [*training.identifiers, *validation.identifiers])
        self._training_cases = len(training.identifiers)
        return training, validation

    def training_state(self) -> dict[str, Any]:
        """Also whether it trains on all cases, which it goes on with whatever site.toml says by then."""
        return {**super().training_state(), "all_cases": self.trains_on_all_cases}
