"""What a line of the coordinator's log is about, for those who read it by machine (:mod:`nnunet_fed.logs`)."""

from __future__ import annotations

from typing import Any

from nnunet_fed.exchange.keys import round_of


def about(run: str | None = None, key: str | None = None, site: str | None = None) -> dict[str, Any]:
    """The fields of a line, for ``logger.info(..., extra=about(...))``; the round is the key's."""
    facts = {"run": run, "round": None if key is None else round_of(key), "key": key, "site": site}
    return {name: value for name, value in facts.items() if value is not None}
