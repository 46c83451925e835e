"""GCML inside nnU-Net's training: models come from peers, and train beside the site's own for a while."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from nnunetv2.utilities.helpers import empty_cache

from nnunet_fed.agreement.plan_digest import plans_digest
from nnunet_fed.errors import ConfigurationError, FederationError, RefusedError
from nnunet_fed.exchange.payload import Array, Tensors, is_floating, open_payload
from nnunet_fed.exchange.precision import narrow, widen
from nnunet_fed.gossip.mailbox import Letter, State, described
from nnunet_fed.gossip.schedule import Candidate, Version, kept, merged, uniform
from nnunet_fed.methods.tensors import digest_of_tensors, load_arrays, shared_tensors, to_arrays
from nnunet_fed.processes import Process, Step
from nnunet_fed.study.federation import digest_of
from nnunet_fed.study.site import Site
from nnunet_fed.trainers.gossip.gossip_session import Correspondence, Standing
from nnunet_fed.trainers.gossip.mutual_learning import MutualTrainer
from nnunet_fed.trainers.gossip.patch_dice import foreground_dice
from nnunet_fed.trainers.gossip.peer_model import Incoming, plain_values
from nnunet_fed.trainers.parts import checkpoint
from nnunet_fed.trainers.parts.ranks import from_rank_zero, patient_group
from nnunet_fed.trainers.parts.study_trainer import own_site, sentences_for_users
from nnunet_fed.trainers.parts.training_record import Record, logged_by

T = TypeVar("T")

MAILBOX = "mailbox"
"""Folder, beside the checkpoints, through which the training and its peer process talk."""


class nnUNetTrainerGCML(MutualTrainer):  # noqa: N801
    """nnU-Net's training, which no other site delays (:mod:`nnunet_fed.methods.gcml`, ``gossip/schedule.py``).

    After each round that follows the warm-up the site's model goes to the peer process, a process of its own. At the
    start of a round a model that has come trains beside the site's own on the same batches, for ``mutual_epochs``. If
    none ever comes, the training is nnU-Net's, bit for bit: nothing here draws from nnU-Net's random numbers.
    """

    method = "gcml"

    def configure_study(self) -> None:
        """Nothing has come yet, and nobody is there to talk to."""
        super().configure_study()
        self._warm_up = self.options.warm_up(self.study.epochs)
        self._standing: Standing
        self._correspondence: Correspondence | None = None
        self._group: Any = None

    # ------------------------------------------------------------------------------------------- start and end

    @property
    def initial_seed(self) -> int:
        """The study's, or the site's own, as the study says."""
        if self.options.common_init:
            return super().initial_seed
        return int(2**31 * uniform(self.study.seed, "initial weights", Site.from_environment().name))

    def run_training(self) -> None:
        """nnU-Net's loop; errors of the federation end in a sentence."""
        with sentences_for_users(), logged_by(self.print_to_log_file):
            try:
                super().run_training()
            except BaseException:
                self._close()
                raise

    def on_train_start(self) -> None:
        """Let nnU-Net start and fork its workers, then start the peer process."""
        if self.current_epoch >= self.num_epochs:  # --c after the end
            super().on_train_start()
            return
        site = own_site(self.study, self.fold)
        _require_peers(site, self.study.sites)
        self._plan_of_choice()
        super().on_train_start()
        self._group = patient_group(self.study.deadline_minutes + 10)
        if self._resumed is None:
            self._standing = Standing(Version(site.name, {}, 0), digest_of_tensors(self.shared()))
        if self.local_rank == 0:
            self._correspondence = self._correspond(site)
        if self.options.lockstep and not self._standing.members:
            self._standing.members = self._from_rank_zero(lambda here: here.await_members())
        if self._resumed is not None and self.local_rank == 0:
            if self._exchanges(self.current_epoch):  # a training that was killed between its checkpoint and its post
                self._here().round_over(self.shared_arrays())
            self._here().happened(f"continued with --c in epoch {self.current_epoch}")
            checkpoint.restore_random_states(self._resumed["random"])

    def _correspond(self, site: Site) -> Correspondence:
        folder = Path(self.output_folder)
        continues = self._resumed is not None
        record = Record(folder / "federation.json", continues)
        record.describe(
            study=self.study.stored(), digest=self.study.digest, site=site.name,
            training_cases=self._training_cases, initial_weights=self._standing.initial,
        )  # fmt: skip
        schema, size = described(narrow(self.shared_arrays(), self.study.wire_dtype))
        comparable = {
            "study": self.study.digest_of_fold(self.study.fold), "configuration": self.configuration_name,
            "plans": plans_digest(self.plans_manager.plans),
        }  # fmt: skip
        state = State(
            run=digest_of(comparable), version=self._standing.version, received={},
            training_cases=self._training_cases, initial=self._standing.initial, schema=schema, size=size,
            max_epoch_distance=self.options.max_epoch_distance or None, lockstep=self.options.lockstep,
        )  # fmt: skip
        return Correspondence(self.study, self._standing, folder / MAILBOX, record, state, self.start_peer, continues)

    def start_peer(self) -> Process:
        """Start the process that talks to the peers; it ends with this one, whatever ends it."""
        command = [sys.executable, "-m", "nnunet_fed", "peer", str(Path(self.output_folder) / MAILBOX)]
        command += ["--mode", self.options.mode, "--max-tries", str(self.options.max_tries)]
        command += ["--parent", str(os.getpid())]
        return Process(Step("The peer process", command, os.environ, Path(self.output_folder) / "peer.log"))

    def on_train_end(self) -> None:
        """nnU-Net's final checkpoint, and the last model to a peer that still wants it."""
        super().on_train_end()
        if self._correspondence is not None:
            self._correspondence.round_over(self.shared_arrays())
            self._correspondence.leave()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """The validation; meanwhile the last model is on its way."""
        try:
            super().perform_actual_validation(save_probabilities)
        finally:
            self._close()

    def _close(self) -> None:
        if self._correspondence is not None:
            self._correspondence.close()
            self._correspondence = None

    def _here(self) -> Correspondence:
        if self._correspondence is None:
            raise RuntimeError("rank 0 alone has the mailbox, and only while it trains")
        return self._correspondence

    def _from_rank_zero(self, question: Callable[[Correspondence], T]) -> T:
        return from_rank_zero(lambda: question(self._here()), self._group)

    def _happened(self, text: str) -> None:
        if self._correspondence is not None:
            self._correspondence.happened(text)

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
            if self._incoming is None and self.current_epoch + self.options.mutual_epochs <= self.num_epochs:
                delivery = self._from_rank_zero(Correspondence.next_letter)
                if delivery is not None:
                    self._begin_phase(*delivery)
        super().on_epoch_start()

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """End a phase, so that this epoch's validation and checkpoints describe the model that was kept."""
        super().on_train_epoch_end(train_outputs)
        if self._incoming is not None:
            self._incoming.epochs_left -= 1
            if self._incoming.epochs_left == 0:
                self._end_phase(self._incoming)

    def on_epoch_end(self) -> None:
        """nnU-Net's checkpoints, then the mail: what has left is always in a checkpoint."""
        epoch, version = self.current_epoch + 1, self._standing.version
        sends = self._exchanges(epoch)
        self._standing.version = version.published(epoch) if sends else replace(version, epoch=epoch)
        super().on_epoch_end()
        if self._correspondence is not None and self._ends_round(epoch) and epoch < self.num_epochs:
            self._correspondence.round_over(self.shared_arrays() if sends else None)

    # ------------------------------------------------------------------------------------------- a mutual phase

    def _begin_phase(self, letter: Letter, payload: Path) -> None:
        try:
            arrays = widen(open_payload(payload))
            _require_finite(arrays)
            before = {name: array.copy() for name, array in self.shared_arrays().items()}
            self._incoming = self._make_incoming(
                version=letter.version, initial=letter.initial, size=letter.size, plan=self._plan_of_choice(),
                began=self.current_epoch, epochs_left=self.options.mutual_epochs,
                before=before if self.options.keep == "best" else None,
            )  # fmt: skip
            load_arrays(shared_tensors(self.bare(self._incoming.network)), arrays)
        except FederationError as error:  # whatever a peer sends, this training goes on
            self._incoming = None
            self._standing.received[letter.version.site] = letter.version.counter
            self._happened(f"the model of {letter.version.site} cannot be used. {error}")
        else:
            self._happened(
                f"trains with the model that {letter.version.site} had after {letter.version.epoch} epochs "
                f"({self._incoming.plan})"
            )

    def _end_phase(self, incoming: Incoming) -> None:
        """Decide which model stays, and forget the peer's."""
        options, standing, site = self.options, self._standing, incoming.version.site
        own, theirs = self.shared_arrays(), to_arrays(shared_tensors(self.bare(incoming.network)))
        models: dict[Candidate, Tensors] = {"incoming": theirs}
        if incoming.before is not None:
            models["before"] = incoming.before
        if options.keep != "local" and incoming.initial == standing.initial:
            models["merged"] = merged(
                own, theirs, options.merge_weight, own_initial=standing.initial, incoming_initial=incoming.initial
            )
        scores = self._scores(models) if options.keep == "best" else {}
        choice = kept(options.keep, scores, options.keep_tolerance)
        if choice != "local":
            self.load_shared(dict(models[choice]))
        if choice != "local" or self.study.momentum_on_round == "reset":
            self.optimizer.state.clear()
        if choice != "before":
            standing.version = standing.version.influenced_by(incoming.version)
        standing.received[site] = incoming.version.counter
        standing.used[site] = standing.used.get(site, 0) + 1
        phase = {
            "from": site, "counter": incoming.version.counter, "epoch": incoming.version.epoch, "bytes": incoming.size,
            "began": incoming.began, "ended": self.current_epoch, "plan": incoming.plan, "kept": choice,
            "scores": {name: score for name, score in scores.items() if np.isfinite(score)},
        }  # fmt: skip
        standing.phases.append(phase)
        self._happened(f"keeps the {choice} model after the phase with {site}'s")
        self._incoming = None
        empty_cache(self.device)

    def _scores(self, models: dict[Candidate, Tensors]) -> dict[Candidate, float]:
        def on_rank_zero(here: Correspondence) -> dict[Candidate, float]:
            own = self.bare(self.network)
            networks: dict[Candidate, torch.nn.Module] = {"local": own}
            for name, arrays in models.items():
                networks[name] = copy.deepcopy(own)
                load_arrays(shared_tensors(networks[name]), arrays)
            return foreground_dice(self, networks, int(2**32 * uniform(self.study.seed, "patches", here.site)))

        return self._from_rank_zero(on_rank_zero)

    # ------------------------------------------------------------------------------------------- checkpoints

    def method_state(self) -> dict[str, Any]:
        """Where the training stands in the gossip, and the incoming model with its optimizer while there is one."""
        incoming = None if self._incoming is None else self._incoming.state()
        return {**super().method_state(), "standing": self._standing.plain(), "incoming": incoming}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`method_state`."""
        super().load_method_state(state)
        self._standing = Standing.from_plain(state["standing"])
        if state["incoming"] is not None:
            self._incoming = self._make_incoming(**plain_values(state["incoming"]))
            self._incoming.load_state(state["incoming"])


def _require_finite(arrays: dict[str, Array]) -> None:
    for name, array in arrays.items():
        if is_floating(array) and not np.isfinite(array).all():
            raise RefusedError(f"Its tensor '{name}' holds numbers that are not finite.")


def _require_peers(site: Site, sites: tuple[str, ...]) -> None:
    if site.name not in sites:
        raise ConfigurationError(
            f"Site '{site.name}' is not in the study, which is of {', '.join(sites)}: correct 'name' in site.toml."
        )
    if site.listen is None:
        raise ConfigurationError(
            "site.toml names no peers: GCML needs 'listen', this site's own address, and 'peers', those of all sites."
        )
    missing = [name for name in sites if name not in site.peers]
    if missing:
        raise ConfigurationError(
            f"The list of peers in site.toml lacks the study's {', '.join(missing)}: add the addresses, at all sites."
        )
