"""Log lines that a machine can read: a JSON object each, with run, round, key and site where there are any."""

from __future__ import annotations

import json
import logging
import re
from datetime import datetime, timezone
from typing import Any

FIELDS = ("run", "round", "key", "site")
ROUND = re.compile(r"round-(\d+)")


def about(run: str | None = None, key: str | None = None, site: str | None = None) -> dict[str, Any]:
    """What a line is about, for ``logger.info(..., extra=about(...))``; the round is the key's."""
    found = ROUND.match(key or "")
    facts = {"run": run, "round": int(found[1]) if found else None, "key": key, "site": site}
    return {name: value for name, value in facts.items() if value is not None}


class JsonLines(logging.Formatter):
    """``at`` (UTC), ``level``, ``logger``, ``message``, what :func:`about` gave, and ``error`` (a traceback)."""

    def format(self, record: logging.LogRecord) -> str:
        """See :class:`logging.Formatter`."""
        at = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line = {"at": at, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        line.update({name: getattr(record, name) for name in FIELDS if hasattr(record, name)})
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_as_json() -> None:
    """Let all handlers of the root logger write JSON lines."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonLines())
