"""Keys of collectives: ``SCOPE/NAME``, such as ``round-0003/model``."""

from __future__ import annotations

import re

KEY = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)+")
LONGEST_KEY = 200
MODEL = "model"
"""Name of a round's last mean (rule 5 of the protocol), whose updates ``max_update_norm`` bounds."""


def scope_of(key: str) -> str:
    """The part of a key before the first slash; its participants are frozen together."""
    return key.partition("/")[0]


def name_of(key: str) -> str:
    """The part of a key after the first slash; means of one name have one schema."""
    return key.partition("/")[2]
