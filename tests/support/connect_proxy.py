"""A tiny HTTP proxy that knows the method CONNECT."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

from nnunet_fed.addresses import host_and_port


class ConnectProxy:
    """An HTTP proxy that knows the method CONNECT and one host.

    Args:
        target: ``host:port`` to which it leads; ``None``: it refuses.
    """

    def __init__(self, target: str | None):
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.asked: list[str] = []
        """First lines of the requests."""
        self.authorizations: list[str] = []
        self.answer = "403 Forbidden"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            data = client.recv(1)
            if not data:
                return
            head += data
        first, *headers = head.decode().splitlines()
        self.asked.append(first)
        self.authorizations += [line for line in headers if line.lower().startswith("proxy-authorization")]
        if self._target is None:
            client.sendall(f"HTTP/1.1 {self.answer}\r\n\r\n".encode())
            client.close()
            return
        server = socket.create_connection(host_and_port(self._target))
        client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        for source, sink in ((client, server), (server, client)):
            threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)
