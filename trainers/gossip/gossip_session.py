"""What rank 0 of a training has of the gossip: the mailbox, the process that serves it, and the record."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nnunet_fed.errors import ConfigurationError, RefusedError
from nnunet_fed.exchange.outgoing_log import FILE
from nnunet_fed.exchange.payload import Tensors
from nnunet_fed.exchange.precision import narrow
from nnunet_fed.gossip.mailbox import Letter, Mailbox, State
from nnunet_fed.gossip.schedule import Schedule, Version, judge, next_delivery
from nnunet_fed.processes import Process, stop
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.methods.gcml_options import GCML
from nnunet_fed.study.site import Site
from nnunet_fed.trainers.parts.training_record import TrainingRecord

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05
"""Between two looks into the inbox, in lockstep."""


@dataclass
class Standing:
    """Where a training stands in the gossip: part of its checkpoint, and the same on every rank."""

    version: Version
    initial: str
    """Digest of the weights that the training started from."""
    received: dict[str, int] = field(default_factory=dict)
    """Counter of the newest model of each peer that was used or given up."""
    used: dict[str, int] = field(default_factory=dict)
    """Mutual phases with each peer's models."""
    members: dict[str, int] = field(default_factory=dict)
    """In lockstep: training cases of each site, as at the start."""
    phases: list[dict[str, Any]] = field(default_factory=list)
    """For the record: which model came from whom, and which was kept."""

    def plain(self) -> dict[str, Any]:
        """For a checkpoint, which is read where nnunet_fed is not installed, too."""
        return asdict(self)

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> Standing:
        """The inverse of :meth:`plain`."""
        return cls(**{**values, "version": Version(**values["version"])})


def require_peers(site: Site, sites: tuple[str, ...]) -> None:
    """Raise :class:`ConfigurationError` if site.toml does not name all sites of the study."""
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


