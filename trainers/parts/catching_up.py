"""How a site finds its way back: after a pause, in rounds that went on without it, or that were undone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, ClassVar

import torch

from nnunet_fed.agreement.plan_digest import plans_digest
from nnunet_fed.errors import DeadlineError, DisagreementError, RoundClosedError
from nnunet_fed.exchange import keys
from nnunet_fed.methods.tensors import digest_of_tensors
from nnunet_fed.prediction.checkpoint_files import LATEST_CHECKPOINT
from nnunet_fed.trainers.parts import checkpoint
from nnunet_fed.trainers.parts.connected_trainer import ConnectedTrainer
from nnunet_fed.trainers.parts.coordinator_session import Membership
from nnunet_fed.trainers.parts.rounds import PRETRAINED, common_start, fit_log, require_agreement
from nnunet_fed.trainers.parts.starting_anew import begin_anew, is_finite, set_aside

NOT_FINITE = "the state of this site is not finite"


class CatchingUpTrainer(ConnectedTrainer):
    """Starts with the others, goes on where they are, or starts anew from their newest model."""

    MODEL: ClassVar[str] = keys.MODEL
    """Name of the mean that a late site continues from, in every scope."""

    def configure_study(self) -> None:
        """Nothing has been missed, and nothing waits to be exchanged."""
        super().configure_study()
        self._pending: list[dict[str, Any]] | None = None
        """What the epoch has given that is trained and not exchanged yet."""
        self._next_epoch = 0

    def prepare(self) -> None:
        """Agree on what the method needs before the first round; called on every rank, never after ``--c``.

        A site that comes late calls it too: use scopes of its own, and fetch what closed without this site.
        """

    def catch_up(self, scope: str) -> None:
        """Take what else a site needs that now holds the model of ``scope`` but missed its exchange."""

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """All optimizers of the method."""
        return [self.optimizer]

    # ------------------------------------------------------------------------------------------- the way back

    def _start_together(self) -> None:
        """Agree on initial weights; a site that comes late starts with the newest model."""
        if self.pretrained is not None:
            self.note_facts(pretrained=self.pretrained)
        try:
            scope, arrays = common_start(self.communicator, self.MODEL, self.shared_arrays)
            self.load_shared(arrays)
            digests = {
                "plans": plans_digest(self.plans_manager.plans),
                "initial weights": digest_of_tensors(self.shared()),
                **self.compared_of_base(),
            }
            if self.pretrained is not None:
                digests = {PRETRAINED: self.pretrained, **digests}
            require_agreement(self.communicator, scope, digests)
            if self.pretrained is not None:
                self.happened(f"starts from the pretrained weights {self.pretrained}, as the other sites do")
        except RoundClosedError:
            self._forget_pretrained()
            self._take_newest()
        self.prepare()

    def _forget_pretrained(self) -> None:
        """The start is over: weights that nobody has compared with the others' are in nothing of this site."""
        if self.pretrained is not None and self.named_weights is None:
            self.happened(f"came late: the pretrained weights {self.pretrained} are not used")
            self.note_facts(pretrained=None)
            self.pretrained = self._weights = None
            begin_anew(self)

    def _continue(self) -> None:
        """Go on from a checkpoint, or from the newest model when the federation has moved on meanwhile."""
        key = self.communicator.newest(self.MODEL)
        own = self.current_epoch // self.study.local_epochs
        if key is not None and keys.last_round(key) >= own + (self._pending is not None):
            self._pending = None
            self._take_newest()

    def _reason_to_start_anew(self, joined: Membership, resumed: dict[str, Any]) -> str | None:
        """Why a checkpoint is nothing from which this site could go on, in words; ``None``: it is."""
        held, run = resumed.get("held"), resumed.get("run")
        undone = joined.generation > 0 if run is None else run != joined.run
        if undone and (held is None or joined.standing != "known" or self._has_trained_since(held[0])):
            return "rounds of this site were undone"
        if joined.standing == "other":
            return f"this site's {held and held[0]} is not the federation's"
        return None if is_finite(self) else NOT_FINITE

    def _has_trained_since(self, key: str) -> bool:
        end = (keys.last_round(key) + 1) * self.study.local_epochs
        return self._pending is not None or self.current_epoch > end

    def _start_anew(self, reason: str) -> None:
        """Go on as a site that comes late, from the federation's newest model."""
        if self._session is not None:
            self._session.forget_model()
        begin_anew(self)
        self._take_newest()
        self.prepare()
        self.current_epoch = self._next_epoch
        fit_log(self.logger.get_checkpoint(), self.current_epoch)
        if self._session is not None:
            self._session.rounds_undone(self.current_epoch // self.study.local_epochs - 1)
        self.happened(f"{reason}: it starts anew in epoch {self.current_epoch}, from the federation's newest model")
        self._save_latest()
        if self.local_rank == 0 and not self.disable_checkpointing:
            set_aside(Path(self.output_folder))

    def _restore_random_states(self) -> None:
        if self._resumed is not None and self.local_rank == 0:  # the other ranks draw their own patches
            checkpoint.restore_random_states(self._resumed["random"])

    def _take_newest(self, number: int = -1) -> None:
        """Load the federation's newest model, of round ``number`` or later, and note the epoch from which to go on."""
        end = time.monotonic() + 60 * self.operational.deadline_minutes
        while (key := self.communicator.newest(self.MODEL)) is None or keys.last_round(key) < number:
            if key is None and number < 0:
                raise DisagreementError("The federation has no model yet from which this site could go on.")
            if time.monotonic() > end:  # the site missed an earlier collective of the round
                raise DeadlineError(
                    f"The others did not finish {keys.scope_of_round(number)}, which began without this site."
                )
            time.sleep(1)
        self._load_newest(key)
        if not is_finite(self):
            self.happened(f"{NOT_FINITE}: it starts anew")
            begin_anew(self)
            self._load_newest(key)
            self.prepare()
        self._next_epoch = (keys.last_round(key) + 1) * self.study.local_epochs

    def _load_newest(self, key: str) -> None:
        self.load_shared(self.communicator.fetch(key))
        self.catch_up(keys.scope_of(key))

    def _skip_to(self, epoch: int) -> None:
        self.happened(f"caught up from epoch {self.current_epoch} to epoch {epoch} with the federation's newest model")
        fit_log(self.logger.get_checkpoint(), epoch)
        self.current_epoch = epoch

    def _save_latest(self) -> None:
        self.save_at_epoch_start(LATEST_CHECKPOINT)
