"""On what the contributions to one collective have to agree: its verb, and the schema of its tensors. Pure.

No site lays that down for the others by being the first: most sites do. Source: ours.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from nnunet_fed.coordinator.store import Ballot


def elected(cast: Mapping[str, Ballot]) -> Ballot:
    """What most sites have: first the verb, then, among the sites with it that sent tensors, the schema.

    Of equally many sites those count of which one is the first by name: it publishes the initial weights.

    Args:
        cast: by site; at least one.
    """
    verb = _of_most({site: ballot.verb for site, ballot in cast.items()})
    schemas = {site: b.schema for site, b in cast.items() if b.verb == verb and b.schema is not None}
    return Ballot(verb, _of_most(schemas) if schemas else None)


def agrees(ballot: Ballot, winner: Ballot) -> bool:
    """Whether a contribution is of the elected kind; one without tensors has no schema that could differ."""
    return ballot.verb == winner.verb and ballot.schema in (None, winner.schema)


def can_win(site: str, ballot: Ballot, cast: Mapping[str, Ballot], missing: Iterable[str]) -> bool:
    """Whether a contribution would be of the elected kind if all sites that are missing were of its kind, too."""
    return agrees(ballot, elected({**dict.fromkeys(missing, ballot), site: ballot, **cast}))


def _of_most(told: Mapping[str, str]) -> str:
    camps: dict[str, list[str]] = defaultdict(list)
    for site, what in told.items():
        camps[what].append(site)
    return min(camps, key=lambda what: (-len(camps[what]), min(camps[what])))
