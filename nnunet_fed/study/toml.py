"""Writing TOML, which the standard library only reads. Source: ours."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any


def to_toml(values: Mapping[str, Any], within: str = "") -> str:
    """JSON values as TOML: flat ones, then a table for each mapping; ``None`` is left out.

    Args:
        values: by key.
        within: name of the table that they are in.
    """
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    # TOML reads JSON's numbers, strings and lists of them, but no pair of surrogates
    lines = [
        f"{_toml_key(key)} = {json.dumps(value, ensure_ascii=False)}\n"
        for key, value in values.items()
        if value is not None and key not in tables
    ]
    for key, table in tables.items():
        name = within + _toml_key(key)
        lines.append(f"\n[{name}]\n{to_toml(table, name + '.')}")
    return "".join(lines)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)
