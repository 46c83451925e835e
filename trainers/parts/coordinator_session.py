"""A training's session at the coordinator: its communicator, its record, and what others are told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.exchange.communicator import Held
from nnunet_fed.exchange.outgoing_log import FILE, OutgoingLog
from nnunet_fed.study.federation import Federation, Fold
from nnunet_fed.study.site import Site
from nnunet_fed.trainers.parts.training_record import RECORD, TrainingRecord
from nnunet_fed.transport.site.client import GrpcCommunicator


@dataclass(frozen=True)
class Membership:
    """As what a site has joined: the same on every rank."""

    study: Federation
    """As the coordinator has it now."""
    run: str
    attempt: int
    generation: int
    """How often rounds of the run had been undone when it was opened."""
    standing: str
    """Of the model that the site held (:mod:`nnunet_fed.coordinator.reconciliation`); empty: it held none."""


class Course(NamedTuple):
    """What became of a training that is over at a site."""

    undone: frozenset[str]
    """Ids of the runs of which rounds were undone."""
    more_rounds: int


def course_of(site: Callable[[], Site]) -> Course:
    """What the coordinator says; nothing new, if it does not answer, or is not known any more.

    Args:
        site: gives this site's settings.
    """
    try:
        communicator = GrpcCommunicator(site())
    except ConfigurationError:  # a training that has ended needs no site.toml
        return Course(frozenset(), 0)
    try:
        status = communicator.status_at_once()
    finally:
        communicator.close()
    return Course(frozenset(status.get("undone", {})), status.get("study", {}).get("more_rounds", 0))


class CoordinatorSession:
    """What rank 0 of a training has of the federation.

    Args:
        study: the study in the plans.
        site: this site's settings.
        configuration: of nnU-Net.
        trainer: name of the trainer class.
        fold: of the study.
        folder: where the record and the list of all that is sent go.
        continues: the command said ``--c``.
        attempt: the attempt of the checkpoint from which the training continues; ``None``: there is no checkpoint.
        held: the newest model of the federation in that checkpoint.

    Raises:
        ConfigurationError: the attempt is not the federation's.
        RefusedError: see :meth:`nnunet_fed.coordinator.members.Members.join`.
        UnreachableError: no coordinator answers.
    """

    def __init__(
        self,
        study: Federation,
        site: Site,
        configuration: str,
        trainer: str,
        fold: Fold,
        folder: Path,
        continues: bool,
        attempt: int | None,
        held: Held | None,
    ):
        self._fold = fold
        self.communicator = GrpcCommunicator(site, outgoing=OutgoingLog(folder / FILE))
        self.study = self.communicator.join(
            "training", study.digest_of_fold(fold), configuration, trainer, not continues, fold, held
        )
        """The study as the coordinator has it now."""
        if attempt is not None and attempt != self.communicator.attempt:
            raise ConfigurationError(
                f"The checkpoint in {folder} belongs to attempt {attempt}, the coordinator has opened attempt "
                f"{self.communicator.attempt}. Start this training without --c."
            )
        joined = self.communicator
        self.membership = Membership(self.study, joined.run, joined.attempt, joined.generation, joined.standing)
        self._is_over = False
        self._record = TrainingRecord(folder / RECORD, continues)

    def describe(self, training_cases: int) -> None:
        """Begin or continue the record."""
        self._record.describe(
            study=self.study.stored(), digest=self.study.digest_of_fold(self._fold), fold=self._fold,
            run=self.communicator.run, attempt=self.communicator.attempt, site=self.communicator.site,
            training_cases=training_cases,
        )  # fmt: skip

    @contextmanager
    def exchanging(self, scope: str) -> Iterator[dict[str, float]]:
        """Note what the exchange within costs, and the method's figures that are put into the yielded mapping."""
        started, sent, received = time.monotonic(), self.communicator.bytes_sent, self.communicator.bytes_received
        figures: dict[str, float] = {}
        yield figures
        self._record.exchanged(
            scope,
            self.communicator.weights,
            self.communicator.bytes_sent - sent,
            self.communicator.bytes_received - received,
            time.monotonic() - started,
            figures,
        )

    def note_facts(self, **facts: Any) -> None:
        """Note facts of the training in this site's record."""
        self._record.note(**facts)

    def forget_model(self) -> None:
        """This site holds no model of the federation any more: it takes the next one that comes, whatever its round."""
        self.communicator.held = None

    def rounds_undone(self, last: int) -> None:
        """Note in the record that this site went back to the model of a round, counted from 0."""
        self._record.undo(last)

    def happened(self, text: str) -> None:
        """Note an event here and, while the site takes part, at the coordinator."""
        self._record.happened(text)
        if not self._is_over:
            self.communicator.note(text)

    def report(self, progress: dict[str, Any], wait: bool = False) -> None:
        """Tell those who watch, while the site takes part."""
        if not self._is_over:
            self.communicator.report(progress, wait)

    def leave(self, reason: str) -> None:
        """Take leave in order: no later round waits for this site."""
        if not self._is_over:
            self.communicator.leave(reason)

    def close(self) -> None:
        """From here on nothing is sent."""
        self.communicator.close()
        self._is_over = True

    def part(self, reason: str) -> None:
        """Leave, and send nothing more."""
        self.leave(reason)
        self.close()
