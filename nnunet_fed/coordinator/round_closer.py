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

from nnunet_fed.coordinator.admission import differs
from nnunet_fed.coordinator.ballots import agrees, elected
from nnunet_fed.coordinator.deadlines import Clock, Deadlines
from nnunet_fed.coordinator.generations import GOES_ON_AFTER, WITHDRAWN_BY, plan_again
from nnunet_fed.coordinator.log_fields import about
from nnunet_fed.coordinator.scope_order import given_up
from nnunet_fed.coordinator.store import Agreed, Ballot, Collective, Contribution, Store
from nnunet_fed.coordinator.tracking import FederationTracker
from nnunet_fed.errors import RefusedError
from nnunet_fed.exchange.cross_site_matrix import DICE
from nnunet_fed.exchange.keys import MODEL, last_round, round_of, scope_of_round
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
        tracker: FederationTracker | None,
        clock: Clock,
    ):
        self._deadlines = Deadlines(store, clock, self._span)
        self._study = study
        self._tracker = tracker
        self._store = store
        self._spool = spool
        self._changed = changed
        self._reducing: set[tuple[str, str]] = set()
        self._keeper = ThreadPoolExecutor(1, thread_name_prefix="keeper")
        self._saving: dict[tuple[str, str], Future[None]] = {}
        self._unsettled: dict[tuple[str, str], Collective] = {}
        """What could not be cleared; it is tried again and again."""
        self._waste: list[Path] = []
        """Files that the journal does not know any more."""
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
            self._deadlines.note(self._store.open_collectives(), exactly=True)

    def left(self, collective: Collective) -> float:
        """Seconds until an open collective closes without those that are missing; the time in which no coordinator ran
        does not count."""
        with self._changed:
            return self._deadlines.left(collective)

    def _note_waiting(self) -> None:
        """Until the end journal how long what is open has waited: a coordinator that is killed goes on from there. And
        try again to clear what could not be cleared."""
        told = False
        while not self._stopped.wait(NOTE_SECONDS):
            try:
                with self._changed:
                    self._deadlines.note(self._store.open_collectives())
                told = False
            except sqlite3.ProgrammingError:  # the store was closed without this
                return
            except sqlite3.Error:  # a full disk, say: the next note tells the same
                if not told:
                    logger.exception("how long the rounds have waited could not be journalled")
                told = True
            for collective in list(self._unsettled.values()):
                self._keeper.submit(self._settle, collective, partial(self._save, collective))

    def _span(self, collective: Collective) -> float:
        planning = self._is_planning(collective.run)
        return 60 * (self._study.planning_deadline_minutes if planning else self._study.deadline_minutes)

    def missing(self, collective: Collective) -> list[str]:
        """The sites that an open collective waits for; absent ones only if it needs them for its quorum."""
        with self._changed:
            given = self._store.contributions(collective.run, collective.key)
            able = [site for site in self._able(collective.run, collective.scope) if site not in given]
            standing = self._store.standing(collective.run)
            expected = [site for site in able if standing.get(site) != "absent"]
            enough = len(given) + len(expected) >= self._quorum(collective.run, collective.scope)
            return expected if enough else able

    def close_if_due(self, run: str, key: str) -> None:
        """Close a collective when all have contributed or its deadline has passed, and reduce it outside the lock."""
        with self._changed:
            collective = self._store.collective(run, key)
            if collective is None or collective.status != "open" or (run, key) in self._reducing:
                return
            given = self._store.contributions(run, key)
            missing = self.missing(collective)
            quorum = self._quorum(run, collective.scope)
            within_reach = len(given) + len(missing) >= quorum
            if missing and within_reach and self._deadlines.left(collective) > 0:
                return
            if len(given) < quorum or (missing and self._is_planning(run)):
                self._fail(collective, list(given), missing, quorum, within_reach)
                return
            given, winner = self._agreeing(collective, given, quorum)
            if len(given) < quorum:
                return
            self._reducing.add((run, key))
        started, left_behind = time.monotonic(), list[Path]()
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
                    self._agree(collective, given, winner)
                    if self._store.participants(run, collective.scope) is None:
                        self._store.freeze(run, collective.scope, list(given))
                        left_behind = self._leave_behind(run, collective.scope)
                    for site in missing:
                        self._store.set_standing(run, site, "absent")
                        self._store.add_event(run, site, f"absent from {collective.key}")
                    if self._tracker is not None:
                        self._tracker.closed(self._store, collective)
                self._waste += left_behind
                self._keep(collective)  # under the same lock: who sees it closed has to find what to wait for
        finally:
            with self._changed:
                self._reducing.discard((run, key))
                self._changed.notify_all()
        logger.info("%s closed over %s", key, ", ".join(given), extra=about(run, key))

    def _agreeing(
        self, collective: Collective, given: dict[str, Contribution], quorum: int
    ) -> tuple[dict[str, Contribution], Ballot]:
        """The contributions that are of the kind that most sites have, and that kind. The others are turned down, and
        the collective fails if too few remain."""
        cast = self._store.ballots(collective)
        winner = elected(cast)
        odd = [contribution for site, contribution in given.items() if not agrees(cast[site], winner)]
        if not odd:
            return given, winner
        run, key, sites = collective.run, collective.key, [contribution.site for contribution in odd]
        kept = {site: contribution for site, contribution in given.items() if site not in sites}
        kinds = {cast[site].verb for site in sites} - {winner.verb}
        sentence = (
            f"'{key}' is a {winner.verb} at most sites, not a {' or a '.join(sorted(kinds))} as at {', '.join(sites)}."
            if kinds
            else differs(key, *sites)
        )
        collective.verb = winner.verb
        self._withdraw(collective, odd, f"turned down: {sentence}")
        self._delete(odd)
        if len(kept) < quorum:
            self._give_up(collective, f"'{key}' cannot be closed. {sentence}")
            return kept, winner
        with self._store.transaction():
            self._store.put_collective(collective)
            for site in sites:  # it is told, and ends: nobody waits for it until it is heard of
                self._store.turn_down(run, key, site, sentence)
                self._store.set_standing(run, site, "absent")
        return kept, winner

    def _agree(self, collective: Collective, given: dict[str, Contribution], winner: Ballot) -> None:
        """The first mean of a name that closes lays down the schema of the later ones."""
        run, name = collective.run, collective.name
        if winner.verb == "mean" and winner.schema is not None and self._store.agreed(run, name) is None:
            self._store.agree(run, name, Agreed(winner.schema, max(given.size for given in given.values())))

    def _leave_behind(self, run: str, scope: str) -> list[Path]:
        """Nobody goes on with what is open of an earlier round, or of the preparation, once a round has begun; returns
        the files that were given to it."""
        files: list[Path] = []
        number = round_of(scope)
        if number is None:
            return files
        for status in ("open", "failed"):
            for collective in self._store.collectives(run, status):
                if collective.scope != scope and last_round(collective.scope) < number:
                    collective.status, collective.error = "pruned", f"'{scope}' has begun without it."
                    self._store.put_collective(collective)
                    files += self._store.release(run, collective.key)
        return files

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

    def recover(self, attempt: int) -> None:
        """After a restart: look what has reached the disk, and clear what is not needed, such as all that was given to
        another attempt than the open one.

        A process that was killed leaves everything behind, a machine that stopped may not. A result that is not whole
        is made anew of the contributions. If these are not whole either, no site has the result
        (:meth:`wait_until_saved`): the collective is open again, and the sites contribute what was lost once more.
        """
        self._withdraw_removed()
        self._clear_attempts_but(attempt)
        self.clear_withdrawn()
        for waiting in self._store.open_collectives():
            self._deadlines.left(waiting)  # from now on it waits again
        for run, key in dict.fromkeys(self._store.spooled().values()):
            collective = self._store.collective(run, key)
            if collective is None:
                continue
            if collective.status in ("empty", "pruned"):  # when it was to be cleared, the disk was full
                with self._store.transaction():
                    self._store.release(run, key)
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

    def _clear_attempts_but(self, attempt: int) -> None:
        """Of an attempt that was given up the record stays, and what it has of the sites' models at each other."""
        for run, described in self._store.runs().items():
            if described.get("attempt", attempt) == attempt:
                continue
            self._clear(run, given_up(described["attempt"], attempt))

    def clear_withdrawn(self) -> None:
        """Of a planning that has begun anew the record stays."""
        with self._changed:
            for described in self._store.runs().values():
                if WITHDRAWN_BY in described:
                    self._clear(described[GOES_ON_AFTER], plan_again(described[WITHDRAWN_BY]))

    def _clear(self, run: str, sentence: str) -> None:
        """Delete what was given to a run and its results, since nothing goes on in it; the sentence says why."""
        results = [c for c in self._store.collectives(run, "closed") if c.key != DICE]
        for collective in results:  # first: who is killed here has them in the journal, and does it again
            self._store.result_path(run, collective.key).unlink(missing_ok=True)
        with self._store.transaction():
            for collective in [*results, *self._store.collectives(run, "open")]:
                if collective.status == "open":
                    collective.status, collective.error = "failed", sentence
                else:
                    collective.status = "pruned"
                self._store.put_collective(collective)
            files = self._store.release_run(run)
        for file in files:
            file.unlink(missing_ok=True)
        self._spool.forget_run(run)

    def _withdraw_removed(self) -> None:
        """What a site that is no longer in the study gave to open collectives is in no mean; what has closed stands."""
        for collective in self._store.open_collectives("failed"):
            given = self._store.contributions(collective.run, collective.key)
            removed = [c for site, c in given.items() if site not in self._study.sites]
            if removed:
                text = f"is not in the study any more: what it gave to {collective.key} is withdrawn"
                self._withdraw(collective, removed, text)
                self._delete(removed)
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

    def _delete(self, contributions: Iterable[Contribution]) -> None:
        for contribution in contributions:
            if contribution.file is not None:
                (self._store.spool / contribution.file).unlink(missing_ok=True)

    def _is_planning(self, run: str) -> bool:
        return bool(self._store.run(run)["purpose"] == "planning")

    def _taking_part(self, run: str, scope: str) -> list[str]:
        """The sites of a scope (rule 3 of the protocol): those that are frozen in it; else, once the first round of a
        training has begun, those that have joined; else all of the study."""
        participants: Iterable[str] | None = self._store.participants(run, scope)
        if participants is None:
            begun = self._store.participants(run, scope_of_round(0)) is not None
            participants = self._store.standing(run) if begun else self._study.sites
        there = set(participants)
        return [site for site in self._study.sites if site in there]

    def _quorum(self, run: str, scope: str) -> int:
        there = len(self._taking_part(run, scope))
        return there if self._is_planning(run) else min(self._study.quorum, there)

    def _able(self, run: str, scope: str) -> list[str]:
        """Who may still contribute in a scope: who has neither left nor missed the collective before in it. Such a site
        takes the round's model once there is one, so that nobody waits for it, even if it is heard of meanwhile."""
        standing = self._store.standing(run)
        over = [c for c in self._store.collectives_of_scope(run, scope) if c.closed is not None]
        took_part = self._store.contributions(run, over[-1].key) if over else None
        return [
            site
            for site in self._taking_part(run, scope)
            if standing.get(site) != "left" and (took_part is None or site in took_part)
        ]

    def expected_in(self, run: str) -> list[str]:
        """The sites of a run that have joined it and are not away."""
        with self._changed:
            standing = self._store.standing(run)
            return [site for site in self._study.sites if standing.get(site) == "active"]

    def is_closing(self, run: str, key: str | None = None) -> bool:
        """Whether a collective (``None``: any of the run) is being reduced: who has contributed is settled, and nobody
        else can."""
        return any(run == other and key in (None, of_other) for other, of_other in self._reducing)

    def _fail(
        self, collective: Collective, given: list[str], missing: list[str], quorum: int, within_reach: bool
    ) -> None:
        run, key, sites = collective.run, collective.key, self._study.sites
        needs = f"it needs {quorum} of {len(sites)} sites"
        if within_reach:
            sentence = f"'{key}' reached its deadline without {', '.join(missing)}; {needs}."
        else:
            standing, able = self._store.standing(run), [*given, *missing]
            lost = ", ".join(
                f"{site} has left" if standing.get(site) == "left" else f"{site} missed what came before in this round"
                for site in self._taking_part(run, collective.scope)
                if site not in able
            )
            sentence = (
                f"'{key}' cannot be closed any more: {needs}, and only {', '.join(able)} can contribute ({lost}). "
                "Nobody waits. If these sites do not come back, lower min_sites in federation.toml and restart the "
                "coordinator."
            )
        again = " (the same command)." if self._is_planning(run) else " with --c."
        self._give_up(collective, f"{sentence} Start the missing sites, then start the others again{again}")

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
        if collective.status != "closed":
            return
        try:
            make_durable(self._store.result_path(collective.run, collective.key))
        except FileNotFoundError:  # later rounds have closed before this came to it, and it is not kept
            with self._changed:
                now = self._store.collective(collective.run, collective.key)
            if now is None or now.status == "closed":
                raise

    def _settle(self, collective: Collective, save: Callable[[], None]) -> None:
        """Once a result is on disk for good, delete what it was made of, and old results."""
        place = (collective.run, collective.key)
        try:
            save()
            with self._changed:
                with self._store.transaction():
                    files = self._store.release(*place)
                    files += self._prune(collective.run)
                self._waste += files  # not before the journal has it
                self._saving.pop(place, None)
            while self._waste:
                file = self._waste.pop()
                try:
                    file.unlink(missing_ok=True)
                except OSError:
                    self._waste.append(file)
                    raise
            self._spool.forget_collective(*place)
        except Exception:  # whatever it is, it is tried again
            if place not in self._unsettled:
                logger.exception("%s: what it leaves cannot be cleared now", collective.key)
            self._unsettled[place] = collective
        else:
            if self._unsettled.pop(place, None) is not None:
                logger.info("%s: what it left is cleared", collective.key)

    def _prune(self, run: str) -> list[Path]:
        """Journal that old results are not kept; returns their files. Sums and values that were gathered are few but in
        rounds: a late site may want them."""
        closed = self._store.collectives(run, "closed")
        means = [c for c in closed if c.verb == "mean"]
        every = self._study.keep_every
        kept = list(dict.fromkeys(c.scope for c in means))[-self._study.keep_rounds :]
        if every is not None:
            kept += [c.scope for c in means if (last_round(c.key) + 1) % every == 0]
        kept += [c.scope for c in means if c.name == MODEL][-1:]  # where a late site goes on, whatever came after it
        recent = list(dict.fromkeys(c.scope for c in closed))[-self._study.keep_rounds :]
        old = [c for c in means if c.scope not in kept]
        old += [
            c for c in closed if c.verb != "mean" and round_of(c.scope) is not None and c.scope not in {*kept, *recent}
        ]
        for collective in old:
            collective.status = "pruned"
            self._store.put_collective(collective)
        return [self._store.result_path(collective.run, collective.key) for collective in old]
