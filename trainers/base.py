"""Federated rounds inside nnU-Net's training loop: what every federated trainer shares."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch._dynamo import OptimizedModule

from nnunet_fed.errors import (
    ConfigurationError,
    DeadlineError,
    DisagreementError,
    FederationError,
    RoundClosedError,
)
from nnunet_fed.federation import PLANS_KEY, Federation, Site
from nnunet_fed.methods.fedavg import site_weight
from nnunet_fed.payload import Array
from nnunet_fed.plans import plans_digest
from nnunet_fed.tensors import digest_of_tensors, load_arrays, shared_tensors, to_arrays
from nnunet_fed.trainers import checkpoint
from nnunet_fed.trainers.membership import Membership
from nnunet_fed.trainers.ranks import RankZeroSeat, from_rank_zero, patient_group
from nnunet_fed.trainers.record import logged_by
from nnunet_fed.trainers.rounds import common_start, pad_log, require_agreement, round_of, scope_of_round
from nnunet_fed.trainers.strata import evaluate_lesions

DEBUG_VARIABLE = "nnUNet_fed_debug"
THREADS_VARIABLE = "nnUNet_fed_threads"
"""Number of torch's threads; stock nnU-Net takes every core for each process on the CPU."""
SKIP_VALIDATION_VARIABLE = "nnUNet_fed_skip_validation"


class _TrainingOver(Exception):  # noqa: N818
    """The last round is over, though nnU-Net's loop has epochs left, because this site skipped some."""


@contextmanager
def sentences_for_users() -> Iterator[None]:
    """End the process with the error's sentence instead of a traceback, unless ``nnUNet_fed_debug`` is set."""
    try:
        yield
    except FederationError as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        raise SystemExit(f"Error: {error}") from None


