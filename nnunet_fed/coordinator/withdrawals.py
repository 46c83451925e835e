"""What a site has told wrongly while planning can be corrected: it withdraws that, and all sites plan anew.

The planning goes on as another generation of its run, which begins with nothing
(:mod:`nnunet_fed.coordinator.generations`); of the one before the record stays. Source: ours.
"""

from __future__ import annotations

from nnunet_fed.coordinator.generations import WITHDRAWN_BY, Generations
from nnunet_fed.coordinator.round_closer import RoundCloser
from nnunet_fed.coordinator.store import Store
from nnunet_fed.coordinator.verdict import Offer
from nnunet_fed.errors import RefusedError
from nnunet_fed.exchange.keys import PUBLISHED

MOST = 8
"""So often a site may withdraw in an attempt: each time all others plan anew, and answer anew."""


class Withdrawals:
    """Lets sites withdraw what they have told. Called under the store's lock.

    Args:
        attempt: that is open.
        store: the coordinator's memory.
        generations: of the runs.
        round_closer: clears what is void.
    """

    def __init__(self, attempt: int, store: Store, generations: Generations, round_closer: RoundCloser):
        self._attempt = attempt
        self._store = store
        self._generations = generations
        self._round_closer = round_closer

    def withdraw(self, offer: Offer) -> None:
        """Let a planning begin anew, since a site has told something else in it before.

        Args:
            offer: of a collective of the planning to which the site has contributed other bytes.

        Raises:
            RefusedError: the plans are agreed, or the site has withdrawn too often.
        """
        published = self._store.collective(offer.run, PUBLISHED)
        if published is not None and published.status == "closed":
            raise RefusedError(
                f"Site '{offer.site}' cannot withdraw what it told: the plans are agreed, and sites may train by them. "
                f"Undo what has changed its values for '{offer.key}', or let the coordinator open a new attempt "
                "(nnunet_fed new-attempt STATE), in which all sites plan and train anew."
            )
        runs = map(self._store.run, self._store.runs_of(self._attempt))
        before = sum(described.get(WITHDRAWN_BY) == offer.site for described in runs)
        if before >= MOST:
            raise RefusedError(
                f"Site '{offer.site}' has withdrawn what it told {MOST} times in this attempt, which is as often as it "
                f"may: each time all sites plan anew. See what changes its values for '{offer.key}'; then let the "
                "coordinator open a new attempt (nnunet_fed new-attempt STATE)."
            )
        self._generations.begin_anew(
            offer.run,
            offer.site,
            f"withdrew what it had told while planning, since its values for '{offer.key}' are others now "
            f"({before + 1} of {MOST} times at most in an attempt)",
        )
        self._round_closer.clear_withdrawn()
