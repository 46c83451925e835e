"""A coordinator without a network, and a clock that a test turns."""

from __future__ import annotations

import time as real_time
from pathlib import Path
from typing import Any

import numpy as np
from serving import make_study

from nnunet_fed.coordinator.coordinator import Coordinator
from nnunet_fed.coordinator.members import Purpose
from nnunet_fed.coordinator.opening import open_attempt
from nnunet_fed.coordinator.store import Collective, Store
from nnunet_fed.coordinator.verdict import Offer, Verdict
from nnunet_fed.exchange.communicator import Held, Verb
from nnunet_fed.exchange.payload import Tensors, decode, encode, measure
from nnunet_fed.study.federation import canonical_json


class Clock:
    """Stands for the module ``time``, and for the clock of the deadlines: both pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1e9
        self.stamp = 0.0
        """What somebody has set the wall clock to, beside what has passed."""

    def time(self) -> float:
        self.now += 1e-6  # what happens later has a later stamp
        return self.now + self.stamp

    def running(self) -> float:
        return self.now

    monotonic = staticmethod(real_time.monotonic)


class Desk:
    """Calls a coordinator as the server would, in the name of any site, in one run."""

    def __init__(self, folder: Path, clock: Clock, **study: Any):
        self.folder, self.clock, self.run = folder, clock, ""
        self.held: dict[str, Held] = {}
        """What each site tells of the model that it holds."""
        self.correcting: set[str] = set()
        """Sites that withdraw what they told, if they tell something else now."""
        self._settings: dict[str, Any] = {}
        self.open(**study)

    def open(self, spool_quota: int = 1 << 24, **study: Any) -> None:
        """Start a coordinator; after :meth:`close` one that goes on."""
        self._settings |= study
        self.study = make_study(**self._settings)
        self.coordinator = Coordinator(self.study, Store(self.folder), spool_quota, clock=self.clock.running)

    def close(self) -> None:
        self.coordinator.close()

    def new_attempt(self) -> None:
        """While no coordinator runs."""
        store = Store(self.folder)
        open_attempt(store)
        store.close()

    def join(self, *sites: str, purpose: Purpose = "training", **more: Any) -> str:
        about: dict[str, Any] = {"digest": self.study.digest, "configuration": "3d_fullres", "trainer": "T"}
        for site in sites:
            self.run = self.coordinator.join(site, purpose, **({**about, **more} if purpose == "training" else more))
        return self.run

    def tell(self, site: str, key: str, weight: float, verb: Verb = "mean") -> Verdict:
        """Offer without a payload."""
        return self.coordinator.offer(Offer(self.run, key, site, verb, weight, "", 0, self.held.get(site)))

    def give(self, site: str, key: str, value: float | Tensors, weight: float = 1.0, verb: Verb = "mean") -> Verdict:
        tensors = value if isinstance(value, dict) else {"w": np.float32([value])}
        verdict = self.upload(site, key, b"".join(encode(tensors)), weight, verb)
        assert verdict is not None
        return verdict

    def tell_value(self, site: str, key: str, value: Any) -> Verdict:
        """Contribute to a gather."""
        verdict = self.upload(site, key, canonical_json(value), verb="gather")
        assert verdict is not None
        return verdict

    def upload(
        self, site: str, key: str, payload: bytes, weight: float = 1.0, verb: Verb = "mean",
        arrives: bytes | None = None, position: int = 0,
    ) -> Verdict | None:  # fmt: skip
        """Offer a payload, of which something else may arrive."""
        offer = self.offer_of(site, key, payload, weight, verb)
        return self.coordinator.take(offer, position, [payload if arrives is None else arrives])

    def offer_of(self, site: str, key: str, payload: bytes, weight: float = 1.0, verb: Verb = "mean") -> Offer:
        return Offer(
            self.run, key, site, verb, weight, *measure([payload]), self.held.get(site), site in self.correcting
        )

    def collective(self, key: str) -> Collective:
        """As it is now: what is due is closed."""
        found = self.coordinator.wait(self.run, key, 0)
        assert found is not None
        return found

    def all_give(self, key: str, values: dict[str, float]) -> Any:
        """Let sites contribute to a mean, and take its result; returns the tensor."""
        for site, value in values.items():
            self.give(site, key, value)
        result, digest = self.result(key), self.collective(key).digest
        assert digest is not None
        self.held.update({site: Held(key, digest) for site in values})
        return result

    def result(self, key: str) -> Any:
        """The tensor of a closed mean."""
        collective = self.collective(key)
        assert collective.status == "closed"
        return decode(self.coordinator.result_file(collective).read_bytes())["w"]

    def missing(self, key: str) -> list[str]:
        return list(self.coordinator.outlook(self.collective(key)).missing)

    def pass_deadline(self) -> None:
        self.clock.now += 60 * max(self.study.deadline_minutes, self.study.planning_deadline_minutes) + 1

    def events(self, site: str | None = None) -> list[str]:
        return [event["text"] for event in self.coordinator.status(record=True)["events"] if event["site"] == site]

    def spooled(self) -> list[Path]:
        return sorted((self.folder / "spool").iterdir())
