"""A training that sits at a coordinator: how it joins, what it tells there, and how it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter

from nnunet_fed.exchange.communicator import Held
from nnunet_fed.exchange.keys import MODEL, last_round
from nnunet_fed.study.federation import Federation
from nnunet_fed.trainers.parts.coordinator_session import CoordinatorSession, Membership
from nnunet_fed.trainers.parts.more_rounds import MoreRoundsTrainer
from nnunet_fed.trainers.parts.ranks import RankZeroCommunicator, from_rank_zero, patient_group
from nnunet_fed.trainers.parts.training_record import RECORD, TrainingRecord


class ConnectedTrainer(MoreRoundsTrainer):
    """Joins the run before it trains, and has the verbs on every rank; rank 0 talks to the coordinator."""

    communicator: RankZeroCommunicator
    """The verbs, on every rank; set when the training starts."""
    _session: CoordinatorSession | None = None
    """On rank 0, from joining on."""
    _membership: Membership | None = None
    """On every rank, from joining on."""
    _group: Any = None
    """On which the ranks wait for rank 0."""
    _figures: Mapping[str, float] = {}

    @property
    def operational(self) -> Federation:
        """The study as the coordinator has it now: its *operational* fields count, which may change while it runs. What
        is mathematics is in ``study``, the one in the plans."""
        return self.study if self._membership is None else self._membership.study

    @property
    def is_connected(self) -> bool:
        """Whether this process trains with the others; after ``--val``, and ``--c`` after the end, it does not."""
        return "communicator" in vars(self)

    def get_dataloaders(self) -> Any:
        """nnU-Net's loaders, then the federation: who has used gRPC must not fork, and nnU-Net forks its workers here.

        A training that is refused has written nothing yet but its log.
        """
        loaders = super().get_dataloaders()
        if self.current_epoch < self.study.epochs or self._was_undone():
            try:
                self._join()
                self._catch_up_with_rounds()
            except BaseException:
                for loader in loaders:
                    if isinstance(loader, NonDetMultiThreadedAugmenter):
                        loader._finish()
                raise
        return loaders

    def _was_undone(self) -> bool:
        """Whether the federation went back since this site ended its rounds; no, if nobody can be asked."""
        resumed = self._resumed
        if not self._continues or resumed is None or resumed.get("run") is None:
            return False
        return resumed["run"] in self.course().undone

    def _catch_up_with_rounds(self) -> None:
        """Have as many rounds as the others, where these have gone on with more than this site began with."""

        def newest() -> str | None:
            return None if self._session is None else self._session.communicator.newest(MODEL)

        if self.operational.more_rounds > self.study.more_rounds:
            key = from_rank_zero(newest, self._group)
            if key is not None and last_round(key) >= self.study.all_rounds:
                self._go_on(self.operational.more_rounds, None if self._resumed is None else self._loaded)

    def _join(self) -> None:
        """Join the run, on rank 0, and let every rank know as what."""

        def on_rank_zero() -> Membership:
            resumed = self._resumed or {}
            self._session = CoordinatorSession(
                self.study,
                self.own_site(),
                self.configuration_name,
                type(self).__name__,
                self.fold_of_study(),
                Path(self.output_folder),
                continues=self._continues,
                attempt=resumed.get("attempt"),
                held=Held(*resumed["held"]) if resumed.get("held") else None,
            )
            return self._session.membership

        if self._group is None:
            self._group = patient_group()
        self._membership = from_rank_zero(on_rank_zero, self._group)

    def _connect(self) -> None:
        """Let every rank have the verbs, once rank 0 has joined."""
        communicator = None
        if self._session is not None:
            communicator = self._session.communicator
            self._session.describe(self._training_cases)
        self.communicator = RankZeroCommunicator(
            communicator,
            self.own_site().name,
            self.operational.sites,
            self._group,
        )

    def happened(self, text: str) -> None:
        """Note an event in the log, in this site's record and at the coordinator."""
        self.print_to_log_file(text)
        if self._session is not None:
            self._session.happened(text)

    def note_facts(self, **facts: Any) -> None:
        """Note facts of the training in this site's record; those of ``--val`` in the record that the training left."""
        path = Path(self.output_folder) / RECORD
        if self._session is not None:
            self._session.note_facts(**facts)
        elif self.local_rank == 0 and path.is_file():
            TrainingRecord(path, resumed=True).note(**facts)

    def _report(self, phase: str, wait: bool = False) -> None:
        if self._session is not None:
            number = min(self.current_epoch // self.study.local_epochs + 1, self.study.all_rounds)
            progress = {"phase": phase, "round": number, "rounds": self.study.all_rounds, "epoch": self.current_epoch}
            self._session.report({**progress, **self._figures}, wait)

    def _leave(self) -> None:
        if self._session is not None:
            self._session.leave("finished")
