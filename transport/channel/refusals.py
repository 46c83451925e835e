"""Refusals: what a caller reads, and a line in the log that nobody can make many of."""

from __future__ import annotations

import errno
import logging
import sqlite3
import threading
import time
from collections import OrderedDict
from typing import Any, NoReturn

import grpc

from nnunet_fed.errors import FederationError, NoRoomError, NotYetError, WithdrawnError
from nnunet_fed.exchange.uploads import InterruptedUploadError
from nnunet_fed.logs import printable
from nnunet_fed.study.address import readable
from nnunet_fed.transport.channel.options import WITHDRAWN_BY

logger = logging.getLogger(__name__)

LINES, LINE_SECONDS = 20, 10.0
"""So many lines of one caller are logged at once, and later one in so many seconds."""
CALLERS = 256
"""Of so many callers the lines are counted; of more, the one that was heard of least recently is forgotten."""


class SparingLog:
    """Logs warnings about callers; what one of them makes too many of is counted instead. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callers: OrderedDict[str, tuple[float, float, int]] = OrderedDict()
        """Lines that are left, since when, and how many were left out since the last line."""

    def warn(self, caller: str, text: str) -> None:
        """Log a sentence about a caller, unless there are too many."""
        now = time.monotonic()
        with self._lock:
            left, since, omitted = self._callers.pop(caller, (float(LINES), now, 0))
            left = min(float(LINES), left + (now - since) / LINE_SECONDS)
            shown = left >= 1
            self._callers[caller] = (left - 1, now, 0) if shown else (left, now, omitted + 1)
            if len(self._callers) > CALLERS:
                self._callers.popitem(last=False)
        if shown:
            more = f" ({omitted} more lines about this caller were left out)" if omitted else ""
            logger.warning("%s%s", printable(text), more)


SPARING_LOG = SparingLog()


def refuse(
    context: grpc.ServicerContext, text: str, code: grpc.StatusCode = grpc.StatusCode.FAILED_PRECONDITION
) -> NoReturn:
    """End a call with a sentence for the caller, which is logged here."""
    SPARING_LOG.warn(caller_of(context), f"refused {readable(context.peer())}: {text}")
    context.abort(code, text)
    raise AssertionError("abort does not return")


def caller_of(context: grpc.ServicerContext) -> str:
    """Whose lines are counted together: those of a certificate, or of an address without its port."""
    return str(context.auth_context().get("x509_pem_cert") or context.peer().rpartition(":")[0])


class Refusals:
    """Turn errors into gRPC's; their text is for the reader at the caller's.

    Args:
        context: of the call.
        disk: what may be full, as a sentence begins.
    """

    def __init__(self, context: grpc.ServicerContext, disk: str):
        self._context = context
        self._disk = disk

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, WithdrawnError):  # a refusal to version 0.1, which does not read what goes with it
            self._context.set_trailing_metadata(((WITHDRAWN_BY, error.site),))
        if isinstance(error, NoRoomError | NotYetError):
            refuse(self._context, str(error), grpc.StatusCode.RESOURCE_EXHAUSTED)
        elif isinstance(error, FederationError):
            refuse(self._context, str(error))
        elif isinstance(error, InterruptedUploadError):
            refuse(self._context, "This upload goes on elsewhere.", grpc.StatusCode.ABORTED)
        elif _is_full(error):
            text = f"{self._disk} is full ({error}). Free some of it there; the sites go on by themselves."
            refuse(self._context, text, grpc.StatusCode.RESOURCE_EXHAUSTED)
        elif isinstance(error, sqlite3.Error | OSError):
            logger.error("%s cannot be used: %s", self._disk, error)
            refuse(self._context, f"{self._disk} cannot be used at present.", grpc.StatusCode.UNAVAILABLE)


def _is_full(error: BaseException | None) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, sqlite3.OperationalError) and "full" in str(error)
