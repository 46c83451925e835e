"""What a coordinator does when sites hold models that it does not know: it was restored from a back-up.

Each offer tells the newest model that the site holds. As long as the coordinator knows those of other sites, a site
that holds another one goes back alone. Where it knows that of none, it waits until all have told theirs: they go on if
they agree, and otherwise the run goes back to the newest model that the coordinator has. Source: ours.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Literal

from nnunet_fed.coordinator.deadlines import Clock
from nnunet_fed.coordinator.generations import Generations
from nnunet_fed.coordinator.log_fields import about
from nnunet_fed.coordinator.store import Collective, Store
from nnunet_fed.coordinator.verdict import DIGEST
from nnunet_fed.errors import NotYetError, RefusedError
from nnunet_fed.exchange.communicator import Held
from nnunet_fed.exchange.keys import LONGEST_KEY, MODEL, is_key, last_round, name_of, scope_of_round
from nnunet_fed.study.federation import Federation

logger = logging.getLogger(__name__)

Standing = Literal["known", "ahead", "other"]
"""Of a model that a site holds: it is the run's; the run has not come so far here; the run has another one."""


class Reconciliation:
    """Compares what the sites hold with what the coordinator knows. Called under the store's lock.

    Args:
        study: the study.
        store: the coordinator's memory.
        generations: of the runs.
        expected: the sites of a run that are waited for.
        clock: seconds in which the coordinator runs.
    """

    def __init__(
        self,
        study: Federation,
        store: Store,
        generations: Generations,
        expected: Callable[[str], list[str]],
        clock: Clock,
    ):
        self._study, self._store, self._generations = study, store, generations
        self._expected, self._clock = expected, clock
        self._told: dict[str, dict[str, Held | None]] = {}
        """By run and site: the model that it holds and that is ahead; ``None``: one that is known."""
        self._since: dict[str, float] = {}
        """By run: when a site was ahead for the first time."""

    def standing(self, run: str, held: Held) -> Standing:
        """Where a model that a site holds stands; raises :class:`RefusedError` for what is none."""
        if not is_key(held.key) or name_of(held.key) != MODEL or not DIGEST.fullmatch(held.digest):
            raise RefusedError(f"{held.key[:LONGEST_KEY]!r} cannot name a model that a site holds.")
        known = self._store.collective(run, held.key)
        if known is not None and known.status in ("closed", "pruned"):
            return "known" if known.digest == held.digest else "other"
        newest = self._newest(run)
        return "ahead" if newest is None or last_round(held.key) > last_round(newest.key) else "other"

    def standing_of_joining(self, run: str, site: str, held: Held) -> Standing:
        """The same for a site that joins: it is not ahead of what other sites go on from."""
        standing = self.standing(run, held)
        return "other" if standing == "ahead" and self._others_know(run, site) else standing

    def check(self, run: str, site: str, held: Held | None) -> None:
        """Let a site contribute that holds a model of the run.

        Raises:
            RefusedError: it has to go back.
            NotYetError: it is ahead, and others have not told yet what they hold.
        """
        if held is None:
            return
        standing, told = self.standing(run, held), self._told.setdefault(run, {})
        if standing == "known":
            told[site] = None
            return
        if standing == "other" or self._others_know(run, site):
            raise RefusedError(
                f"Site '{site}' holds a {held.key} that is not the federation's: the coordinator was restored from a "
                "back-up, or the site was. Start this training again with --c: it goes back to the federation's model."
            )
        told[site] = held
        expected = self._expected(run)
        missing = [other for other in expected if other not in told]
        since = self._since.setdefault(run, self._clock())
        overdue = self._clock() - since >= 60 * self._study.deadline_minutes
        held_there = [model for other in expected if (model := told.get(other)) is not None]
        if (missing and not overdue) or len(held_there) < self._study.quorum:
            raise NotYetError(
                f"the coordinator was restored from a back-up and does not know {held.key}; it waits until "
                f"{', '.join(missing) or 'more sites'} tell which model they hold"
            )
        del self._told[run], self._since[run]
        if len(set(held_there)) == 1:
            self._adopt(run, held)
        else:
            self._go_back(run)

    def _others_know(self, run: str, site: str) -> bool:
        told = self._told.get(run, {})
        return any(other != site and other in told and told[other] is None for other in self._expected(run))

    def _newest(self, run: str) -> Collective | None:
        models = [
            c for c in self._store.collectives(run)
            if c.verb == "mean" and c.name == MODEL and c.status in ("closed", "pruned")
        ]  # fmt: skip
        return models[-1] if models else None

    def _adopt(self, run: str, held: Held) -> None:
        """Journal that the sites have gone on to a model, which is not here."""
        now, store, newest = time.time(), self._store, self._newest(run)
        text = (
            f"the sites agree on {held.key}, which this coordinator does not know: it was restored from a back-up. "
            "They go on; the rounds before are missing in this record"
        )
        with store.transaction():
            over = [c for s in ("open", "failed") for c in store.collectives(run, s)]
            files = []
            for collective in over:
                if last_round(collective.key) <= last_round(held.key):
                    files += store.release(run, collective.key)
                    collective.status, collective.error = "pruned", None
                    store.put_collective(collective)
            store.put_collective(
                Collective(
                    run=run, key=held.key, verb="mean", status="pruned", opened=now, closed=now, schema=None,
                    digest=held.digest, size=None, error=None,
                )
            )  # fmt: skip
            first = 0 if newest is None else last_round(newest.key) + 1
            for number in range(first, last_round(held.key) + 1):
                store.freeze(run, scope_of_round(number), [])  # a site that is behind finds them closed
            store.add_event(run, None, text)
        for file in files:
            file.unlink(missing_ok=True)
        logger.warning(text, extra=about(run, held.key))

    def _go_back(self, run: str) -> None:
        """Let the run go on from the newest model that is here; the sites hear of it by the refusal of their run."""
        kept = [c for c in self._store.collectives(run, "closed") if c.verb == "mean" and c.name == MODEL]
        if not kept:
            raise RefusedError(
                "The coordinator was restored from a back-up that holds no model of this training, and the sites hold "
                "different ones. Let it open a new attempt (nnunet_fed new-attempt STATE)."
            )
        why = "the coordinator was restored from a back-up, and the sites hold different models"
        self._generations.open(run, kept[-1].scope, why)
        self._generations.require_newest(run)
