"""A TCP proxy that counts what passes, and that can be slow or swallow everything: the network of a benchmark."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress

PIECE = 1 << 16


class CountingProxy:
    """Forward connections to an address until it is closed.

    Args:
        target: ``host:port``.
    """

    def __init__(self, target: str):
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.to_target = 0
        """Bytes that the clients have sent."""
        self.from_target = 0
        """Bytes that they have received."""
        self.megabytes_per_second: float | None = None
        """Of each connection and direction."""
        self.passes = threading.Event()
        """Cleared, nothing passes and nobody is told: packets are lost."""
        self.passes.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        self.passes.wait()
        try:
            server = socket.create_connection(self._target)
        except OSError:  # nobody listens
            client.close()
            return
        threading.Thread(target=self._pump, args=(client, server, True), daemon=True).start()
        self._pump(server, client, False)

    def _pump(self, source: socket.socket, sink: socket.socket, is_to_target: bool) -> None:
        with suppress(OSError):
            while data := source.recv(PIECE):
                self.passes.wait()
                if self.megabytes_per_second is not None:
                    time.sleep(len(data) / 1e6 / self.megabytes_per_second)
                if is_to_target:
                    self.to_target += len(data)
                else:
                    self.from_target += len(data)
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Network:
    """A proxy for every ordered pair of sites, so that every byte has a sender and a receiver.

    Args:
        addresses: at which each site listens.
    """

    def __init__(self, addresses: dict[str, str]):
        self._addresses = addresses
        self.proxies = {
            (caller, callee): CountingProxy(address)
            for caller in addresses
            for callee, address in addresses.items()
            if caller != callee
        }

    def peers(self, site: str) -> dict[str, str]:
        """What a site has in ``peers`` of ``site.toml``."""
        others = {callee: proxy.address for (caller, callee), proxy in self.proxies.items() if caller == site}
        return {**others, site: self._addresses[site]}

    def sent(self, site: str) -> int:
        """Bytes that a site has sent, as caller or as the one called."""
        return sum(
            proxy.to_target if caller == site else proxy.from_target
            for (caller, callee), proxy in self.proxies.items()
            if site in (caller, callee)
        )

    def of(self, site: str) -> list[CountingProxy]:
        """The proxies to and from a site."""
        return [proxy for pair, proxy in self.proxies.items() if site in pair]

    def close(self) -> None:
        """Take no more connections."""
        for proxy in self.proxies.values():
            proxy.close()
