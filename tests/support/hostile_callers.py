"""Callers who mean no good, as somebody has them who uses other software than ours, and a campaign of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from nnunet_fed.certificates.authority import Authority
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.site import Site
from nnunet_fed.transport.proto import check_pb2
from nnunet_fed.transport.proto import federation_pb2 as pb
from nnunet_fed.transport.proto.federation_pb2_grpc import CoordinatorStub
from nnunet_fed.transport.site.client import GrpcCommunicator

HOSTS = ["localhost", "127.0.0.1"]


class Certified:
    """An authority, and folders with the files of a coordinator, two sites and those who do not belong.

    Args:
        folder: for all of them.
    """

    def __init__(self, folder: Path):
        self.authority = Authority.create(folder / "study", "study")
        self.coordinator = self.authority.site("coordinator", HOSTS)
        self.of = {name: self.authority.site(name) for name in ("a", "b", "member", "foreign", "revoked")}
        self.authority.revoke("revoked")
        self.deny_list = self.authority.folder / "revoked.txt"

    @contextmanager
    def channel(self, address: str, name: str, **options: int) -> Iterator[grpc.Channel]:
        """A connection of its own with the certificate of this name."""
        ca, key, certificate = (
            (self.of[name] / file).read_bytes() for file in ("ca.pem", "key.pem", "certificate.pem")
        )
        credentials = grpc.ssl_channel_credentials(ca, key, certificate)
        given = [("grpc.use_local_subchannel_pool", 1), *((f"grpc.{key}", value) for key, value in options.items())]
        with grpc.secure_channel(address, credentials, options=given) as channel:
            yield channel


class Held:
    """Calls of which the first messages come, and then nothing, until they are let go."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self.calls: list[grpc.Future] = []

    def begin(self, channel: grpc.Channel, method: str, *messages: bytes) -> grpc.Future:
        """Begin a call; every method takes its messages as a stream, as far as HTTP/2 can tell."""

        def sent() -> Iterator[bytes]:
            yield from messages
            self._over.wait()

        self.calls.append(channel.stream_unary(method).future(sent()))
        return self.calls[-1]

    def let_go(self) -> None:
        """End them all."""
        self._over.set()
        for call in self.calls:
            call.cancel()


# ----------------------------------------------------------------------------------------------------------- a campaign

STUDY = """
name = "hostile"
sites = ["a", "b", "member"]
rounds = 9999
min_sites = 2
[method]
name = "fedavg"
"""
METHODS = [
    *(f"/nnunet_fed.v1.Coordinator/{method.name}" for method in pb.DESCRIPTOR.services_by_name["Coordinator"].methods),
    *(f"/nnunet_fed.v1.Check/{method.name}" for method in check_pb2.DESCRIPTOR.services_by_name["Check"].methods),
    "/grpc.health.v1.Health/Check",
    "/nnunet_fed.v1.Coordinator/Nothing",
]
WHO = ("revoked", "foreign", "member")
CONNECTIONS = 8
BOMB = bytes(1 << 26)
SPAWN = multiprocessing.get_context("spawn")  # gRPC and fork do not mix


def no_bytes(channels: list[grpc.Channel]) -> None:
    """Calls whose message never comes, begun again as they end."""
    held = Held()
    while True:
        for channel in channels:
            for method in METHODS:
                held.begin(channel, method)
        time.sleep(1)
        for call in held.calls:
            call.cancel()
        held.calls.clear()


def slow_bytes(channels: list[grpc.Channel]) -> None:
    """Uploads of which a message of a byte comes each second."""
    offer = pb.OfferRequest(run="r", key="round-0000/model", site="member", verb="mean", weight=1, digest="0" * 32)
    offer.size = 1 << 20
    first, rest = (part.SerializeToString() for part in (pb.UploadChunk(offer=offer), pb.UploadChunk(data=b"x")))

    def drip() -> Iterator[bytes]:
        yield first
        while True:
            time.sleep(1)
            yield rest

    while True:
        calls = [channel.stream_unary(method).future(drip()) for channel in channels for method in METHODS]
        time.sleep(5)
        for call in calls:
            call.cancel()


def random_bytes(channels: list[grpc.Channel]) -> None:
    """Messages of random bytes, one after the other."""
    chance = random.Random(0)
    while True:
        for channel in channels:
            for method in METHODS:
                with suppress(grpc.RpcError):
                    channel.stream_unary(method)(iter([chance.randbytes(chance.randrange(1, 2000))]), timeout=5)


def compressed(channels: list[grpc.Channel]) -> None:
    """Messages of 65 kB that become 64 MiB."""
    while True:
        for channel in channels:
            for method in METHODS:
                with suppress(grpc.RpcError):
                    channel.unary_unary(method)(BOMB, compression=grpc.Compression.Gzip, timeout=20)


