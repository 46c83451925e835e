"""What is logged for machines: lines of JSON with run, round, key and site, and scalars for TensorBoard."""

from __future__ import annotations

import logging
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.strict_json import to_json

FIELDS = ("run", "round", "key", "site")
FLUSH_SECONDS = 10
"""What is lost of TensorBoard's scalars at most if the process is killed."""


def printable(text: str) -> str:
    """A text in one line: what would move a terminal's cursor, begin a line or turn the text round is written out.

    What other sites and the network say ends in logs and on terminals.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class PlainLines(logging.Formatter):
    """Lines for people; each record's message is one, whoever's words it holds."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """See :class:`logging.Formatter`."""
        record.message = printable(record.message)
        return super().formatMessage(record)


class JsonLines(logging.Formatter):
    """``at`` (UTC), ``level``, ``logger``, ``message``, what :data:`FIELDS` it has, and ``error`` (a traceback)."""

    def format(self, record: logging.LogRecord) -> str:
        """See :class:`logging.Formatter`."""
        at = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line = {"at": at, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        line.update({name: getattr(record, name) for name in FIELDS if hasattr(record, name)})
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return to_json(line)


def log_as_json() -> None:
    """Let all handlers of the root logger write JSON lines."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonLines())


def open_tensorboard(folder: Path, purge_step: int | None = None) -> Any:
    """A writer of TensorBoard's scalars.

    Args:
        folder: for the event files.
        purge_step: TensorBoard hides what earlier files hold from this step on, as after a continued training.

    Raises:
        ConfigurationError: tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ConfigurationError(
            "TensorBoard scalars are asked for, but tensorboardX is not installed: install it with 'pip install "
            "nnunet_fed[tensorboard]', or take 'tensorboard = true' out of site.toml (at the coordinator: leave out "
            "--tensorboard)."
        ) from None
    return SummaryWriter(str(folder), purge_step=purge_step, flush_secs=FLUSH_SECONDS)