class GossipSession:
    """The other sites, as far as a training needs them; nothing here waits for them, but for ``lockstep``.

    Args:
        study: in the plans.
        options: its method's.
        standing: of the training, which changes it; on rank 0 the checkpoint's own.
        folder: of the mailbox; emptied unless the training continues, but for the list of all that was sent.
        record: of the training.
        state: what the peer process tells others, but for version and counters.
        start_peer: starts the peer process.
        continues: the command said ``--c``.
    """

    def __init__(
        self,
        study: Federation,
        options: GCML,
        standing: Standing,
        folder: Path,
        record: TrainingRecord,
        state: State,
        start_peer: Callable[[], Process],
        continues: bool,
    ):
        self.study, self.options, self.standing = study, options, standing
        self.site = standing.version.site
        self._schedule = Schedule(self.options.topology, study.seed, self.options.expected_senders)
        self._record, self._state, self._start_peer = record, state, start_peer
        if not continues:
            _empty(folder)
        self.mailbox = Mailbox(folder)
        self._publish()
        self._peer: Process | None = start_peer()
        self._last_words = ""

    # ------------------------------------------------------------------------------------------- what arrives

    def await_members(self) -> dict[str, int]:
        """In lockstep: every site's training cases, without which sites would draw differently."""
        others = set(self.study.sites) - {self.site}
        self._wait(lambda: others - self.mailbox.members().keys(), "hear of")
        return self._members()

    def await_senders(self, epoch: int) -> None:
        """In lockstep: wait for the models that the round before ``epoch`` promises this site."""
        number = epoch // self.study.local_epochs - 1
        pushes = self._schedule.pushes(number, self.standing.members)
        senders = {sender for sender, receiver in pushes.items() if receiver == self.site}

        def missing() -> set[str]:
            letters = [*self.mailbox.deliveries().values(), *(letter for letter, _ in self._taken())]
            return senders - {letter.version.site for letter in letters if letter.version.epoch == epoch}

        self._wait(missing, f"get the models of epoch {epoch} from")

    def _wait(self, missing: Callable[[], set[str]], what: str) -> None:
        end = time.monotonic() + 60 * self.study.deadline_minutes
        while (sites := missing()) and time.monotonic() < end:
            self._revive()
            time.sleep(POLL_SECONDS)
        if sites:
            self.happened(f"could not {what} {', '.join(sorted(sites))}, and went on")

    def next_letter(self) -> tuple[Letter, Path] | None:
        """The model for the next mutual phase and its payload's file; ``None``: none is at hand.

        A training that was killed in a phase takes the same one again.
        """
        for letter, path in self._taken():
            if self._is_wanted(letter):
                return letter, path
        versions = [letter.version for letter in self.mailbox.deliveries().values() if self._is_wanted(letter)]
        chosen = next_delivery(versions, self.standing.used)
        return None if chosen is None else self.mailbox.take(chosen.site)

    def _is_wanted(self, letter: Letter) -> bool:
        """Whether a letter is still what the peer process took it for, and fits the training."""
        if self.options.keep == "merge" and letter.initial != self.standing.initial:
            return False
        same = (letter.run, letter.schema) == (self._state.run, self._state.schema)
        epoch, distance = self.standing.version.epoch, self._state.max_epoch_distance
        return same and judge(letter.version, self.standing.received, epoch, distance) == "accept"

    def _taken(self) -> list[tuple[Letter, Path]]:
        taken = self.mailbox.taken()
        return [] if taken is None else [taken]

    # ------------------------------------------------------------------------------------------- what leaves

    def round_over(self, tensors: Tensors | None) -> None:
        """Once a round is in the checkpoint: let go of what it used, and send.

        Args:
            tensors: of the model; ``None``: it stays here.
        """
        self._publish()  # before anything is let go of, lest the same model comes again
        for letter, _ in self._taken():
            if letter.version.counter <= self.standing.received.get(letter.version.site, 0):
                self.mailbox.discard_taken()
        self._revive()
        if tensors is not None:
            self._post(tensors)
        self._note()

    def _post(self, tensors: Tensors) -> None:
        number, lockstep = self.standing.version.epoch // self.study.local_epochs - 1, self.options.lockstep
        members = self.standing.members if lockstep else self._members()
        failures = {} if lockstep else self.mailbox.contacts()
        if lockstep:
            self._wait(self._not_reached, "give the model before this one to")
        candidates = self._schedule.candidates(number, self.site, members, failures)
        try:
            self.mailbox.post(
                run=self._state.run, version=self.standing.version, training_cases=self._state.training_cases,
                initial=self.standing.initial, tensors=narrow(tensors, self.study.wire_dtype),
                candidates=candidates[:1] if lockstep else candidates,
            )  # fmt: skip
        except (OSError, RefusedError) as error:
            self.happened(f"the model could not be given to the peer process: {error}")

    def _not_reached(self) -> set[str]:
        """Who has not taken or declined the last model, whose place the next one would take."""
        outgoing = self.mailbox.outgoing()
        return set() if outgoing is None else set(outgoing[2])

    def _members(self) -> dict[str, int]:
        known = {site: cases for site, cases in self.mailbox.members().items() if site in self.study.sites}
        return {**known, self.site: self._state.training_cases}

    def _publish(self, **changes: Any) -> None:
        standing = self.standing
        self._state = replace(self._state, version=standing.version, received=dict(standing.received), **changes)
        self.mailbox.publish_state(self._state)

    # ------------------------------------------------------------------------------------------- around it

    def happened(self, text: str) -> None:
        """Note an event, here and in nnU-Net's log."""
        logger.info("%s", text)
        self._record.happened(text)

    def leave(self) -> None:
        """The training is over: what comes now is not wanted."""
        self._publish(leaving=True)

    def close(self) -> None:
        """End the peer process."""
        if self._peer is not None:
            stop([self._peer])
            self._peer = None
            self._note()

    def _revive(self) -> None:
        """Start the peer process again if it has ended: what it does is no reason to stop a training."""
        if self._peer is None or self._peer.exit_status() is None:
            return
        words = self._peer.last_words()
        if words != self._last_words:
            self.happened(f"the peer process has ended and is started again. {words}")
        self._last_words = words
        self._peer = self._start_peer()

    def _note(self) -> None:
        transfers = self.mailbox.history()
        moved = {
            event: sum(entry["bytes"] or 0 for entry in transfers if entry["event"] == event)
            for event in ("sent", "received")
        }
        self._record.note(
            mutual_phases=self.standing.phases, transfers=transfers,
            **{f"bytes_{event}": total for event, total in moved.items()},
        )  # fmt: skip


def _empty(folder: Path) -> None:
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != FILE:
            path.unlink()
