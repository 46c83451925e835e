"""The one process that all sites reach: it keeps members, closes rounds, reduces and stores. It knows no method.

A state machine without a network: :mod:`nnunet_fed.transport.coordinator.server` puts it on gRPC. Its state is the
store's, so a restarted coordinator goes on where the last one stopped. The rules are those of docs/protocol.md.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from nnunet_fed.coordinator.admission import Admission, QuarantinedError, check_content, distance
from nnunet_fed.coordinator.deadlines import Clock, RunningClock
from nnunet_fed.coordinator.further_rounds import begin_more_rounds
from nnunet_fed.coordinator.generations import Generations
from nnunet_fed.coordinator.history import happened, page_of
from nnunet_fed.coordinator.log_fields import about
from nnunet_fed.coordinator.members import Members, Purpose
from nnunet_fed.coordinator.opening import open_study
from nnunet_fed.coordinator.reconciliation import Reconciliation, Standing
from nnunet_fed.coordinator.round_closer import RoundCloser
from nnunet_fed.coordinator.scope_order import ScopeOrder
from nnunet_fed.coordinator.status import Outlook, Tally, status_of
from nnunet_fed.coordinator.store import Ballot, Collective, Contribution, Store
from nnunet_fed.coordinator.tracking import FederationTracker
from nnunet_fed.coordinator.verdict import Offer, Verdict, verdict_of
from nnunet_fed.coordinator.withdrawals import Withdrawals
from nnunet_fed.errors import NotFiniteError
from nnunet_fed.exchange.communicator import Held
from nnunet_fed.exchange.payload import open_payload
from nnunet_fed.exchange.uploads import Spool
from nnunet_fed.study.federation import Federation, Fold
from nnunet_fed.study.table import NEWEST_PROTOCOL

logger = logging.getLogger(__name__)

SPOOL_QUOTA = 100 * 10**9
"""Bytes."""


class Coordinator:
    """Members, rounds, deadlines, quorum and reduction of one study. Thread-safe.

    Whoever serves it calls these methods only; the parts behind them are its own.

    Args:
        study: the study as ``federation.toml`` has it now.
        store: its memory.
        spool_quota: bytes that payloads may take until they are reduced; each site has its share of it.
        tracker: is told of rounds and of what the sites report.
        clock: of the deadlines; a test may turn its own.

    Raises:
        ConfigurationError: the store belongs to a study of other mathematics.
    """

    def __init__(
        self,
        study: Federation,
        store: Store,
        spool_quota: int = SPOOL_QUOTA,
        tracker: FederationTracker | None = None,
        clock: Clock | None = None,
    ):
        known = store.latest_study()
        self.study, self.attempt = open_study(study, store)
        self._store = store
        self._tracker = tracker
        self._draining = False
        self._changed = threading.Condition()
        folds = len(self.study.trained_folds)
        share = spool_quota // (len(self.study.sites) * folds)
        clock = clock or RunningClock()
        self._spool = Spool(store.spool, spool_quota, share, folds)
        self._generations = Generations(store)
        if known is not None:
            begin_more_rounds(Federation.restore(known), self.study, store, self._generations)
        self._members = Members(self.study, self.attempt, store, self._generations, self._changed)
        self._admission = Admission(self.study, store, share)
        self._scope_order = ScopeOrder(self.study, self.attempt, store)
        self._round_closer = RoundCloser(self.study, store, self._spool, self._changed, tracker, clock)
        self._reconciliation = Reconciliation(
            self.study, store, self._generations, self._round_closer.expected_in, clock
        )
        self._withdrawals = Withdrawals(self.attempt, store, self._generations, self._round_closer)
        self._round_closer.recover(self.attempt)

    def drain(self) -> None:
        """Let nobody wait any longer; a call that waits is answered with what is known."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()

    def close(self) -> None:
        """Finish what is under way in the background, and close the store."""
        self.drain()
        self._round_closer.shutdown()
        with self._changed:
            self._store.close()
        if self._tracker is not None:
            self._tracker.close()

    # ------------------------------------------------------------------------------------------------- members

    def join(
        self,
        site: str,
        purpose: Purpose,
        digest: str = "",
        configuration: str = "",
        trainer: str = "",
        fresh: bool = False,
        fold: Fold | None = None,
        can_go_back: bool = True,
    ) -> str:
        """See :meth:`nnunet_fed.coordinator.members.Members.join`."""
        return self._members.join(site, purpose, digest, configuration, trainer, fresh, fold, can_go_back)

    def generation(self, run: str) -> int:
        """How often rounds of a run had been undone when it was opened."""
        with self._changed:
            return self._generations.number(run)

    def standing(self, run: str, site: str, held: Held) -> Standing:
        """Where the model stands that a site holds which has just joined; raises :class:`RefusedError` for none."""
        with self._changed:
            return self._reconciliation.standing_of_joining(run, site, held)

    def introduce(self, site: str, versions: dict[str, str]) -> dict[str, dict[str, str]]:
        """See :meth:`nnunet_fed.coordinator.members.Members.introduce`."""
        return self._members.introduce(site, versions)

    def planning_run(self) -> str | None:
        """Id of the run in which the sites have planned, or are planning; ``None``: nobody has begun."""
        return self._members.planning_run()

    def report(self, site: str, progress: dict[str, Any], run: str = "") -> None:
        """Note what a site is doing in a run; raises :class:`RefusedError` if it does not say that."""
        with self._changed:
            if self._members.report(run, site, progress) and self._tracker is not None:
                self._tracker.reported(self._store.runs().get(run, {}).get("fold"), site, progress)

    def note(self, run: str, site: str, text: str) -> None:
        """Journal something that happened at a site, for the record and for whoever reads the log."""
        self._members.note(run, site, text)

    def leave(self, run: str, site: str, reason: str, returns: bool = False) -> None:
        """A site takes its leave in order; no later round waits for it. One that returns is absent until it does."""
        with self._changed:
            self._members.leave(run, site, reason, returns)
            keys = [collective.key for collective in self._store.collectives(run, "open")]
        self._spool.forget_site(run, site)
        for key in keys:
            self._round_closer.close_if_due(run, key)

    # ------------------------------------------------------------------------------------------- contributions

    def ask(self, offer: Offer) -> Verdict:
        """What becomes of an offer. Nothing is contributed; that the site speaks is noted.

        Raises:
            RefusedError: unknown run, or one whose rounds were undone, malformed key, a scope whose turn it is not,
                another verb than the other sites', a bad weight, more bytes than such a payload has, or the site has to
                go back.
            NotYetError: the coordinator was restored from a back-up, and the sites have not told yet where they are.
        """
        offer.check()
        with self._changed:
            self._generations.require_newest(offer.run)
            self._members.heard(offer.run, offer.site)
            self._scope_order.check_attempt(offer.run)
            self._reconciliation.check(offer.run, offer.site, offer.held)
            # who is in a mean is settled before it is computed: a contribution that came meanwhile would be in none
            self._changed.wait_for(lambda: not self._round_closer.is_closing(offer.run, offer.key))
            collective = self._store.collective(offer.run, offer.key)
            standing = self._store.contributions(offer.run, offer.key).get(offer.site)
            verdict = verdict_of(offer, collective, standing, self._store.participants(offer.run, offer.scope))
            if verdict == "send":
                self._scope_order.check(offer)
                self._check_kind(offer, Ballot(offer.verb, None))
            if collective is not None and collective.status == "failed":
                self._round_closer.reopen(collective)
            if verdict == "send" and offer.weight > 0:
                self._admission.check_size(offer)
        return verdict

    def _check_kind(self, offer: Offer, ballot: Ballot) -> None:
        collective = self._store.collective(offer.run, offer.key)
        missing = [] if collective is None else self._round_closer.missing(collective)
        self._admission.check_kind(offer, ballot, collective, missing)

    def offer(self, offer: Offer) -> Verdict:
        """Answer a site that is about to contribute; one of weight 0 sends nothing, and has contributed with that.

        One that corrects what the site has told while planning lets that begin anew.

        Raises:
            RefusedError: see :meth:`ask` and :meth:`nnunet_fed.coordinator.withdrawals.Withdrawals.withdraw`.
            WithdrawnError: a site, perhaps this one, has withdrawn what it told.
        """
        with self._changed:
            verdict = self.ask(offer)
            if verdict == "differs" and offer.correct and self._store.run(offer.run)["purpose"] == "planning":
                self._changed.wait_for(lambda: not self._round_closer.is_closing(offer.run))
                self._generations.require_newest(offer.run)
                self._changed.notify_all()  # who waits hears of it once the lock is free
                self._withdrawals.withdraw(offer)
                self._generations.require_newest(offer.run)
            if verdict != "send" or offer.weight > 0:
                return verdict
            self._contribute(offer, None)
        self._round_closer.close_if_due(offer.run, offer.key)
        return "stands"

    def position(self, offer: Offer) -> int:
        """How many bytes of an offered payload are there, from an earlier connection."""
        return self._spool.position(offer.upload)

    def take(self, offer: Offer, position: int, pieces: Iterable[bytes | memoryview]) -> Verdict | None:
        """Take an offered payload's bytes from ``position`` on; ``None``: they are not what was offered, or too few.

        What has come before a connection broke is kept, and goes when the collective closes.

        Raises:
            RefusedError: see :meth:`ask`; also for no payload of this verb, a number that is not finite, another
                schema than in the first round or than the other sites', or an update that is too large
                (``max_update_norm``).
            NoRoomError: the spool is full, or the site has too many uploads under way.
            InterruptedUploadError: the same payload comes another way.
            OSError: the disk is full, or broken.
        """
        started = time.monotonic()
        verdict = self.offer(offer)
        if verdict != "send":
            return verdict
        payload = self._spool.take(offer.upload, position, pieces)
        return None if payload is None else self._accept(offer, payload, time.monotonic() - started)

    def _accept(self, offer: Offer, payload: Path, seconds: float) -> Verdict:
        """Let a complete, verified upload stand; the file becomes the coordinator's, or is deleted."""
        accepted = False
        try:
            schema = check_content(offer.verb, payload)
            with self._changed:
                last = self._admission.last_model(offer, schema)
            norm = None if last is None else distance(open_payload(payload), open_payload(last))
            with self._changed:
                verdict = self.ask(offer)  # again: the round may have closed while the bytes came
                if verdict == "send":
                    self._check_kind(offer, Ballot(offer.verb, schema))
                    if norm is not None:
                        self._admission.check_norm(offer, norm)
                    self._contribute(offer, payload.name, schema, seconds, norm)
                    accepted, verdict = True, "stands"
        except (QuarantinedError, NotFiniteError) as error:  # nobody waits for the site until its next offer
            self._members.send_away(offer.run, offer.site, str(error))
            raise
        finally:
            if not accepted:
                payload.unlink(missing_ok=True)
            # also after a refusal, which may leave nobody to wait for
            self._round_closer.close_if_due(offer.run, offer.key)
        return verdict

    def _contribute(
        self, offer: Offer, file: str | None, schema: str | None = None, seconds: float = 0.0, norm: float | None = None
    ) -> None:
        """Journal a contribution; one of weight 0 has no file."""
        size = 0 if file is None else offer.size
        given = Contribution(
            offer.run, offer.key, offer.site, offer.weight, offer.digest, size, file, time.time(), seconds, norm
        )
        with self._store.transaction():
            collective = self._store.collective(offer.run, offer.key)
            if collective is None:
                collective = Collective(
                    run=offer.run, key=offer.key, verb=offer.verb, status="open", opened=time.time(),
                    closed=None, schema=None, digest=None, size=None, error=None,
                )  # fmt: skip
                self._store.put_collective(collective)
            self._store.add_contribution(given)
            self._store.cast(offer.run, offer.key, offer.site, Ballot(offer.verb, schema))
        extra = about(offer.run, offer.key, offer.site)
        logger.info("%s: %s from %s (%d bytes)", offer.key, offer.verb, offer.site, size, extra=extra)

    # ------------------------------------------------------------------------------------------------- results

    def wait(self, run: str, key: str, seconds: float) -> Collective | None:
        """The collective once it is no longer open, or as it is after so many seconds; ``None``: never heard of.

        Raises:
            RefusedError: rounds of the run were undone.
        """
        end = time.monotonic() + seconds
        while True:
            self._round_closer.close_if_due(run, key)
            with self._changed:
                self._generations.require_newest(run)
                collective = self._store.collective(run, key)
                rest = end - time.monotonic()
                if collective is None or collective.status != "open" or rest <= 0 or self._draining:
                    return collective
                self._changed.wait(max(0.01, min(rest, self._round_closer.left(collective))))

    def outlook(self, collective: Collective) -> Outlook:
        """Who has contributed to a collective, and for whom it waits."""
        with self._changed:
            is_open = collective.status == "open"
            missing = self._round_closer.missing(collective) if is_open else []
            given = self._store.contributions(collective.run, collective.key)
            return Outlook(
                weights={site: contribution.weight for site, contribution in given.items()},
                missing={site: self._members.doing(collective.run, site) for site in missing},
                closes_at=time.time() + self._round_closer.left(collective) if is_open else None,
            )

    def turned_down(self, collective: Collective, site: str) -> str | None:
        """Why a site's contribution is not in a result, as a sentence; ``None``: it was not turned down."""
        with self._changed:
            return self._store.turned_down(collective.run, collective.key, site)

    def result_file(self, collective: Collective) -> Path:
        """Where the result of a closed collective stands."""
        return self._store.result_path(collective.run, collective.key)

    def wait_until_saved(self, collective: Collective) -> None:
        """Return once a closed collective's result is on disk for good: no site may go on with it before.

        Raises:
            OSError: the disk is full, or broken. The next call tries again.
        """
        self._round_closer.wait_until_saved(collective)

    def newest(self, run: str, name: str) -> str | None:
        """Key of the newest closed mean called ``SCOPE/name`` whose result is kept: where a late site goes on.

        Raises:
            RefusedError: rounds of the run were undone, or it is of an attempt that was given up.
        """
        with self._changed:
            self._generations.require_newest(run)
            with suppress(KeyError):  # a run that nobody has joined
                self._scope_order.check_attempt(run)
            closed = [c for c in self._store.collectives(run, "closed") if c.verb == "mean" and c.name == name]
            return closed[-1].key if closed else None

    def status(self, record: bool = False, protocol: int = NEWEST_PROTOCOL) -> dict[str, Any]:
        """What is going on, as JSON.

        Args:
            record: tell also all that happened, collective by collective.
            protocol: version of the protocol that the reader speaks.

        Raises:
            RefusedError: the reader does not know what the study asks for.
        """
        with self._changed:
            study = self.study.stored(protocol)
            now = status_of(
                self.study, study, self.attempt, self._store, self._generations, self._round_closer, self._members
            )
            return {**now, **happened(self._store)} if record else now

    def record_page(self, page: str, protocol: int = NEWEST_PROTOCOL) -> tuple[dict[str, Any], str]:
        """What is going on, with a page of the record (:func:`nnunet_fed.coordinator.history.page_of`), and the next
        page. Errors as in :meth:`status`."""
        with self._changed:
            told, following = page_of(self._store, page)
        return {**self.status(protocol=protocol), **told}, following

    def tally(self) -> Tally:
        """Totals for those who measure; the rounds are the journal's, the reductions those since the start."""
        with self._changed:
            closer = self._round_closer
            return Tally(self._store.count_rounds(), closer.reductions, closer.reduction_seconds)
