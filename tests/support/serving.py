"""A coordinator on loopback, communicators at it, and what they say and leave."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_fed.coordinator.coordinator import SPOOL_QUOTA, Coordinator
from nnunet_fed.coordinator.store import Store
from nnunet_fed.exchange.communicator import Array
from nnunet_fed.exchange.outgoing_log import Outgoing
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.site import Site
from nnunet_fed.transport.coordinator.server import CoordinatorServer
from nnunet_fed.transport.site.client import GrpcCommunicator


def make_study(sites: Sequence[str] = ("a", "b"), **settings: Any) -> Federation:
    defaults: dict[str, Any] = {"name": "study", "method": {"name": "fedavg"}, "rounds": 20}
    return Federation.model_validate({**defaults, "sites": tuple(sites), **settings})


class Served:
    """A coordinator on loopback, and communicators at it; with TLS if it gets ``keys``."""

    def __init__(
        self, study: Federation, folder: Path, stack: ExitStack, spool_quota: int = SPOOL_QUOTA,
        address: str = "127.0.0.1:0", **tls: Any,
    ):  # fmt: skip
        self.study = study
        self.coordinator = Coordinator(study, Store(folder), spool_quota=spool_quota)
        stack.callback(self.coordinator.close)
        self.server = CoordinatorServer(self.coordinator, address, insecure=not tls, **tls)
        self.server.start()
        stack.callback(self.server.stop, 0)
        self._stack = stack

    def stop(self) -> None:
        """Stop, so that another coordinator can go on with the folder."""
        self.server.stop(0)
        self.coordinator.close()

    def settings(self, site: str, files: Path | None = None, **settings: Any) -> Site:
        """Of a site; with TLS if it has a folder with files for it."""
        names = {"certificate": "certificate.pem", "key": "key.pem", "ca": "ca.pem"}
        tls = {key: files / name for key, name in names.items()} if files else {"insecure": True}
        given = {"coordinator": self.server.address, "connect_minutes": 0.05, **tls, **settings}
        return Site.model_validate({"name": site, **given})

    def seat(
        self,
        site: str,
        purpose: str = "training",
        outgoing: Outgoing = lambda entry: None,
        files: Path | None = None,
        tls: dict[str, Any] | None = None,
        corrects: bool = False,
        **join: Any,
    ) -> GrpcCommunicator:
        communicator = GrpcCommunicator(self.settings(site, files, **(tls or {})), outgoing, corrects)
        self._stack.callback(communicator.close)
        digest = {"digest": self.study.digest_of_fold(self.study.fold), "configuration": "3d_fullres", "trainer": "T"}
        communicator.join(purpose, **({**digest, **join} if purpose == "training" else join))
        return communicator


Serve = Callable[..., Served]


def together(*calls: Callable[[], object]) -> list[object]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def tensors_of(site: str) -> dict[str, Array]:
    rng = np.random.default_rng(ord(site))
    return {"w": rng.normal(size=(70_000, 7)).astype(np.float32), "b": rng.normal(size=()).astype(np.float64)}


def lines(path: Path, *what: str) -> list[dict[str, Any]]:
    """Of an ``outgoing.jsonl``, those of some kinds or all."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return [entry for entry in entries if not what or entry["what"] in what]
