"""Which collectives may begin: a run's scopes have an order, and a scope so many names. Part of the coordinator.

What has begun goes on whatever stands here, since another version may have begun it. Source: ours.
"""

from __future__ import annotations

from typing import Any

from nnunet_fed.coordinator.store import Store
from nnunet_fed.coordinator.verdict import Offer
from nnunet_fed.errors import NotYetError, RefusedError
from nnunet_fed.exchange.keys import CROSS_SITE, PLANNING, cross_site_scope, round_of, scope_of_round
from nnunet_fed.study.federation import Federation

PLANNING_NAMES = 256
"""Collectives of a planning at most."""
FURTHER_SCOPES = 64
"""Scopes beside rounds that a trainer from outside the package may begin in a run."""


def given_up(attempt: int, now_open: int) -> str:
    """The sentence that says that nothing goes on in an attempt."""
    return f"Attempt {attempt} was given up, and attempt {now_open} is open. Start this training without --c."


class ScopeOrder:
    """The order of scopes in the runs of a study. Called under the store's lock.

    Args:
        study: the study.
        attempt: that is open.
        store: the coordinator's memory.
    """

    def __init__(self, study: Federation, attempt: int, store: Store):
        self._study = study
        self._attempt = attempt
        self._store = store
        self._asked: dict[str, dict[str, str]] = {}
        """By run and site: the round out of order for which it has asked last."""

    def check_attempt(self, run: str) -> None:
        """Raise :class:`RefusedError` for a run of an attempt that was given up."""
        attempt = self._store.run(run).get("attempt", self._attempt)
        if attempt != self._attempt:
            raise RefusedError(given_up(attempt, self._attempt))

    def check(self, offer: Offer) -> None:
        """See that an offer's collective may begin, or has begun.

        Raises:
            RefusedError: it is not its scope's turn, or the scope has too many collectives.
            NotYetError: the round is out of order: it begins once all sites that take part ask for it.
        """
        run, scope = offer.run, offer.scope
        there = self._store.collectives_of_scope(run, scope)
        if any(collective.key == offer.key for collective in there):
            return
        described = self._store.run(run)
        planning = described["purpose"] == "planning"
        most = PLANNING_NAMES if planning else self._study.method.names_in_scope(len(self._study.sites))
        # counted by site, so that nobody can take the others' places
        if self._store.count_contributions(run, scope, offer.site) >= most:
            raise RefusedError(
                f"'{offer.key}' of site '{offer.site}' cannot begin: the site is in {most} collectives of '{scope}' "
                "already, which is as many as it may be in."
            )
        if not there and self._store.participants(run, scope) is None:
            self._check_turn(offer, described, planning)

    def _check_turn(self, offer: Offer, described: dict[str, Any], planning: bool) -> None:
        number = None if planning else round_of(offer.scope)
        if number is not None and offer.scope == scope_of_round(number) and number < self._study.all_rounds:
            if number > 0 and self._store.participants(offer.run, scope_of_round(number - 1)) is None:
                self._check_out_of_order(offer, number)
            return
        if planning:
            is_its_turn = offer.scope == PLANNING
        else:
            is_its_turn = number is None and self._is_turn_beside_rounds(offer.run, offer.scope, described["trainer"])
        if not is_its_turn:
            raise RefusedError(
                f"'{offer.key}' of site '{offer.site}' cannot begin: a training has the scopes of its method's "
                f"preparation, then round after round up to '{scope_of_round(self._study.all_rounds - 1)}', then those "
                f"in which the sites validate. A planning has '{PLANNING}'. Do all sites run the same version of the "
                "trainer?"
            )

    def _is_turn_beside_rounds(self, run: str, scope: str, trainer: str) -> bool:
        method = self._study.method
        begun, over = (
            self._store.participants(run, scope_of_round(number)) is not None
            for number in (0, self._study.all_rounds - 1)
        )
        if trainer != method.own_trainer():  # one from outside the package: nobody has declared its scopes
            return (over or not begun) and len(self._further(run)) < FURTHER_SCOPES
        others = range(1, len(self._study.sites))  # sources, if the first one has gone away
        if scope in {*method.SCOPES_BEFORE, *(f"{name}-{other}" for name in method.SCOPES_BEFORE for other in others)}:
            return not begun
        sites = {*self._study.sites, *self._store.standing(run)}
        after = {*method.SCOPES_AFTER, CROSS_SITE, *map(cross_site_scope, sites)}
        return scope in after and (over or not method.EXCHANGES)

    def _further(self, run: str) -> set[str]:
        scopes = {*self._store.scopes(run), *(c.scope for c in self._store.collectives(run, "open"))}
        return {scope for scope in scopes if round_of(scope) is None}

    def _check_out_of_order(self, offer: Offer, number: int) -> None:
        """A state directory that was restored does not know the rounds that its sites have closed since. Sites of
        version 0.1 do not tell which model they hold (:mod:`nnunet_fed.coordinator.reconciliation`): they go on where
        they are if all of them say so. One site alone begins no round but the next."""
        asked = self._asked.setdefault(offer.run, {})
        asked[offer.site] = offer.scope
        standing = self._store.standing(offer.run)
        active = [site for site in self._study.sites if standing.get(site) == "active"]
        others = [site for site in active if asked.get(site) != offer.scope]
        if others:
            raise NotYetError(
                f"'{offer.scope}' is out of order, since no collective of '{scope_of_round(number - 1)}' has closed "
                f"here. It begins once all sites that take part ask for it; {', '.join(others)} did not."
            )
