"""GCML inside nnU-Net's training: models come from peers, and train beside the site's own for a while."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import SoftFileLease

from nnunet_fed.agreement.plan_digest import plans_digest
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.exchange.precision import narrow
from nnunet_fed.gossip.mailbox import State, described
from nnunet_fed.gossip.schedule import Version, uniform
from nnunet_fed.leases import take
from nnunet_fed.methods.tensors import digest_of_tensors
from nnunet_fed.processes import Process, Step
from nnunet_fed.study.federation import digest_of
from nnunet_fed.trainers.gossip.gossip_session import GossipSession, Standing, require_peers
from nnunet_fed.trainers.gossip.mutual_phase import PhaseTrainer
from nnunet_fed.trainers.gossip.peer_model import PeerModel, plain_values
from nnunet_fed.trainers.parts import checkpoint
from nnunet_fed.trainers.parts.ranks import from_rank_zero, patient_group
from nnunet_fed.trainers.parts.sentences import sentences_for_users
from nnunet_fed.trainers.parts.training_record import RECORD, TrainingRecord, logged_by

ADDRESS_LEASE = "gossip.lock"
"""In the model's folder: which training takes other sites' models (:mod:`nnunet_fed.leases`)."""
MAILBOX = "mailbox"
"""Folder, beside the checkpoints, through which the training and its peer process talk."""


class nnUNetTrainerGCML(PhaseTrainer):  # noqa: N801
    """nnU-Net's training, which no other site delays (:mod:`nnunet_fed.methods.gcml`, ``gossip/schedule.py``).

    After each round that follows the warm-up the site's model goes to the peer process, a process of its own. At the
    start of a round a model that has come trains beside the site's own on the same batches, for ``mutual_epochs``. If
    none ever comes, the training is nnU-Net's, bit for bit: nothing here draws from nnU-Net's random numbers.
    """

    method = "gcml"

    def configure_study(self) -> None:
        """Take from the study how long a site stays alone."""
        super().configure_study()
        self._address: SoftFileLease | None = None
        self._has_address = False
        """On every rank, while rank 0 has the lease."""
        self._warm_up = self.options.warm_up(self.study.rounds * self.study.local_epochs)

    # ------------------------------------------------------------------------------------------- start and end

    @property
    def initial_seed(self) -> int:
        """The study's, or the site's own, as the study says."""
        if self.options.common_init:
            return super().initial_seed
        return int(2**31 * uniform(self.study.seed, "initial weights", self.own_site().name))

    def check_pretrained(self, given: str | None) -> None:
        """Only weights that the study names: no coordinator compares what the sites have."""
        super().check_pretrained(given)
        if given is not None and self.named_weights is None:
            raise ConfigurationError(
                "With GCML no coordinator compares the sites' pretrained weights, so the study has to name them: set "
                f'pretrained = "{given}" and configuration = "{self.configuration_name}" in federation.toml, and plan '
                "with it."
            )

    def run_training(self) -> None:
        """nnU-Net's loop; errors of the federation end in a sentence."""
        with sentences_for_users(), logged_by(self.print_to_log_file):
            try:
                super().run_training()
            except BaseException:
                self._close()
                self._leave_folder()
                raise

    def on_train_start(self) -> None:
        """Let nnU-Net start and fork its workers, then start the peer process."""
        if self.current_epoch < self.num_epochs:  # before anything is done
            self._require_gossip()
        super().on_train_start()
        if self.current_epoch >= self.num_epochs:  # --c after the end
            return
        self._require_gossip()
        self._group = patient_group()
        if self._resumed is None:
            self._standing = Standing(Version(self.own_site().name, {}, 0), digest_of_tensors(self.shared()))
        if self.local_rank == 0:
            self._session = self._open_session()
        if self.options.lockstep and not self._standing.members:
            self._standing.members = self._from_rank_zero(lambda here: here.await_members())
        if self._resumed is not None and self.local_rank == 0:
            if self._exchanges(self.current_epoch):  # a training that was killed between its checkpoint and its post
                self._here().round_over(self.shared_arrays())
            self._here().happened(f"continued with --c in epoch {self.current_epoch}")
            self._begin_more_rounds()
            checkpoint.restore_random_states(self._resumed["random"])

    def _require_gossip(self) -> None:
        self._require_fold_of_plans()
        if not self._has_address:
            self._take_address()
        require_peers(self.own_site(), self.study.sites)
        self._plan_of_choice()

    def _take_address(self) -> None:
        """Be the one training of this model and site that has a peer process, for all ranks: it has one address."""

        def on_rank_zero() -> None:
            doing = (
                f"GCML trains one fold after the other, since the peer process of this site has one address "
                f"({self.own_site().listen})"
            )
            self._address = take(Path(self.output_folder_base) / ADDRESS_LEASE, doing)

        from_rank_zero(on_rank_zero)
        self._has_address = True

    def _require_fold_of_plans(self) -> None:
        """See that this site trains a fold of the study; no coordinator is there to say so."""
        fold, known = self.fold_of_study(), self.study.trained_folds
        if fold not in known:
            raise ConfigurationError(
                f"The study in the plans trains fold {', '.join(map(str, known))}, this command fold {fold}. Train one "
                "of the study's, or let the coordinator set 'folds' in federation.toml and plan again: what is "
                "preprocessed stays."
            )

    def _open_session(self) -> GossipSession:
        folder = Path(self.output_folder)
        continues = self._resumed is not None
        record = TrainingRecord(folder / RECORD, continues)
        fold = self.fold_of_study()
        digest = self.study.digest_of_fold(fold)
        record.describe(
            study=self.study.stored(), digest=digest, fold=fold, site=self.own_site().name,
            training_cases=self._training_cases, initial_weights=self._standing.initial,
        )  # fmt: skip
        if self.pretrained is not None:
            record.note(pretrained=self.pretrained)
        schema, size = described(narrow(self.shared_arrays(), self.study.wire_dtype))
        comparable = {
            "study": digest, "configuration": self.configuration_name,
            "plans": plans_digest(self.plans_manager.plans), **self.compared_of_base(),
        }  # fmt: skip
        state = State(
            run=digest_of(comparable), version=self._standing.version, received={},
            training_cases=self._training_cases, initial=self._standing.initial, schema=schema, size=size,
            max_epoch_distance=self.options.max_epoch_distance or None, lockstep=self.options.lockstep,
        )  # fmt: skip
        return GossipSession(
            self.study, self.options, self._standing, folder / MAILBOX, record, state, self.start_peer, continues
        )

    def start_peer(self) -> Process:
        """Start the process that talks to the peers; it ends with this one, whatever ends it."""
        command = [sys.executable, "-m", "nnunet_fed", "peer", str(Path(self.output_folder) / MAILBOX)]
        command += ["--mode", self.options.mode, "--max-tries", str(self.options.max_tries)]
        command += ["--parent", str(os.getpid())]
        return Process(Step("The peer process", command, os.environ, Path(self.output_folder) / "peer.log"))

    def on_train_end(self) -> None:
        """nnU-Net's final checkpoint, and the last model to a peer that still wants it."""
        super().on_train_end()
        if self._session is not None:
            self._session.round_over(self.shared_arrays())
            self._session.leave()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """The validation; meanwhile the last model is on its way."""
        try:
            super().perform_actual_validation(save_probabilities)
        finally:
            self._close()
            self._leave_folder()

    def _close(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None
        if self._address is not None:
            self._address.release()
            self._address = None
        self._has_address = False

    # ------------------------------------------------------------------------------------------- rounds

    def _ends_round(self, epoch: int) -> bool:
        """Whether a round is over after so many epochs."""
        return epoch > 0 and epoch % self.study.local_epochs == 0

    def _exchanges(self, epoch: int) -> bool:
        """Whether models are sent and taken after so many epochs."""
        return self._ends_round(epoch) and epoch >= self._warm_up

    def on_epoch_start(self) -> None:
        """Take a model that has come, if no other one is at work and a phase still fits into the training."""
        if self._exchanges(self.current_epoch):
            if self.options.lockstep:
                self._from_rank_zero(lambda here: here.await_senders(self.current_epoch))
            if self._peer_model is None and self.current_epoch + self.options.mutual_epochs <= self.num_epochs:
                delivery = self._from_rank_zero(GossipSession.next_letter)
                if delivery is not None:
                    self._begin_phase(*delivery)
        super().on_epoch_start()

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """End a phase, so that this epoch's validation and checkpoints describe the model that was kept."""
        super().on_train_epoch_end(train_outputs)
        if self._peer_model is not None:
            self._peer_model.epochs_left -= 1
            if self._peer_model.epochs_left == 0:
                self._end_phase()

    def on_epoch_end(self) -> None:
        """nnU-Net's checkpoints, then the mail: what has left is always in a checkpoint."""
        epoch, version = self.current_epoch + 1, self._standing.version
        sends = self._exchanges(epoch)
        self._standing.version = version.published(epoch) if sends else replace(version, epoch=epoch)
        super().on_epoch_end()
        if self._session is not None and self._ends_round(epoch) and epoch < self.num_epochs:
            self._session.round_over(self.shared_arrays() if sends else None)

    # ------------------------------------------------------------------------------------------- checkpoints

    def method_state(self) -> dict[str, Any]:
        """Where the training stands in the gossip, and the incoming model with its optimizer while there is one."""
        peer_model = None if self._peer_model is None else self._peer_model.state()
        return {**super().method_state(), "standing": self._standing.plain(), "incoming": peer_model}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`method_state`."""
        super().load_method_state(state)
        self._standing = Standing.from_plain(state["standing"])
        if state["incoming"] is not None:
            self._peer_model = PeerModel.beside(self, **plain_values(state["incoming"]))
            self._peer_model.load_state(state["incoming"])
