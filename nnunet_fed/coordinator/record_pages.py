"""A coordinator's record, as its readers put it together page by page: no message is too large. Source: ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIRST_PAGE = "0-0"
"""Name of the first page; each tells the name of the next one."""


def add_page(record: dict[str, Any], page: Mapping[str, Any]) -> None:
    """Put a later page behind those before."""
    for run, told in page["runs"].items():
        earlier = record["runs"].get(run, {}).get("collectives", [])
        record["runs"][run] = {**told, "collectives": [*earlier, *told["collectives"]]}
    record["events"] += page["events"]
