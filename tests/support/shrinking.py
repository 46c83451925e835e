"""A federation out of which a site is taken between two collectives: at a coordinator, and among threads.

The coordinator is restarted with the smaller study, as an administrator does it. The threads are what is right: from
that collective on they are those of the sites that remain.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from serving import make_study

from nnunet_fed.coordinator.coordinator import Coordinator
from nnunet_fed.coordinator.store import Collective, Store
from nnunet_fed.coordinator.verdict import Offer
from nnunet_fed.errors import DeadlineError, NoContributionError, RefusedError, RoundClosedError
from nnunet_fed.exchange.communicator import Array, LocalCommunicator, LocalFederation, Verb
from nnunet_fed.exchange.payload import Tensors, decode, encode, measure

When = Literal["before it contributes", "after it has contributed"]
Part = Callable[[Any], Any]
"""What a site does: with its communicator."""


class Gone(Exception):  # noqa: N818
    """What the site that is taken out ends with."""


class ShrinkingThreads(LocalFederation):
    """Which sites each collective is over follows from its place among those of an undisturbed run.

    Args:
        sites: all.
        before: keys of the collectives in which the removed site still is; ``None``: all.
        removed: the site.
    """

    def __init__(self, sites: Sequence[str], before: Sequence[str] | None = None, removed: str = ""):
        super().__init__(sites, deadline=20.0)
        self.keys: list[str] = []
        self._before, self._removed = before, removed

    def exchange(self, key: str, site: str, value: Any) -> dict[str, Any]:
        """Over all sites, or over those that remain."""
        there = list(self.sites)
        if self._before is not None and key not in self._before:
            there.remove(self._removed)
            if site == self._removed:
                raise Gone
        with self._changed:
            if key not in self.keys:
                self.keys.append(key)
            contributions = self._contributions.setdefault(key, {})
            contributions[site] = value
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: len(contributions) == len(there), self.deadline):
                raise DeadlineError(f"{key} still misses somebody of {there}; there are {list(contributions)}.")
            return {name: contributions[name] for name in there}

    def run_parts(self, part: Part) -> dict[str, Any]:
        """What the part of each site returns that is there to the end."""
        return run_all(self.sites, lambda site: part(LocalCommunicator(self, site)))


class ShrinkingCoordinator:
    """A coordinator that is restarted without a site, at a chosen collective.

    Args:
        folder: of its state.
        sites: all.
        key: of the collective.
        removed: the site.
        when: it goes, of this collective's contributions.
    """

    def __init__(self, folder: Path, sites: Sequence[str], key: str, removed: str, when: When):
        self.sites, self.key, self.removed, self.when = tuple(sites), key, removed, when
        self._folder = folder
        self._study = make_study(sites, keep_rounds=100)
        self.coordinator = Coordinator(self._study, Store(folder))
        for site in sites:
            self.run = self.coordinator.join(site, "training", self._study.digest, "3d_fullres", "T")
        self._at_the_door = threading.Semaphore(0)
        self._open = threading.Event()

    def pass_door(self, key: str, site: str) -> None:
        """Wait at the chosen collective until the coordinator has been restarted."""
        if key == self.key and not self._open.is_set() and not (site == self.removed and self.gives):
            self._at_the_door.release()
            self._open.wait(20)

    @property
    def gives(self) -> bool:
        """Whether the removed site contributes first."""
        return self.when == "after it has contributed"

    def has_given(self) -> None:
        """The removed site has contributed, and ends."""
        self._at_the_door.release()
        raise Gone

    def run_parts(self, part: Part) -> dict[str, Any]:
        """What the part of each site returns that is there to the end."""
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(run_all, self.sites, lambda site: part(Seat(self, site)))
            for _ in self.sites:
                if not self._at_the_door.acquire(timeout=20):
                    self._open.set()
                    running.result()
                    raise AssertionError(f"not all sites have come to {self.key}")
            self.coordinator.close()
            remaining = [site for site in self.sites if site != self.removed]
            self.coordinator = Coordinator(make_study(remaining, keep_rounds=100), Store(self._folder))
            self._open.set()
            return running.result()


class Seat:
    """The collectives at a :class:`ShrinkingCoordinator`, as the communicator over gRPC has them."""

    def __init__(self, at: ShrinkingCoordinator, site: str):
        self._at, self.site, self.sites = at, site, at.sites

    def mean(self, key: str, tensors: Tensors, weight: float, exact: bool = False) -> dict[str, Array]:
        payload = b"".join(encode(tensors)) if weight else b""
        return decode(self._collective(key, "mean", payload, weight))

    def sum(self, key: str, array: Array) -> Array:
        return decode(self._collective(key, "sum", b"".join(encode({"value": np.asarray(array)}))))["value"]

    def gather(self, key: str, value: Any) -> dict[str, Any]:
        gathered: dict[str, Any] = json.loads(self._collective(key, "gather", json.dumps(value).encode()))
        return gathered

    def newest(self, name: str) -> str | None:
        return self._at.coordinator.newest(self._at.run, name)

    def fetch(self, key: str) -> dict[str, Array]:
        return decode(self._result(key))

    def _collective(self, key: str, verb: Verb, payload: bytes, weight: float = 1.0) -> bytes:
        self._at.pass_door(key, self.site)
        offer = Offer(self._at.run, key, self.site, verb, weight, *(measure([payload]) if payload else ("", 0)))
        try:
            verdict = self._at.coordinator.take(offer, 0, [payload])
        except RefusedError as error:
            if self.site == self._at.removed and f"Site '{self.site}' is not in the study" in str(error):
                raise Gone from None
            raise
        if key == self._at.key and self.site == self._at.removed and self._at.gives:
            self._at.has_given()
        if verdict == "closed":
            raise RoundClosedError(key)
        return self._result(key)

    def _result(self, key: str) -> bytes:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            collective: Collective | None = self._at.coordinator.wait(self._at.run, key, 0.5)
            assert collective is not None
            if collective.status == "empty":
                raise NoContributionError(key)
            if collective.status == "closed":
                return self._at.coordinator.result_file(collective).read_bytes()
            assert collective.status == "open", collective.error
        raise DeadlineError(f"{key} waits for {self._at.coordinator.outlook(collective).missing}")


def run_all(sites: Sequence[str], part: Callable[[str], Any]) -> dict[str, Any]:
    """What each site's part returns; nothing of one that has gone."""
    with ThreadPoolExecutor(len(sites)) as pool:
        futures = {site: pool.submit(part, site) for site in sites}
    errors = {site: future.exception() for site, future in futures.items()}
    for error in sorted(filter(None, errors.values()), key=lambda error: isinstance(error, DeadlineError)):
        if not isinstance(error, Gone):
            raise error
    return {site: future.result() for site, future in futures.items() if errors[site] is None}
