"""A TCP proxy that keeps what passes through it, for tests that look at the wire."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

from nnunet_fed.study.address import Address


class RecordingProxy:
    """Forward connections to an address until it is closed.

    Args:
        target: ``host:port``.
    """

    def __init__(self, target: str):
        self._target = Address.parse(target)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections: list[bytearray] = []
        """What the clients have sent, by connection."""
        self.received = bytearray()
        """What they have received."""
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def sent(self) -> bytes:
        """What the clients have sent."""
        return b"".join(self.connections)

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(self._target)
                except OSError:  # the coordinator is away
                    client.close()
                    continue
                self.connections.append(bytearray())
                for source, sink, kept in (
                    (client, server, self.connections[-1]),
                    (server, client, self.received),
                ):
                    threading.Thread(target=self._pump, args=(source, sink, kept), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket, kept: bytearray) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                kept += data
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
