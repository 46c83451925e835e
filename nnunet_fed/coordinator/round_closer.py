"""Closing collectives: when, over whom, and what is done with their contributions. Part of the coordinator.

The rules are those of docs/protocol.md. Source: ours.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from nnunet_fed.coordinator.deadlines import Clock, Deadlines, RunningClock
from nnunet_fed.coordinator.log_fields import about
from nnunet_fed.coordinator.store import Collective, Contribution, Store
from nnunet_fed.coordinator.tracking import FederationTracker
from nnunet_fed.errors import RefusedError
from nnunet_fed.exchange.keys import MODEL, scope_of_round
from nnunet_fed.exchange.payload import digest_of_file
from nnunet_fed.exchange.reduction import write_result
from nnunet_fed.exchange.uploads import Spool
from nnunet_fed.files import make_durable
from nnunet_fed.study.federation import Federation

logger = logging.getLogger(__name__)

NOTE_SECONDS = 5.0
"""Between two looks at how long what is open has waited."""


class RoundCloser:
    """Closes the collectives of a study. Thread-safe.

    Args:
        study: the study.
        store: the coordinator's memory.
        spool: where uploads arrive.
        changed: guards the store; told when a collective is no longer open.
        tracker: is told of rounds.
        clock: of the deadlines.
    """

    def __init__(
        self,
        study: Federation,
        store: Store,
        spool: Spool,
        changed: threading.Condition,
        tracker: FederationTracker | None = None,
        clock: Clock | None = None,
    ):
        self._deadlines = Deadlines(store, clock or RunningClock(), self._span)
        self._study = study
        self._tracker = tracker
        self._store = store
        self._spool = spool
        self._changed = changed
        self._reducing: set[tuple[str, str]] = set()
        self._keeper = ThreadPoolExecutor(1, thread_name_prefix="keeper")
        self._saving: dict[tuple[str, str], Future[None]] = {}
        self._stopped = threading.Event()
        self._noting = threading.Thread(target=self._note_waiting, daemon=True, name="deadlines")
        self._noting.start()
        self.reductions, self.reduction_seconds = 0, 0.0
        """Since the start."""

    def shutdown(self) -> None:
        """Finish what is under way in the background, and journal how long what is open has waited."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._noting.join()
        self._keeper.shutdown()
        with self._changed:
            self._deadlines.note(self._open(), exactly=True)

    def left(self, collective: Collective) -> float:
        """Seconds until an open collective closes without those that are missing; the time in which no coordinator ran
        does not count."""
        with self._changed:
            return self._deadlines.left(collective)

    def _note_waiting(self) -> None:
        """Until the end journal how long what is open has waited: a coordinator that is killed goes on from there."""
        while not self._stopped.wait(NOTE_SECONDS):
            try:
                with self._changed:
                    self._deadlines.note(self._open())
            except sqlite3.ProgrammingError:  # the store was closed without this
                return
            except sqlite3.Error:  # a full disk, say: the next note tells the same
                logger.exception("how long the rounds have waited could not be journalled")

    def _open(self, *further: str) -> list[Collective]:
        """The open collectives of all runs, and those of further statuses."""
        statuses = ("open", *further)
        return [c for run in self._store.runs() for status in statuses for c in self._store.collectives(run, status)]

    def _span(self, collective: Collective) -> float:
        planning = self._is_planning(collective.run)
        return 60 * (self._study.planning_deadline_minutes if planning else self._study.deadline_minutes)

    def missing(self, collective: Collective) -> list[str]:
        """The sites that an open collective waits for."""
        with self._changed:
            given = self._store.contributions(collective.run, collective.key)
            return [site for site in self._expected(collective.run, collective.scope) if site not in given]

    def close_if_due(self, run: str, key: str) -> None:
        """Close a collective when all have contributed or its deadline has passed, and reduce it outside the lock."""
        with self._changed:
            collective = self._store.collective(run, key)
            if collective is None or collective.status != "open" or (run, key) in self._reducing:
                return
            given = self._store.contributions(run, key)
            missing = self.missing(collective)
            planning = self._is_planning(run)
            there = self._taking_part(run, collective.scope)
            quorum = len(there) if planning else min(self._study.quorum, len(there))
            overdue = self._deadlines.left(collective) <= 0
            if (missing or len(given) < quorum) and not overdue:
                return
            if len(given) < quorum or (planning and missing):
                self._fail(collective, missing or [site for site in self._study.sites if site not in given], quorum)
                return
            self._reducing.add((run, key))
        started = time.monotonic()
        try:
            try:
                self._reduce(collective, given)
            except RefusedError as error:
                self._give_up(collective, f"'{key}' cannot be closed. {error}")
                return
            with self._changed:
                with self._store.transaction():
                    collective.closed = time.time()
                    self.reductions += 1
                    self.reduction_seconds += time.monotonic() - started
                    self._store.put_collective(collective)
                    if self._store.participants(run, collective.scope) is None:
                        self._store.freeze(run, collective.scope, list(given))
                    for site in missing:
                        self._store.set_standing(run, site, "absent")
                        self._store.add_event(run, site, f"absent from {collective.key}")
                    if self._tracker is not None:
                        self._tracker.closed(self._store, collective)
                self._keep(collective)  # under the same lock: who sees it closed has to find what to wait for
        finally:
            with self._changed:
                self._reducing.discard((run, key))
                self._changed.notify_all()
        logger.info("%s closed over %s", key, ", ".join(given), extra=about(run, key))

    def reopen(self, collective: Collective) -> None:
        """Let a collective that failed at its deadline go on, with the whole time again."""
        with self._changed, self._store.transaction():
            collective.status, collective.error, collective.opened = "open", None, time.time()
            self._deadlines.restart(collective)
            self._store.put_collective(collective)

    def wait_until_saved(self, collective: Collective) -> None:
        """Return once a closed collective's result is on disk for good: no site may go on with it before.

        Raises:
            OSError: the disk is full, or broken. The next call tries again.
        """
        with self._changed:
            saving = self._saving.get((collective.run, collective.key))
            if saving is not None and saving.done() and saving.exception() is not None:
                saving = self._keep(collective)
        if saving is not None:
            saving.result()

    def recover(self) -> None:
        """After a restart: look what has reached the disk, and clear what is not needed.

        A process that was killed leaves everything behind, a machine that stopped may not. A result that is not whole
        is made anew of the contributions. If these are not whole either, no site has the result
        (:meth:`wait_until_saved`): the collective is open again, and the sites contribute what was lost once more.
        """
        self._withdraw_removed()
        for waiting in self._open():
            self._deadlines.left(waiting)  # from now on it waits again
        for run, key in dict.fromkeys(self._store.spooled().values()):
            collective = self._store.collective(run, key)
            if collective is None:
                continue
            closed = collective.status == "closed"
            if closed and digest_of_file(self._store.result_path(run, key)) == collective.digest:
                self._settle(collective, partial(self._save, collective))
                continue
            given = self._store.contributions(run, key)
            lost = [c for c in given.values() if c.file and digest_of_file(self._store.spool / c.file) != c.digest]
            if lost:
                self._withdraw(
                    collective, lost, f"what it gave to {key} was lost when the coordinator's machine stopped"
                )
            elif closed:
                self._reduce(collective, given)
                self._settle(collective, partial(self._save, collective))
        self._spool.sweep(set(self._store.spooled()))

    def _withdraw_removed(self) -> None:
        """What a site that is no longer in the study gave to open collectives is in no mean; what has closed stands."""
        for collective in self._open("failed"):
            given = self._store.contributions(collective.run, collective.key)
            removed = [c for site, c in given.items() if site not in self._study.sites]
            if removed:
                text = f"is not in the study any more: what it gave to {collective.key} is withdrawn"
                self._withdraw(collective, removed, text)
                for contribution in removed:
                    if contribution.file is not None:
                        (self._store.spool / contribution.file).unlink(missing_ok=True)
        for run in self._store.runs():
            for site, state in self._store.standing(run).items():
                if site in self._study.sites:
                    continue
                self._spool.forget_site(run, site)
                if state == "active":  # should its name come back, nobody waits for it until it is heard of
                    with self._store.transaction():
                        self._store.set_standing(run, site, "absent")

    def _withdraw(self, collective: Collective, contributions: list[Contribution], text: str) -> None:
        with self._store.transaction():
            for contribution in contributions:
                self._store.withdraw(contribution)
                self._store.add_event(collective.run, contribution.site, text)
                logger.warning("%s: %s", contribution.site, text, extra=about(collective.run, collective.key))
            if collective.status == "closed":
                collective.status, collective.closed, collective.digest, collective.size = "open", None, None, None
                self._store.put_collective(collective)

    def _is_planning(self, run: str) -> bool:
        return bool(self._store.runs()[run]["purpose"] == "planning")

    def _taking_part(self, run: str, scope: str) -> list[str]:
        """The sites of a scope (rule 3 of the protocol): those that are frozen in it; else, once the first round of a
        training has begun, those that have joined; else all of the study."""
        participants: Iterable[str] | None = self._store.participants(run, scope)
        if participants is None:
            begun = self._store.participants(run, scope_of_round(0)) is not None
            participants = self._store.standing(run) if begun else self._study.sites
        there = set(participants)
        return [site for site in self._study.sites if site in there]

    def _expected(self, run: str, scope: str) -> list[str]:
        standing = self._store.standing(run)
        return [site for site in self._taking_part(run, scope) if standing.get(site) not in ("absent", "left")]

    def is_closing(self, run: str, key: str) -> bool:
        """Whether a collective is being reduced: who has contributed is settled, and nobody else can."""
        return (run, key) in self._reducing

    def _fail(self, collective: Collective, missing: list[str], quorum: int) -> None:
        self._give_up(
            collective,
            f"'{collective.key}' reached its deadline without {', '.join(missing)}; it needs {quorum} of "
            f"{len(self._study.sites)} sites. Start the missing sites, then start the others again"
            + (" (the same command)." if self._is_planning(collective.run) else " with --c."),
        )

    def _give_up(self, collective: Collective, sentence: str) -> None:
        """A collective has failed; the next offer lets it go on."""
        collective.status, collective.error = "failed", sentence
        with self._changed:
            with self._store.transaction():
                self._store.put_collective(collective)
                self._store.add_event(collective.run, None, sentence)
            self._changed.notify_all()
        logger.error(sentence, extra=about(collective.run, collective.key))

    def _reduce(self, collective: Collective, given: dict[str, Contribution]) -> None:
        """Write the result's file; the collective is changed in memory only."""
        contributors = {site: c for site, c in given.items() if c.file is not None}
        if not contributors:
            collective.status = "empty"
            return
        files = {site: self._store.spool / str(c.file) for site, c in contributors.items()}
        weights = [c.weight for c in contributors.values()]
        out = self._store.result_path(collective.run, collective.key)
        collective.digest, collective.size = write_result(collective.verb, files, weights, out)
        collective.status = "closed"

    def _keep(self, collective: Collective) -> Future[None]:
        """In the background, have a result on disk for good, and then clear what nobody needs any more."""
        saving = self._keeper.submit(self._save, collective)
        self._saving[collective.run, collective.key] = saving
        self._keeper.submit(self._settle, collective, saving.result)
        return saving

    def _save(self, collective: Collective) -> None:
        if collective.status == "closed":
            make_durable(self._store.result_path(collective.run, collective.key))

    def _settle(self, collective: Collective, save: Callable[[], None]) -> None:
        """Once a result is on disk for good, delete what it was made of, and old results."""
        try:
            save()
            with self._changed, self._store.transaction():
                files = self._store.release(collective.run, collective.key)
                files += self._prune(collective.run)
                self._saving.pop((collective.run, collective.key), None)
            for file in files:
                file.unlink(missing_ok=True)
            self._spool.forget_collective(collective.run, collective.key)
        except Exception:  # whatever it is, a restart does this again
            logger.exception("%s: what it leaves could not be cleared", collective.key)

    def _prune(self, run: str) -> list[Path]:
        """Journal that old means are not kept; returns their files."""
        means = [c for c in self._store.collectives(run, "closed") if c.verb == "mean"]
        kept = list(dict.fromkeys(c.scope for c in means))[-self._study.keep_rounds :]
        kept += [c.scope for c in means if c.name == MODEL][-1:]  # where a late site goes on, whatever came after it
        old = [c for c in means if c.scope not in kept]
        for collective in old:
            collective.status = "pruned"
            self._store.put_collective(collective)
        return [self._store.result_path(collective.run, collective.key) for collective in old]
