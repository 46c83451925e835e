"""What is logged for machines: lines of JSON with run, round, key and site, and scalars for TensorBoard."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.files import append_line
from nnunet_fed.strict_json import to_json

FIELDS = ("run", "round", "key", "site")
REPEAT_SECONDS, MOST_KINDS = 60.0, 256
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


class JsonLog:
    """A file of JSON lines, in which what repeats soon is counted and not written, and which is rotated. Thread-safe.

    The next line of the same kind says ``repeated``, how many were left out.

    Args:
        path: the file. It is opened for each line, so it may be moved away at any time.
        largest: bytes from which on another file is begun.
        kept: older files that stay.
    """

    def __init__(self, path: Path, largest: int, kept: int):
        self.path = path
        self._largest = largest
        self._kept = kept
        self._lock = threading.Lock()
        self._written: OrderedDict[Any, tuple[float, int]] = OrderedDict()
        """When a line of each kind was written, and how many have been left out since."""

    def write(self, entry: Mapping[str, Any], kind: Hashable | None = None) -> None:
        """Append an entry, and the time.

        Args:
            entry: values for JSON.
            kind: what repeats if it comes again within :data:`REPEAT_SECONDS`; ``None``: this does not repeat.
        """
        now = time.monotonic()
        with self._lock:
            since, omitted = self._written.get(kind, (-math.inf, 0))
            if kind is not None and now - since < REPEAT_SECONDS:
                self._written[kind] = since, omitted + 1
                return
            repeated = {"repeated": omitted} if omitted else {}
            at = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_line(self.path, to_json({"at": at, **entry, **repeated}), self._largest, self._kept)
            if kind is not None:
                self._written[kind] = now, 0
                self._written.move_to_end(kind)
                if len(self._written) > MOST_KINDS:
                    self._written.popitem(last=False)


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