def many_keys(channels: list[grpc.Channel]) -> None:
    """Ten thousand keys, of rounds and of what nobody knows, each with a part of its payload; then the same again."""
    stub, run, first = CoordinatorStub(channels[0]), "r", pb.OfferRequest(verb="mean", weight=1, size=1 << 20)
    with suppress(grpc.RpcError):
        digest = json.loads(stub.Status(pb.StatusRequest(), timeout=20).status)["digest"]
        run = f"{digest[:12]}-3d_fullres-T-fold_0-1"
    while True:
        for number in range(10_000):
            key = (f"round-{number:04d}/model", f"round-0001/n-{number}", f"scope-{number}/model")[number % 3]
            offer = pb.OfferRequest(run=run, key=key, site="member", digest=f"{number:032x}")
            offer.MergeFrom(first)
            messages = (pb.UploadChunk(offer=offer), pb.UploadChunk(data=bytes(1000)))
            with suppress(grpc.RpcError):
                channels[number % CONNECTIONS].stream_unary("/nnunet_fed.v1.Coordinator/Upload")(
                    iter([message.SerializeToString() for message in messages]), timeout=20
                )


ATTACKS: dict[str, Callable[[list[grpc.Channel]], None]] = {
    "no bytes": no_bytes,
    "slow bytes": slow_bytes,
    "random bytes": random_bytes,
    "compressed": compressed,
    "many keys": many_keys,
}
"""By name. Each goes on until its process is ended."""


def _attack(name: str, who: str, address: str, folder: Path) -> None:
    os.nice(19)  # in earnest it runs on another machine
    certified = Certified.__new__(Certified)
    certified.of = {who: folder}
    with ExitStack() as stack:
        channels = [stack.enter_context(certified.channel(address, who)) for _ in range(CONNECTIONS)]
        ATTACKS[name](channels)


def _silence(address: str, number: int) -> None:
    os.nice(19)
    host, _, port = address.rpartition(":")
    while True:
        with ExitStack() as stack:
            for _ in range(number):
                with suppress(OSError):
                    stack.enter_context(socket.create_connection((host, int(port)), 5))
            time.sleep(5)


@contextmanager
def under_attack(name: str, who: str, address: str, certified: Certified) -> Iterator[None]:
    """One of :data:`ATTACKS` from a process of its own; ``connections``: 500 of them that say nothing."""
    target: Callable[..., None] = _attack
    arguments: tuple[Any, ...] = (name, who, address, certified.of[who])
    if name == "connections":
        target, arguments = _silence, (address, 500)
    process = SPAWN.Process(target=target, args=arguments, daemon=True)
    process.start()
    try:
        time.sleep(3)  # it has begun
        yield
    finally:
        process.kill()
        process.join()


class Campaign:
    """A coordinator's process, and two honest sites of it, which exchange models.

    Args:
        folder: for all of it.
        floats: of the model.
    """

    def __init__(self, folder: Path, floats: int):
        self.certified = Certified(folder)
        self.log = folder / "log"
        study, keys = folder / "federation.toml", self.certified.coordinator
        study.write_text(STUDY)
        command = [
            sys.executable, "-m", "nnunet_fed", "coordinator", study, "--listen", "127.0.0.1:0",
            "--state", folder / "state", "--cert", keys / "certificate.pem", "--key", keys / "key.pem",
            "--ca", keys / "ca.pem", "--revoked", self.certified.deny_list,
        ]  # fmt: skip
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=log)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().decode().split()[-1]
        self._tensors = {"w": np.ones(floats, np.float32)}
        self._digest = Federation.read(study).digest
        self._rounds = 0
        self._seats = [self._seat(name) for name in "ab"]
        third = self._seat("member")  # without whom the first round would not close
        self._together([*self._seats, third], "start/model")
        self._together([*self._seats, third], "round-0000/model")
        third.leave("it means no good")
        third.close()

    def _seat(self, name: str) -> GrpcCommunicator:
        files = self.certified.of[name]
        keys = {"certificate": files / "certificate.pem", "key": files / "key.pem", "ca": files / "ca.pem"}
        seat = GrpcCommunicator(Site(name=name, coordinator=self.address, connect_minutes=1, **keys))
        seat.join("training", self._digest, "3d_fullres", "T")
        return seat

    def _together(self, seats: list[GrpcCommunicator], key: str) -> float:
        started = time.monotonic()
        threads = [threading.Thread(target=seat.mean, args=(key, self._tensors, 1.0)) for seat in seats]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive(), f"'{key}' does not end"
        return time.monotonic() - started

    def honest_round(self) -> float:
        """The sites contribute and get the mean; in so many seconds."""
        self._rounds += 1
        return self._together(self._seats, f"round-{self._rounds:04d}/model")

    def memory(self) -> float:
        """The most anonymous memory and files of the coordinator so far, in MB."""
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) / 1e3

    def close(self) -> None:
        """End it."""
        for seat in self._seats:
            seat.close()
        self.process.terminate()
        self.process.wait(40)
