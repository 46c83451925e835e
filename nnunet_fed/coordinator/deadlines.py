"""How long an open collective has waited: a span of a clock that only runs, in the journal across restarts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from nnunet_fed.coordinator.store import Collective, Store

Clock = Callable[[], float]
"""Seconds since whenever."""


class RunningClock:
    """Seconds for which this process has run: no wall clock that is set is in it, and no time in which it was stopped.

    A suspended machine, or a stopped process, could not have heard the sites either. Somebody has to look at it more
    often than every :data:`LONGEST` seconds.
    """

    LONGEST = 15.0
    """Seconds for which the time between two looks counts at most."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds, self._last = 0.0, time.monotonic()

    def __call__(self) -> float:
        """The seconds."""
        with self._lock:
            now = time.monotonic()
            self._seconds += min(now - self._last, self.LONGEST)
            self._last = now
            return self._seconds


class Deadlines:
    """The spans of open collectives. Called under the store's lock.

    Args:
        store: keeps across restarts how long each has waited.
        clock: tells the seconds.
        span: seconds that a collective may wait.
    """

    def __init__(self, store: Store, clock: Clock, span: Callable[[Collective], float]):
        self._store = store
        self._clock = clock
        self._span = span
        self._since: dict[tuple[str, str], float] = {}
        """By run and key: when an open collective would have begun to wait by this process's clock."""

    def left(self, collective: Collective) -> float:
        """Seconds until the collective closes without those that are missing; at most 0: it is due."""
        return self._span(collective) - self._waited(collective)

    def _waited(self, collective: Collective) -> float:
        key = (collective.run, collective.key)
        since = self._since.setdefault(key, self._clock() - collective.waited)
        return self._clock() - since

    def restart(self, collective: Collective) -> None:
        """Give it the whole time again."""
        self._since[collective.run, collective.key] = self._clock()
        collective.waited = 0.0

    def note(self, collectives: Iterable[Collective], exactly: bool = False) -> None:
        """Journal how long open collectives have waited.

        Args:
            collectives: all that are open; the others are forgotten.
            exactly: all of them, and not only where the journal is a hundredth of the span behind, or a minute.
        """
        late = []
        waiting: dict[tuple[str, str], float] = {}
        for collective in collectives:
            waited = self._waited(collective)
            if exactly or waited - collective.waited >= min(60.0, self._span(collective) / 100):
                late.append((collective, waited))
            key = (collective.run, collective.key)
            waiting[key] = self._since[key]
        self._since = waiting
        if late:
            with self._store.transaction():
                for collective, waited in late:
                    self._store.set_waited(collective.run, collective.key, waited)
