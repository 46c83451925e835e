"""One process at a time trains, or validates, in the folder of a fold. Source: ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from filelock import SoftFileLease

from nnunet_fed.errors import FederationError
from nnunet_fed.leases import take
from nnunet_fed.trainers.parts.fold_trainer import FoldTrainer
from nnunet_fed.trainers.parts.ranks import from_rank_zero
from nnunet_fed.trainers.parts.sentences import sentences_for_users

LEASE = "training.lock"
"""In the folder of the fold: which process trains, or validates, there (:mod:`nnunet_fed.leases`)."""


class OneProcessTrainer(FoldTrainer):
    """Holds the folder's lease from before it reads or sends anything until its end."""

    _takes_folder = True
    """On every rank, while rank 0 has not taken it."""
    _lease: SoftFileLease | None = None

    def _take_folder(self) -> None:
        """Be the one process that trains into this folder, before anything is read from it or sent; for all ranks.

        Raises:
            ConfigurationError: another one does.
        """

        def on_rank_zero() -> None:
            doing = f"Fold {self.fold} is trained or validated already in {self.output_folder}"
            self._lease = take(Path(self.output_folder) / LEASE, doing)

        if self._takes_folder:
            from_rank_zero(on_rank_zero)
            self._takes_folder = False

    def _leave_folder(self) -> None:
        """Let another process train here; without it, the end of this process does."""
        self._takes_folder = True
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def _require_folder(self) -> None:
        lost = None if self._lease is None else self._lease.compromise
        if lost is not None and lost.reason == "owner-changed":
            raise FederationError(
                f"Another process trains in {self.output_folder} now: this one was not heard of for so long that it "
                "counted as ended. This one ends."
            )

    def run_training(self) -> None:
        """nnU-Net's loop, in one process at a time for a folder."""
        self._take_folder()
        super().run_training()

    def on_epoch_start(self) -> None:
        """See that the folder is still this process's."""
        self._require_folder()
        super().on_epoch_start()

    def load_checkpoint(self, filename_or_checkpoint: Any) -> None:
        """A checkpoint, once nobody else can write one."""
        with sentences_for_users():
            self._take_folder()
        super().load_checkpoint(filename_or_checkpoint)

    def validate(self, save_probabilities: bool) -> None:
        """The validation, also with ``--val`` in one process at a time."""
        self._take_folder()
        super().validate(save_probabilities)
