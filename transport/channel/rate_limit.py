"""A hospital's line is not for models alone: a limit to what passes in a second. Source: ours."""

from __future__ import annotations

import threading
import time


class RateLimit:
    """Holds up who passes data, all together, so that a rate is not exceeded in the long run. Thread-safe.

    Args:
        megabytes_per_second: the rate, in 10^6 bytes; ``None``: any.
        stopped: once set, nobody is held up any more.
    """

    def __init__(self, megabytes_per_second: float | None, stopped: threading.Event):
        self._rate = None if megabytes_per_second is None else 1e6 * megabytes_per_second
        self._stopped = stopped
        self._lock = threading.Lock()
        self._free_at = 0.0

    def passed(self, number: int) -> None:
        """So many bytes have passed: return when the next may."""
        if self._rate is None:
            return
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + number / self._rate
            pause = self._free_at - time.monotonic()
        self._stopped.wait(max(0.0, pause))
