"""The one process that all sites reach: it keeps members, closes rounds, reduces and stores. It knows no method.

A state machine without a network: :mod:`nnunet_fed.transport.coordinator.server` puts it on gRPC. Its state is the
store's, so a restarted coordinator goes on where the last one stopped. The rules are those of docs/protocol.md.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from pathlib import Path
from typing import Any, Literal

from nnunet_fed.coordinator.admission import Admission, QuarantinedError, check_content, distance
from nnunet_fed.coordinator.history import happened
from nnunet_fed.coordinator.log_fields import about
from nnunet_fed.coordinator.round_closer import RoundCloser
from nnunet_fed.coordinator.status import Tally, status_of
from nnunet_fed.coordinator.store import Agreed, Collective, Contribution, Store
from nnunet_fed.coordinator.tracking import FederationTracker
from nnunet_fed.errors import ConfigurationError, RefusedError
from nnunet_fed.exchange.communicator import Verb, check_weight
from nnunet_fed.exchange.keys import LONGEST_KEY, is_key, scope_of
from nnunet_fed.exchange.payload import open_payload
from nnunet_fed.exchange.uploads import Spool
from nnunet_fed.study.federation import Federation, Fold
from nnunet_fed.study.table import NEWEST_PROTOCOL

logger = logging.getLogger(__name__)

KEY_PART = re.compile(r"[A-Za-z0-9_.-]{1,100}")
DIGEST = re.compile(r"[0-9a-f]{32}")
LONGEST_TEXT = 10_000
"""Characters of a note or a reason that are journalled."""
MOST_PACKAGES, LONGEST_VERSION = 20, 100

Purpose = Literal["planning", "training"]
SPOOL_QUOTA = 100 * 10**9
"""Bytes."""

Verdict = Literal["send", "stands", "differs", "closed"]
"""Answer to an offer: send the payload; these bytes stand; other bytes stand; the round closed without this site."""


class Coordinator:
    """Members, rounds, deadlines, quorum and reduction of one study. Thread-safe.

    Args:
        study: the study as ``federation.toml`` has it now.
        store: its memory.
        new_attempt: open a new attempt: sites plan and train from the start, what was contributed before is left aside.
        spool_quota: bytes that payloads may take until they are reduced. A site's share of it bounds its first payload
            of a name.
        tracker: is told of rounds and of what the sites report.

    Raises:
        ConfigurationError: the store belongs to a study of other mathematics.
    """

    def __init__(
        self,
        study: Federation,
        store: Store,
        new_attempt: bool = False,
        spool_quota: int = SPOOL_QUOTA,
        tracker: FederationTracker | None = None,
    ):
        known = store.latest_study()
        if known is not None:
            study = study.with_defaults(store.fact("defaults") or {})
            _check_same(Federation.restore(known), study, store.folder)
        self.study = study
        self.spool = Spool(store.spool, spool_quota)
        self._store = store
        self._tracker = tracker
        self._admission = Admission(study, store, spool_quota)
        self._draining = False
        self._changed = threading.Condition()
        self.round_closer = RoundCloser(study, store, self.spool, self._changed, tracker)
        self._seen: dict[str, float] = {}
        self._progress: dict[str, dict[str, Any]] = {}
        with store.transaction():
            if known is None:
                store.set_fact("defaults", study.defaults())
            if known != study.stored():
                store.add_study(study.stored())
            if new_attempt or store.fact("attempt") is None:
                store.set_fact("attempt", (store.fact("attempt") or 0) + 1)
                store.add_event(None, None, f"attempt {store.fact('attempt')} opened")
        self.attempt: int = store.fact("attempt")
        self.round_closer.recover()

    def drain(self) -> None:
        """Let nobody wait any longer; a call that waits is answered with what is known."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()

    def close(self) -> None:
        """Finish what is under way in the background, and close the store."""
        self.drain()
        self.round_closer.shutdown()
        with self._changed:
            self._store.close()
        if self._tracker is not None:
            self._tracker.close()

    def join(
        self,
        site: str,
        purpose: Purpose,
        digest: str = "",
        configuration: str = "",
        trainer: str = "",
        fresh: bool = False,
        fold: Fold | None = None,
    ) -> str:
        """Let a site into a run, which its arguments name (rule 1 of the protocol).

        Args:
            site: name of the site.
            purpose: what the run is for.
            digest: of the study in the site's plans and this fold (training).
            configuration: of nnU-Net (training).
            trainer: name of the trainer class (training).
            fresh: the training starts without ``--c``.
            fold: of the study, that the run is for (training); ``None``: the study's present one.

        Returns:
            The run's id.

        Raises:
            RefusedError: the site is not in the study, has plans of another study, or starts afresh a run that it has
                contributed to.
        """
        self._require_member(site)
        fold = self.study.fold if fold is None else fold
        if purpose == "training" and digest != self.study.digest_of_fold(fold):
            raise RefusedError(
                f"The plans at site '{site}' belong to another study than '{self.study.name}', which this coordinator "
                "serves. Run 'nnunet_fed plan_and_preprocess' again, or correct 'coordinator' in site.toml."
            )
        parts = [configuration, trainer, f"fold_{fold}"] if purpose == "training" else ["planning"]
        if not all(KEY_PART.fullmatch(part) for part in parts):
            raise RefusedError(f"{configuration!r} and {trainer!r} cannot name a configuration and a trainer.")
        run = "-".join([self.study.digest_of_fold(fold)[:12], *parts, str(self.attempt)])
        with self._changed, self._store.transaction():
            if purpose == "planning":
                run = self.planning_run() or run
            if fresh and self._store.has_contributed(run, site):
                raise RefusedError(
                    f"Site '{site}' has already contributed to this training (attempt {self.attempt}). Continue it "
                    "with --c, or let the coordinator open a new attempt (nnunet_fed coordinator ... --new-attempt)."
                )
            described = {"purpose": purpose, "configuration": configuration, "trainer": trainer, "fold": fold}
            self._store.add_run(run, {**described, "attempt": self.attempt})
            self._store.set_standing(run, site, "active")
            self._store.add_event(run, site, "joined" if fresh or purpose == "planning" else "joined with --c")
            self._seen[site] = time.time()
        return run

    def _require_member(self, site: str) -> None:
        if site not in self.study.sites:
            raise RefusedError(
                f"Site '{site}' is not in the study '{self.study.name}' (sites: {', '.join(self.study.sites)}). "
                "Correct 'name' in site.toml, or add the site to federation.toml at the coordinator and restart it."
            )

    def introduce(self, site: str, versions: dict[str, str]) -> dict[str, dict[str, str]]:
        """Note the versions with which a site works; returns those of all sites that have told theirs.

        Args:
            site: name of the site, which need not have joined.
            versions: by package.

        Raises:
            RefusedError: the site is not in the study, or these are no versions.
        """
        self._require_member(site)
        texts = [*versions, *versions.values()]
        if len(texts) > 2 * MOST_PACKAGES or any(len(text) > LONGEST_VERSION for text in texts):
            raise RefusedError(f"What site '{site}' tells of its versions is too long.")
        with self._changed, self._store.transaction():
            known: dict[str, dict[str, str]] = {**(self._store.fact("versions") or {}), site: versions}
            self._store.set_fact("versions", known)
            self._seen[site] = time.time()
        return {name: told for name, told in known.items() if name in self.study.sites}

    def planning_run(self) -> str | None:
        """Id of the run in which the sites have planned, or are planning; ``None``: nobody has begun."""
        with self._changed:
            runs = self._store.runs().items()
            described = {"purpose": "planning", "attempt": self.attempt}
            return next((run for run, about_it in runs if described.items() <= about_it.items()), None)

    def offer(self, run: str, key: str, site: str, verb: Verb, weight: float, digest: str, size: int) -> Verdict:
        """Hear what a site is about to contribute. A site of weight 0 has contributed with that.

        Raises:
            RefusedError: unknown run, malformed key, another verb than the other sites', a bad weight, or more bytes
                than such a payload has.
        """
        check_weight(weight)
        with self._changed:
            self._require_joined(run, site)
            if not is_key(key):
                raise RefusedError(f"{key[:LONGEST_KEY]!r} cannot name a collective.")
            if weight > 0 and not DIGEST.fullmatch(digest):
                raise RefusedError(f"{digest[:64]!r} is no digest of a payload.")
            self._seen[site] = time.time()
            self._welcome_back(run, site)
            collective = self._store.collective(run, key)
            if collective is not None and collective.verb != verb:
                raise RefusedError(f"'{key}' is a {collective.verb} at the other sites, not a {verb}.")
            if collective is not None and collective.status == "failed":
                collective.status, collective.error, collective.opened = "open", None, time.time()
                with self._store.transaction():
                    self._store.put_collective(collective)
            standing = self._store.contributions(run, key).get(site)
            if standing is not None:
                return "stands" if (standing.digest, standing.weight) == (digest, weight) else "differs"
            participants = self._store.participants(run, scope_of(key))
            if (collective is not None and collective.status != "open") or (
                participants is not None and site not in participants
            ):
                return "closed"
            if weight > 0:
                self._admission.check_size(run, key, site, verb, size)
                return "send"
            self._accept(Contribution(run, key, site, 0.0, digest, 0, None, time.time(), 0.0, None), verb, None)
        self.round_closer.close_if_due(run, key)
        return "stands"

    def _require_joined(self, run: str, site: str) -> None:
        if site not in self._store.standing(run):
            raise RefusedError(f"Site '{site[:100]}' has not joined the run '{run[:LONGEST_KEY]}'.")

    def accept(
        self, run: str, key: str, site: str, verb: Verb, weight: float, digest: str, payload: Path, seconds: float = 0.0
    ) -> Verdict:
        """Take over a complete, verified upload; the file becomes the coordinator's, or is deleted.

        Raises:
            RefusedError: no payload of this verb, a number that is not finite, another schema than in the first round
                or than the other sites', or an update that is too large (``max_update_norm``).
        """
        accepted = False
        try:
            schema = check_content(verb, payload)
            with self._changed:
                last = self._admission.last_model(run, key, verb, schema)
            norm = None if last is None else distance(open_payload(payload), open_payload(last))
            size = payload.stat().st_size
            with self._changed:
                verdict = self.offer(run, key, site, verb, weight, digest, size)
                if verdict == "send":
                    self._admission.check_schema(run, key, site, verb, schema)
                    if norm is not None:
                        self._admission.check_norm(run, key, site, norm)
                    given = Contribution(run, key, site, weight, digest, size, payload.name, time.time(), seconds, norm)
                    self._accept(given, verb, schema)
                    accepted, verdict = True, "stands"
        except QuarantinedError as error:
            self._quarantine(run, site, str(error))
            raise
        finally:
            if not accepted:
                payload.unlink(missing_ok=True)
            self.round_closer.close_if_due(run, key)  # also after a refusal, which may leave nobody to wait for
        return verdict

    def _quarantine(self, run: str, site: str, sentence: str) -> None:
        """Journal it; nobody waits for the site, and its next offer brings it back."""
        with self._changed, self._store.transaction():
            self._store.set_standing(run, site, "absent")
            self._store.add_event(run, site, sentence)

    def wait(self, run: str, key: str, seconds: float) -> Collective | None:
        """The collective once it is no longer open, or as it is after so many seconds; ``None``: never heard of."""
        end = time.time() + seconds
        while True:
            self.round_closer.close_if_due(run, key)
            with self._changed:
                collective = self._store.collective(run, key)
                now = time.time()
                if collective is None or collective.status != "open" or now >= end or self._draining:
                    return collective
                self._changed.wait(max(0.01, min(end, self.round_closer.closes_at(collective)) - now))

    def doing(self, site: str) -> str:
        """A site's name and what it said last of what it is doing, for those who wait for it."""
        progress = self._progress.get(site)
        return f"{site} ({progress['phase']})" if progress else site

    def weights(self, collective: Collective) -> dict[str, float]:
        """Who contributed to a collective, and with which weight."""
        with self._changed:
            given = self._store.contributions(collective.run, collective.key)
            return {site: contribution.weight for site, contribution in given.items()}

    def result_file(self, collective: Collective) -> Path:
        """Where the result of a closed collective stands."""
        return self._store.result_path(collective.run, collective.key)

    def newest(self, run: str, name: str) -> str | None:
        """Key of the newest closed mean called ``SCOPE/name`` whose result is kept: where a late site goes on."""
        with self._changed:
            closed = [c for c in self._store.collectives(run, "closed") if c.verb == "mean" and c.name == name]
            return closed[-1].key if closed else None

    def report(self, site: str, progress: dict[str, Any]) -> None:
        """Note what a site is doing, for those who watch; raises :class:`RefusedError` if it does not say that."""
        if not isinstance(progress, dict) or not isinstance(progress.get("phase"), str):
            raise RefusedError("A site's progress names a phase.")
        if site in self.study.sites:
            with self._changed:
                self._seen[site] = time.time()
                self._progress[site] = progress
                if self._tracker is not None:
                    self._tracker.reported(site, progress)

    def note(self, run: str, site: str, text: str) -> None:
        """Journal something that happened at a site, for the record and for whoever reads the log."""
        with self._changed, self._store.transaction():
            self._require_joined(run, site)
            self._store.add_event(run, site, text[:LONGEST_TEXT])
        logger.info("site %s: %s", site, text[:LONGEST_TEXT], extra=about(run, site=site))

    def leave(self, run: str, site: str, reason: str) -> None:
        """A site takes its leave in order; no later round waits for it."""
        with self._changed:
            self._require_joined(run, site)
            with self._store.transaction():
                self._store.set_standing(run, site, "left")
                self._store.add_event(run, site, f"left: {reason[:LONGEST_TEXT]}")
            keys = [collective.key for collective in self._store.collectives(run, "open")]
        self.spool.forget_site(run, site)
        for key in keys:
            self.round_closer.close_if_due(run, key)

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
            now = status_of(self.study, study, self.attempt, self._store, self.round_closer, self._seen, self._progress)
            return {**now, **happened(self._store)} if record else now

    def tally(self) -> Tally:
        """Totals for those who measure; the rounds are the journal's, the reductions those since the start."""
        with self._changed:
            return Tally(self._store.count_rounds(), self.round_closer.reductions, self.round_closer.reduction_seconds)

    def _welcome_back(self, run: str, site: str) -> None:
        if self._store.standing(run)[site] == "absent":
            with self._store.transaction():
                self._store.set_standing(run, site, "active")
                self._store.add_event(run, site, "came back")

    def _accept(self, contribution: Contribution, verb: Verb, schema: str | None) -> None:
        with self._store.transaction():
            collective = self._store.collective(contribution.run, contribution.key)
            if collective is None:
                collective = Collective(
                    run=contribution.run, key=contribution.key, verb=verb, status="open", opened=time.time(),
                    closed=None, schema=schema, digest=None, size=None, error=None,
                )  # fmt: skip
            collective.schema = collective.schema or schema
            self._store.put_collective(collective)
            if schema is not None and verb == "mean" and self._store.agreed(collective.run, collective.name) is None:
                self._store.agree(collective.run, collective.name, Agreed(schema, contribution.size))
            self._store.add_contribution(contribution)
        extra = about(contribution.run, contribution.key, contribution.site)
        given = contribution.key, verb, contribution.site, contribution.size
        logger.info("%s: %s from %s (%d bytes)", *given, extra=extra)


def _check_same(known: Federation, study: Federation, folder: Path) -> None:
    if known.digest == study.digest:
        return
    before, now = known.stored(), study.stored()
    edited = sorted(
        name for name in {*before, *now} - study.OPERATIONAL if before.get(name) != now.get(name)
    )  # fmt: skip
    raise ConfigurationError(
        f"The state directory {folder} belongs to another study: what changes the mathematics was edited since "
        f"({', '.join(edited)}). Undo that, or give the new study another --state."
    )