class FederatedTrainer(nnUNetTrainer):
    """nnU-Net's trainer with an exchange at the end of every round.

    A method overrides :meth:`exchange` and the few hooks that it needs. One round is ``local_epochs`` epochs of
    nnU-Net; the study comes from the plans. Prediction and ``--val`` need no network and no coordinator.

    What is exchanged is saved before it is sent: ``checkpoint_latest.pth`` first holds the state *before* the exchange,
    so that a killed training contributes the same bytes again (rule 2 of the protocol), then the state after the epoch.
    """

    method: ClassVar[str]
    """Name of the method, as in the study's table."""
    MODEL: ClassVar[str] = "model"
    """Name of the mean that a late site continues from, in every scope."""

    current_epoch: int
    communicator: RankZeroSeat
    """The verbs, on every rank; set when the training starts."""

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's own signature, which it inspects)
    ):
        with sentences_for_users():
            self.study = self._study_of(plans)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_lr = self.study.initial_lr
        self.num_iterations_per_epoch = self.study.iterations_per_epoch
        self.num_val_iterations_per_epoch = self.study.val_iterations_per_epoch
        self.num_epochs = self.study.epochs
        self.save_every = self.study.local_epochs
        if self.device.type == "cpu" and os.environ.get(THREADS_VARIABLE):
            torch.set_num_threads(int(os.environ[THREADS_VARIABLE]))
        self._membership: Membership | None = None
        self._training_cases = 0
        self._resumed: dict[str, Any] | None = None
        self._pending: list[dict[str, Any]] | None = None
        self._next_epoch = 0
        self._study_now = self.study
        self._figures: dict[str, float] = {}
        self.diagnostics: dict[str, float] = {}
        """The method's figures of the round, for the log and the record; set them in :meth:`exchange`."""

    def _study_of(self, plans: dict[str, Any]) -> Federation:
        name = plans.get("plans_name")
        if PLANS_KEY not in plans:
            raise ConfigurationError(
                f"The plans '{name}' were not made for a federation. Run 'nnunet_fed plan_and_preprocess' and train "
                "with the plans that it names, for example -p nnUNetFedPlans."
            )
        study = Federation.model_validate(plans[PLANS_KEY]["study"])
        if study.method.name != self.method:
            raise ConfigurationError(
                f"The plans '{name}' were made for the method '{study.method.name}', {type(self).__name__} does "
                f"'{self.method}'. Use the trainer of that method, or plan for another study."
            )
        return study

    # ------------------------------------------------------------------------------------------- for the methods

    def exchange(self, scope: str) -> None:
        """Exchange with the other sites at the end of a round; called on every rank.

        Args:
            scope: first part of this round's keys. The mean ``SCOPE/model`` must hold what a late site continues from.
        """
        raise NotImplementedError

    def prepare(self) -> None:
        """Agree on what the method needs before the first round; called on every rank, never after ``--c``.

        A site that comes late calls it too: use scopes of its own, and fetch what closed without this site.
        """

    def catch_up(self, scope: str) -> None:
        """Take what else a site needs that now holds the model of ``scope`` but missed its exchange."""

    def method_state(self) -> dict[str, Any]:
        """The method's own state, for the checkpoint; part of what a resumed training must have to send the same."""
        return {}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`method_state`; the network and the optimizer are restored already."""

    @property
    def bare_network(self) -> torch.nn.Module:
        """The network without the wrappers of ``DistributedDataParallel`` and ``torch.compile``."""
        network = self.network.module if self.is_ddp else self.network
        return network._orig_mod if isinstance(network, OptimizedModule) else network

    def shared_arrays(self) -> dict[str, Array]:
        """The tensors that this site shares, as arrays."""
        return to_arrays(shared_tensors(self.bare_network))

    def load_shared(self, arrays: dict[str, Array]) -> None:
        """Take received tensors into the network, in place."""
        load_arrays(shared_tensors(self.bare_network), arrays)

    @property
    def site_weight(self) -> float:
        """This site's weight in a mean."""
        return site_weight(self.study.weighting, self._training_cases)

    # ------------------------------------------------------------------------------------------- nnU-Net's hooks

    def initialize(self) -> None:
        """Build the network from the study's seed."""
        checkpoint.seed_everything(self.study.seed + self.local_rank)
        super().initialize()

    def configure_optimizers(self) -> Any:
        """nnU-Net's optimizer and schedule, with the study's momentum."""
        optimizer, schedule = super().configure_optimizers()
        for group in optimizer.param_groups:
            group["momentum"] = self.study.momentum
        return optimizer, schedule

    def get_tr_and_val_datasets(self) -> Any:
        """nnU-Net's data sets; notes the number of training cases."""
        training, validation = super().get_tr_and_val_datasets()
        self._training_cases = len(training.identifiers)
        return training, validation

    def get_dataloaders(self) -> Any:
        """nnU-Net's loaders, then the seat: who has used gRPC must not fork, and nnU-Net forks its workers here.

        A training that is refused has written nothing yet but its log.
        """
        loaders = super().get_dataloaders()
        if self.current_epoch < self.num_epochs:
            try:
                self._study_now = from_rank_zero(self._join)
            except BaseException:
                for loader in loaders:
                    if isinstance(loader, NonDetMultiThreadedAugmenter):
                        loader._finish()
                raise
        return loaders

    def run_training(self) -> None:
        """nnU-Net's loop; a site that skipped rounds leaves it early. Errors of the federation end in a sentence."""
        with sentences_for_users(), logged_by(self.print_to_log_file):
            try:
                try:
                    super().run_training()
                except _TrainingOver:
                    self.on_train_end()
            except BaseException:
                self._report("failed", wait=True)  # not why: an error's text may name files and cases
                raise

    def on_train_start(self) -> None:
        """Let nnU-Net start, join, then agree on initial weights or go on where the federation is."""
        if self.current_epoch >= self.num_epochs:  # --c after the end: nothing left for which to need the others
            super().on_train_start()
            return
        super().on_train_start()  # joins in get_dataloaders
        study = self._study_now
        seat, site = None, Site.from_environment().name
        if self._membership is not None:
            seat = self._membership.seat
            self._membership.describe(self._training_cases)
        self.communicator = RankZeroSeat(seat, site, study.sites, patient_group(study.deadline_minutes + 10))
        if self._resumed is None:
            self._start_together()
        else:
            self._happened(f"continued with --c in epoch {self.current_epoch}")
            self._continue(self._resumed)

    def on_epoch_start(self) -> None:
        """Skip the epochs of rounds that went on without this site."""
        if self._next_epoch > self.current_epoch:
            self._take_newest()
            if self._next_epoch > self.current_epoch:
                self._skip_to(self._next_epoch)
        if self.current_epoch >= self.num_epochs:
            raise _TrainingOver
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
        if (self.current_epoch + 1) % self.study.local_epochs == 0:
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
            self.save_global_checkpoint(Path(self.output_folder) / "checkpoint_global.pth")
        if self._membership is not None:
            self._membership.seat.leave("finished")

    def save_global_checkpoint(self, filename: Path) -> None:
        """Write the last global model: unless a method personalizes, it is what the training ended with."""
        part = filename.with_name(filename.name + ".part")
        shutil.copyfile(filename.with_name("checkpoint_final.pth"), part)
        part.replace(filename)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's validation, watched by those who watch."""
        if os.environ.get(SKIP_VALIDATION_VARIABLE):
            self.print_to_log_file(f"Validation is skipped, since {SKIP_VALIDATION_VARIABLE} is set.")
        else:
            self._report("validating")
            super().perform_actual_validation(save_probabilities)
            with sentences_for_users():
                evaluate_lesions(self)
        self._report("done", wait=True)
        if self._membership is not None:
            self._membership.seat.close()

    # ------------------------------------------------------------------------------------------- checkpoints

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint with our state added; it replaces an older one only once it is complete.

        It names the stock trainer, whose network it holds: so it predicts where nnunet_fed is not installed.
        """
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        part = Path(filename + ".part")
        super().save_checkpoint(str(part))
        attempt = self._membership.attempt if self._membership is not None else None
        state = {
            "attempt": attempt if self._resumed is None else self._resumed["attempt"],
            "pending": self._pending,
            "next_epoch": self._next_epoch,
            "random": checkpoint.random_states(),
            "method": self.method_state(),
        }
        additions = {checkpoint.FEDERATION: state, "trainer_name": nnUNetTrainer.__name__}
        checkpoint.amend(part, Path(filename), additions)

    def load_checkpoint(self, filename_or_checkpoint: Any) -> None:
        """nnU-Net's checkpoint and our state; the random states wait until the training has started."""
        super().load_checkpoint(filename_or_checkpoint)
        state = checkpoint.federation_state(Path(filename_or_checkpoint))
        if state is None:
            return
        self._resumed = state
        self._pending = state["pending"]
        self._next_epoch = state["next_epoch"]
        if self._pending is not None:
            for values in self.logger.get_checkpoint().values():
                del values[self.current_epoch :]
        self.load_method_state(state["method"])

    def _save_pending(self, train_outputs: list[dict[str, Any]]) -> None:
        """Save the state before the exchange, as of an epoch that is not over."""
        self._pending = train_outputs
        self.current_epoch -= 1  # nnU-Net writes the number of the next epoch
        try:
            self.save_checkpoint(str(Path(self.output_folder) / "checkpoint_latest.pth"))
        finally:
            self.current_epoch += 1

    # ------------------------------------------------------------------------------------------- the federation

    @property
    def _continues(self) -> bool:
        """Whether the command said ``--c``."""
        return bool(self.logger.resume)

    def _join(self) -> Federation:
        """Take the seat (on rank 0); returns the study as the coordinator has it."""
        self._membership = Membership(
            self.study,
            self.configuration_name,
            type(self).__name__,
            self.fold,
            Path(self.output_folder),
            continues=self._continues,
            attempt=None if self._resumed is None else self._resumed["attempt"],
        )
        return self._membership.study

    def _start_together(self) -> None:
        """Agree on initial weights; a site that comes late starts with the newest model."""
        try:
            scope, arrays = common_start(self.communicator, self.MODEL, self.shared_arrays)
            self.load_shared(arrays)
            digests = {
                "plans": plans_digest(self.plans_manager.plans),
                "initial weights": digest_of_tensors(shared_tensors(self.bare_network)),
            }
            require_agreement(self.communicator, scope, digests)
        except RoundClosedError:
            self._take_newest()
        self.prepare()

    def _continue(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, or from the newest model when the federation has moved on meanwhile."""
        key = self.communicator.newest(self.MODEL)
        own = self.current_epoch // self.study.local_epochs
        if key is not None and round_of(key) >= own + (self._pending is not None):
            self._pending = None
            self._take_newest()
        if self.local_rank == 0:  # whose states they are; the other ranks draw their own patches
            checkpoint.restore_random_states(state["random"])

    def _exchange_round(self, number: int) -> None:
        scope = scope_of_round(number)
        self._report("exchanging")
        self.diagnostics = {}
        with self._membership.exchanging(scope) if self._membership is not None else nullcontext({}) as entry:
            try:
                self.exchange(scope)
            except RoundClosedError:
                self._happened(f"{scope} went on without this site")
                self._take_newest(number)
            else:
                entry.update(self.diagnostics)
        if self.diagnostics:
            figures = ", ".join(f"{name} {value:.5g}" for name, value in self.diagnostics.items())
            self.print_to_log_file(f"{self.method} in {scope}: {figures}")
        if self.study.momentum_on_round == "reset":
            self.optimizer.state.clear()

    def _take_newest(self, number: int = -1) -> None:
        """Load the federation's newest model, of round ``number`` or later, and note the epoch from which to go on."""
        end = time.monotonic() + 60 * self._study_now.deadline_minutes
        while (key := self.communicator.newest(self.MODEL)) is None or round_of(key) < number:
            if key is None and number < 0:
                raise DisagreementError("The federation has no model yet from which this site could go on.")
            if time.monotonic() > end:  # the site missed an earlier collective of the round
                raise DeadlineError(
                    f"The others did not finish {scope_of_round(number)}, which began without this site."
                )
            time.sleep(1)
        self.load_shared(self.communicator.fetch(key))
        self.catch_up(key.partition("/")[0])
        self._next_epoch = (round_of(key) + 1) * self.study.local_epochs

    def _skip_to(self, epoch: int) -> None:
        self._happened(f"caught up from epoch {self.current_epoch} to epoch {epoch} with the federation's newest model")
        pad_log(self.logger.get_checkpoint(), epoch)
        self.current_epoch = epoch

    def _report(self, phase: str, wait: bool = False) -> None:
        if self._membership is not None:
            number = min(self.current_epoch // self.study.local_epochs + 1, self.study.rounds)
            progress = {"phase": phase, "round": number, "rounds": self.study.rounds, "epoch": self.current_epoch}
            self._membership.report({**progress, **self._figures}, wait)

    def _happened(self, text: str) -> None:
        self.print_to_log_file(text)
        if self._membership is not None:
            self._membership.happened(text)
