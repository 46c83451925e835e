"""Keys of collectives: ``SCOPE/NAME``, such as ``round-0003/model``. They are made and read here only.

A *scope* is what its collectives share: the sites that take part in them. A *name* is the method's own affair. Keys
stand in journals and on the wire, so what is made here never changes.
"""

from __future__ import annotations

import re

LONGEST_KEY = 200
MODEL = "model"
"""Name of a round's last mean (rule 5 of the protocol), whose updates ``max_update_norm`` bounds."""

PLANNING = "planning"
"""Scope of a planning."""
VALIDATION = "validation"
"""Scope in which FedSM's sites compare their models after the rounds."""
CROSS_SITE = "cross-site"
"""Scope in which the sites tell how each site's model does; begins those in which they hand a model out."""

_KEY = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)+")
_ROUND = re.compile(r"round-(\d+)")
_FURTHER_SOURCE = re.compile(r"/\d+$")


def is_key(text: str) -> bool:
    """Whether a text can name a collective."""
    return len(text) <= LONGEST_KEY and _KEY.fullmatch(text) is not None


def key_of(scope: str, name: str) -> str:
    """The key of a collective. Instead of a scope a key may stand, and the name then goes on behind its own."""
    return f"{scope}/{name}"


def keys_between(scope: str) -> tuple[str, str]:
    """Two texts between which all keys of a scope lie, and no others."""
    return f"{scope}/", f"{scope}0"  # in ASCII 0 follows the slash


def scope_of(key: str) -> str:
    """The part of a key before the first slash; its participants are frozen together."""
    return key.partition("/")[0]


def name_of(key: str) -> str:
    """The part of a key after the first slash, whichever source it is of; means of one name have one schema."""
    return _FURTHER_SOURCE.sub("", key.partition("/")[2])


def source_key(key: str, number: int) -> str:
    """The key under which the so manyth source, counted from 0, gives something to all.

    It is the key itself for the first one, and another for each that follows once those before it have gone away.
    """
    return key if number == 0 else f"{key}/{number}"


def scope_of_round(number: int) -> str:
    """The scope of a round, counted from 0."""
    return f"round-{number:04d}"


def start_scope(source: int) -> str:
    """Scope in which the initial weights are those of the so manyth site, counted from 0."""
    return "start" if source == 0 else f"start-{source}"


def cross_site_scope(site: str) -> str:
    """Scope in which a site hands its model to the others after the rounds."""
    return f"{CROSS_SITE}-{site}"


def round_of(key: str) -> int | None:
    """The round of a key or a scope, counted from 0; ``None``: it is of no round."""
    found = _ROUND.fullmatch(scope_of(key))
    return None if found is None else int(found[1])


def last_round(key: str) -> int:
    """The round up to which the model of a key or a scope has been trained; -1: it is that of the start."""
    number = round_of(key)
    return -1 if number is None else number


PLANS = key_of(PLANNING, "plans")
"""Key under which the sites tell each other the digests of their plans."""
PUBLISHED = key_of(PLANNING, "published")
"""Key under which the sites leave what they have planned, once the plans of all are equal: with it they are agreed."""
