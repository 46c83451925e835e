"""Callers who mean no good, as somebody has them who uses other software than ours."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from nnunet_fed.certificates.authority import Authority

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
