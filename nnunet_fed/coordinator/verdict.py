"""What becomes of a site's offer to contribute. Pure: it changes nothing, and reads nothing but its arguments."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nnunet_fed.coordinator.store import Collective, Contribution
from nnunet_fed.errors import RefusedError
from nnunet_fed.exchange.communicator import Held, Verb, check_weight
from nnunet_fed.exchange.keys import LONGEST_KEY, is_key, scope_of
from nnunet_fed.exchange.uploads import Upload

DIGEST = re.compile(r"[0-9a-f]{32}")

Verdict = Literal["send", "stands", "differs", "closed"]
"""The contribution is wanted; these bytes stand; other bytes stand; the round closed without this site."""


@dataclass(frozen=True)
class Offer:
    """What a site is about to contribute to a collective. One of weight 0 has no payload."""

    run: str
    key: str
    site: str
    verb: Verb
    weight: float
    digest: str
    size: int
    held: Held | None = None
    """The newest model that the site has; ``None``: none, or it does not say (version 0.1)."""
    correct: bool = False
    """If other bytes of the site stand, it withdraws what it has told (:mod:`nnunet_fed.coordinator.withdrawals`)."""

    @property
    def scope(self) -> str:
        """Of the collective."""
        return scope_of(self.key)

    @property
    def upload(self) -> Upload:
        """The payload on its way."""
        return Upload(self.run, self.key, self.site, self.digest, self.size)

    def check(self) -> None:
        """Raise :class:`RefusedError` for what no contribution can be: a bad weight, key or digest."""
        check_weight(self.weight)
        if not is_key(self.key):
            raise RefusedError(f"{self.key[:LONGEST_KEY]!r} cannot name a collective.")
        if self.weight > 0 and not DIGEST.fullmatch(self.digest):
            raise RefusedError(f"{self.digest[:64]!r} is no digest of a payload.")


def verdict_of(
    offer: Offer, collective: Collective | None, standing: Contribution | None, participants: Sequence[str] | None
) -> Verdict:
    """What the coordinator answers (rules 2 and 3 of the protocol).

    Args:
        offer: the site's.
        collective: to which it would contribute; ``None``: nobody has yet.
        standing: what the site has contributed to it; ``None``: nothing.
        participants: who was frozen as taking part in its scope; ``None``: nobody yet.

    Raises:
        RefusedError: the other sites have another verb.
    """
    # which verb an open one has is not settled before it closes
    is_over = collective is not None and collective.status not in ("open", "failed")
    if is_over and collective is not None and collective.verb != offer.verb:
        raise RefusedError(f"'{offer.key}' is a {collective.verb} at the other sites, not a {offer.verb}.")
    if standing is not None:
        return "stands" if (standing.digest, standing.weight) == (offer.digest, offer.weight) else "differs"
    # one that failed at its deadline is tried again: the contributions that came in time stand
    if is_over:
        return "closed"
    if participants is not None and offer.site not in participants:
        return "closed"
    return "send"
