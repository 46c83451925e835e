"""Transfers between peers that do not go on are given up. Source: ours."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STALL_SECONDS = 60.0
"""A transfer in which nothing has moved for so long is given up (notes' 5.5)."""
GLANCE_SECONDS = 0.2


@contextmanager
def given_up_if_stalled(
    cancel: Callable[[], object], reached: Callable[[], int], stopped: threading.Event, seconds: float = STALL_SECONDS,
    revoked: Callable[[], bool] = lambda: False,
) -> Iterator[None]:  # fmt: skip
    """Cancel what goes on within if nothing has moved for so many seconds, or once ``stopped`` or ``revoked`` says."""
    done = threading.Event()

    def watch() -> None:
        last, since = reached(), time.monotonic()
        while not done.wait(GLANCE_SECONDS):
            if (now := reached()) != last:
                last, since = now, time.monotonic()
            if stopped.is_set() or revoked() or time.monotonic() - since > seconds:
                cancel()
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()
