"""Call a coordinator until it answers: what another try may mend, and how long to try."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import datetime
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import grpc

from nnunet_fed.errors import RefusedError, UnknownCollectiveError, UnreachableError, WithdrawnError
from nnunet_fed.logs import printable
from nnunet_fed.study.address import readable
from nnunet_fed.transport.channel.options import WITHDRAWN_BY

logger = logging.getLogger(__name__)

T = TypeVar("T")

REFUSALS = {
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,
}
"""Answers that another try would not change."""

PAUSES = (0.2, 30.0)
"""First and longest pause between two tries, in seconds."""


SURE = 3
"""So many tries in a row must fail for the same reason before it is taken for one that stays."""


class DamagedError(Exception):
    """A download did not match its digest."""


class LostCallError(grpc.RpcError):  # type: ignore[misc]  # gRPC has no types
    """A call was neither answered nor ended."""

    def code(self) -> grpc.StatusCode:
        """As of a server that does not answer."""
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        """For the log."""
        return "a call was lost"


def first_reply(replies: Any, seconds: float) -> Any:
    """The first reply of a call that streams.

    Something on the way may answer pings, and serve nobody; and gRPC itself was seen to lose a call when its server
    stopped: it neither ended nor could be cancelled. So nobody but a thread that can be left alone waits in gRPC.

    Args:
        replies: of the call.
        seconds: after which it is given up.

    Raises:
        grpc.RpcError: that of the call, or :class:`LostCallError`.
    """
    answered: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def take() -> None:
        try:
            answered.put((next(replies), None))
        except BaseException as error:
            answered.put((None, error))

    threading.Thread(target=take, name="first reply", daemon=True).start()
    try:
        reply, error = answered.get(timeout=seconds)
    except Empty:
        replies.cancel()
        raise LostCallError from None
    if error is not None:
        raise error
    return reply


def call_with_retries(
    function: Callable[[], T],
    patience: float,
    address: str,
    jitter: random.Random,
    reached: Callable[[], int] = lambda: 0,
    diagnose: Callable[[], str | None] = lambda: None,
) -> T:
    """Try until an answer comes or the patience ends, with growing, jittered pauses.

    Args:
        function: the call.
        patience: seconds from the first failure, or from the last that had brought a transfer further than any before.
            A call may take longer than that, or wake in a process that was suspended: it is tried again nevertheless.
        address: the coordinator's, for what the user reads.
        jitter: source of the pauses' jitter.
        reached: how far a transfer has come. It may fall back, to where the bytes arrived. A try that brought it
            further than any before is not a failure: patience and pauses begin anew.
        diagnose: asked for a reason that lasts (:func:`nnunet_fed.transport.channel.tls.diagnose`) when nobody answers.

    Raises:
        RefusedError: the coordinator refuses; its text says why.
        WithdrawnError: it does, since a planning begins anew.
        UnknownCollectiveError: nobody has contributed to what is asked for.
        UnreachableError: no answer within the patience, or none to be expected.
    """
    end: float | None = None
    pause, furthest, told = PAUSES[0], reached(), ""
    reasons: deque[str | None] = deque(maxlen=SURE)
    while True:
        try:
            return function()
        except (grpc.RpcError, DamagedError, ValueError) as error:
            code = error.code() if isinstance(error, grpc.RpcError) else grpc.StatusCode.DATA_LOSS
            details = "a transfer was damaged"
            if isinstance(error, grpc.RpcError):
                details = readable(printable(str(error.details())))
            if code == grpc.StatusCode.NOT_FOUND:
                raise UnknownCollectiveError(details) from None
            if code in REFUSALS:
                beside = dict(error.trailing_metadata() or ()) if isinstance(error, grpc.RpcError) else {}
                if WITHDRAWN_BY in beside:
                    raise WithdrawnError(details, str(beside[WITHDRAWN_BY])) from None
                raise RefusedError(details) from None
            reasons.append(diagnose() if code == grpc.StatusCode.UNAVAILABLE else None)
            full = code == grpc.StatusCode.RESOURCE_EXHAUSTED
            trouble = f"takes nothing more at present: {details}" if full else f"does not answer ({details})"
            now = reached()
            if end is None or now > furthest:
                end, pause, furthest = time.monotonic() + patience, PAUSES[0], max(now, furthest)
            remaining = end - time.monotonic()
            if reasons[-1] is not None and (remaining <= 0 or reasons.count(reasons[-1]) == SURE):
                raise UnreachableError(reasons[-1]) from None
            if remaining <= 0:
                raise UnreachableError(
                    f"The coordinator at {address} {trouble}; gave up after {patience / 60:g} minutes. "
                    + ("" if full else "Is it running, and is the address in site.toml right?")
                ) from None
            if str(code) != told:
                told = str(code)
                until = datetime.fromtimestamp(time.time() + remaining).strftime("%Y-%m-%d %H:%M:%S")
                logger.warning("the coordinator at %s %s; trying until %s", address, trouble, until)
            time.sleep(min(remaining, pause * jitter.uniform(0.5, 1.0)))
            pause = min(2 * pause, PAUSES[1])
