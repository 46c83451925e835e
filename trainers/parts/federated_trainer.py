"""Federated rounds inside nnU-Net's training loop: what every federated trainer shares."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from nnunet_fed.errors import RoundClosedError
from nnunet_fed.exchange import keys
from nnunet_fed.exchange.payload import Tensors
from nnunet_fed.files import replacing
from nnunet_fed.prediction.checkpoint_files import FINAL_CHECKPOINT, GLOBAL_CHECKPOINT
from nnunet_fed.trainers.parts.cross_site_evaluation import evaluate_across_sites, is_complete
from nnunet_fed.trainers.parts.federation_best import FederationBestTrainer
from nnunet_fed.trainers.parts.sentences import sentences_for_users
from nnunet_fed.trainers.parts.training_record import logged_by


class _TrainingOver(Exception):  # noqa: N818
    """The last round is over, though nnU-Net's loop has epochs left, because this site skipped some."""


class FederatedTrainer(FederationBestTrainer):
    """nnU-Net's trainer with an exchange at the end of every round.

    A method overrides :meth:`exchange` and the few hooks that it needs. One round is ``local_epochs`` epochs of
    nnU-Net; the study comes from the plans. Prediction and ``--val`` need no network and no coordinator.

    What is exchanged is saved before it is sent: ``checkpoint_latest.pth`` first holds the state *before* the exchange,
    so that a killed training contributes the same bytes again (rule 2 of the protocol), then the state after the epoch.
    """

    def configure_study(self) -> None:
        """Take what the trainer needs from the study, at the end of construction."""
        super().configure_study()
        self.diagnostics: dict[str, float] = {}
        """The method's figures of the round, for the log and the record; set them in :meth:`exchange`."""

    # ------------------------------------------------------------------------------------------- for the methods

    def exchange(self, scope: str) -> None:
        """Exchange with the other sites at the end of a round; called on every rank.

        Args:
            scope: first part of this round's keys. The last collective is the mean ``SCOPE/model``, and it holds what a
                late site continues from.
        """
        raise NotImplementedError

    def average(self, scope: str, uploaded: Tensors | None = None) -> None:
        """Replace the shared tensors by the mean over the sites of the round: the last collective of an exchange.

        Args:
            scope: of the exchange.
            uploaded: what this site gives; ``None``: its shared tensors as they are.
        """
        given = self.shared_arrays() if uploaded is None else uploaded
        self.load_shared(self.communicator.mean(keys.key_of(scope, self.MODEL), given, self.site_weight))

    @property
    def validates_together(self) -> bool:
        """Whether the site needs the others after the validation; otherwise it leaves when the training ends."""
        return self._evaluates_across_sites

    # ------------------------------------------------------------------------------------------- nnU-Net's hooks

    def run_training(self) -> None:
        """nnU-Net's loop; a site that skipped rounds leaves it early. Errors of the federation end in a sentence."""
        with sentences_for_users(), logged_by(self.print_to_log_file):
            try:
                try:
                    super().run_training()
                except _TrainingOver:
                    self.on_train_end()
            except BaseException:
                with suppress(OSError):  # a full disk, to which what is sent could not be written
                    self._report("failed", wait=True)  # not why: an error's text may name files and cases
                self._leave_folder()
                raise

    def on_train_start(self) -> None:
        """Let nnU-Net start, join, then agree on initial weights or go on where the federation is."""
        super().on_train_start()  # joins in get_dataloaders, but not for --c after the rounds, which needs nobody
        if self._membership is None:
            self._restore_random_states()
            return
        self._connect()
        if self._resumed is None:
            self._start_together()
            return
        self.happened(f"continued with --c in epoch {self.current_epoch}")
        reason = self._reason_to_start_anew(self._membership, self._resumed)
        if reason is None:
            self._continue()
        else:
            self._start_anew(reason)
        if self.study.cross_site and (reason is not None or self._rounds_before is not None):
            self.note_facts(cross_site={})  # it was of other models
        self._begin_more_rounds()
        self._restore_random_states()

    def on_epoch_start(self) -> None:
        """Skip the epochs of rounds that went on without this site."""
        if self._next_epoch > self.current_epoch:
            self._take_newest()
            if self._next_epoch > self.current_epoch:
                self._skip_to(self._next_epoch)
        if self.current_epoch >= self.num_epochs:
            raise _TrainingOver
        if self.current_epoch >= self.study.epochs and self._session is not None and not self.validates_together:
            self._session.part("finished its rounds")  # what follows needs nobody
        super().on_epoch_start()
        self._report("training")

    def on_train_epoch_start(self) -> None:
        """Do not train again what a killed training had done but not exchanged."""
        super().on_train_epoch_start()
        if self._pending is not None:
            self.num_iterations_per_epoch = 0

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Exchange at a round's end, so that this epoch's validation and checkpoints describe the model after it."""
        resent = self._pending is not None
        if self._pending is not None:
            train_outputs, self.num_iterations_per_epoch = self._pending, self.study.iterations_per_epoch
        super().on_train_epoch_end(train_outputs)
        if self.current_epoch < self.study.epochs and (self.current_epoch + 1) % self.study.local_epochs == 0:
            if not resent:
                self._save_pending(train_outputs)
            self._exchange_round(self.current_epoch // self.study.local_epochs)
        self._pending = None

    def on_epoch_end(self) -> None:
        """Tell those who watch how the epoch went."""
        super().on_epoch_end()
        names = {"loss": "train_losses", "dice": "mean_fg_dice"}
        self._figures = {name: float(self.logger.get_value(key, step=-1)) for name, key in names.items()}
        self._report("training")

    def on_train_end(self) -> None:
        """nnU-Net's final checkpoint, the global model beside it, and leave."""
        super().on_train_end()
        if self.local_rank == 0 and not self.disable_checkpointing:
            self.save_models(Path(self.output_folder))
        if not self.validates_together:
            self._leave()

    def save_models(self, folder: Path) -> None:
        """Write what a site has besides ``checkpoint_final.pth``: the global model, which is the same one here."""
        with replacing(folder / GLOBAL_CHECKPOINT) as part:
            shutil.copyfile(folder / FINAL_CHECKPOINT, part)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """The validation, watched by those who watch."""
        try:
            with sentences_for_users():
                self._validate_with_others(save_probabilities)
        finally:
            self._leave_folder()

    def _validate_with_others(self, save_probabilities: bool) -> None:
        if not self.skips_validation:
            self._report("validating")
        super().perform_actual_validation(save_probabilities)
        if self._evaluates_across_sites and not self.skips_validation:
            with logged_by(self.print_to_log_file):
                self._evaluate_across_sites(save_probabilities)
        self._report("done", wait=True)
        if self.validates_together:
            self._leave()
        if self._session is not None:
            self._session.close()

    # ------------------------------------------------------------------------------------------- the federation

    @property
    def _evaluates_across_sites(self) -> bool:
        return self.study.cross_site and self.operational.cross_site

    def _evaluate_across_sites(self, save_probabilities: bool) -> None:
        """Evaluate across sites; --c after the end joins again for what is missing, and --val needs nobody."""
        if not self.is_connected:
            if not self._continues or is_complete(self):
                return
            self._join()
            self._connect()
        if self._evaluates_across_sites:
            evaluate_across_sites(self, save_probabilities, self._report)

    def _exchange_round(self, number: int) -> None:
        scope = keys.scope_of_round(number)
        self._report("exchanging")
        self.diagnostics = {}
        noted: AbstractContextManager[dict[str, float]] = nullcontext({})
        if self._session is not None:
            noted = self._session.exchanging(scope)
        with noted as entry:
            try:
                self.exchange(scope)
            except RoundClosedError:
                self.happened(f"{scope} went on without this site")
                self._take_newest(number)
            else:
                entry.update(self.diagnostics)
        if self.diagnostics:
            figures = ", ".join(f"{name} {value:.5g}" for name, value in self.diagnostics.items())
            self.print_to_log_file(f"{self.method} in {scope}: {figures}")
            if self.tracker is not None:
                self.tracker.round_over(number + 1, self.diagnostics)
        if self.study.momentum_on_round == "reset":
            for optimizer in self.optimizers:
                optimizer.state.clear()

    # ------------------------------------------------------------------------------------------- checkpoints

    def training_state(self) -> dict[str, Any]:
        """Also where it belongs, what was trained and is not exchanged yet, and the epoch from which to go on."""
        resumed, joined, session = self._resumed or {}, self._membership, self._session
        held = resumed.get("held") if session is None else session.communicator.held
        return {
            **super().training_state(),
            "attempt": resumed.get("attempt") if joined is None else joined.attempt,
            "run": resumed.get("run") if joined is None else joined.run,
            "held": None if held is None else tuple(held),
            "pending": self._pending,
            "next_epoch": self._next_epoch,
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`training_state`; an epoch that is not exchanged yet is not over."""
        self._pending, self._next_epoch = state["pending"], state["next_epoch"]
        if self._pending is not None:
            for values in self.logger.get_checkpoint().values():
                del values[self.current_epoch :]
        super().load_training_state(state)

    def _save_pending(self, train_outputs: list[dict[str, Any]]) -> None:
        """Save the state before the exchange, as of an epoch that is not over."""
        self._pending = train_outputs
        self._save_latest()
