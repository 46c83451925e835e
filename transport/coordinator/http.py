"""``/status`` (JSON) and ``/metrics`` (Prometheus) of a coordinator, to be read only and for whoever reaches it.

There is neither TLS nor a password: what is shown says who trains what and how far, so it stays on this machine unless
the user insists (docs/operations.md). Source: ours.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from nnunet_fed.addresses import host_and_port
from nnunet_fed.coordinator.coordinator import Coordinator
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.strict_json import to_json
from nnunet_fed.transport.channel.options import is_loopback
from nnunet_fed.transport.coordinator.metrics import CoordinatorCollector, Meter

logger = logging.getLogger(__name__)

SECONDS = 10.0
"""For which a client may keep silent."""


class StatusServer:
    """Answer GET on ``/status`` and ``/metrics``.

    Args:
        coordinator: asked with each request.
        address: ``host:port``; port 0 takes a free one.
        anywhere: ``address`` need not be a loopback address.

    Raises:
        ConfigurationError: the address is in use, or may be reached from other machines.
    """

    def __init__(self, coordinator: Coordinator, address: str, anywhere: bool = False):
        self.registry = CollectorRegistry()
        """What ``/metrics`` shows."""
        self.registry.register(CoordinatorCollector(coordinator))
        self.meter = Meter(self.registry)
        """For the server whose calls ``/metrics`` shall count."""
        try:
            host, port = host_and_port(address)
        except ValueError as error:
            raise ConfigurationError(f"--http {address}: {error}.") from None
        if not anywhere and not is_loopback(address):
            raise ConfigurationError(
                f"--http {address}: whoever reaches this address could read the status, and whoever is on the way, "
                "since there is no TLS. Use 127.0.0.1 and put a web server with TLS and a password in front, or add "
                "--http-insecure in a network that you trust."
            )
        try:
            family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            self._server: WSGIServer = type("_Server", (_Server,), {"address_family": family})(place[:2], _Handler)
        except OSError as error:
            raise ConfigurationError(f"--http {address}: cannot listen there: {error}. Choose another one.") from None
        self._server.set_app(_application(coordinator, self.registry))
        self.address = f"{address.rpartition(':')[0]}:{self._server.server_port}"

    def start(self) -> None:
        """Start to answer, in a thread."""
        threading.Thread(target=self._server.serve_forever, args=(0.1,), name="http", daemon=True).start()
        logger.info("status and metrics at http://%s", self.address)

    def stop(self) -> None:
        """Stop to answer; only after :meth:`start`."""
        self._server.shutdown()
        self._server.server_close()


def _application(coordinator: Coordinator, registry: CollectorRegistry) -> Callable[..., Iterable[bytes]]:
    pages: dict[str, tuple[str, Callable[[], bytes]]] = {
        "/status": ("application/json", lambda: to_json(coordinator.status()).encode()),
        "/metrics": (CONTENT_TYPE_LATEST, lambda: generate_latest(registry)),
    }

    def application(environment: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if environment["REQUEST_METHOD"] not in ("GET", "HEAD"):
            start("405 Method Not Allowed", [("Allow", "GET, HEAD")])
            return [b""]
        page = pages.get(environment["PATH_INFO"])
        if page is None:
            start("404 Not Found", [("Content-Type", "text/plain")])
            return [b"There are /status and /metrics.\n"]
        kind, content = page
        body = content()
        start("200 OK", [("Content-Type", kind), ("Cache-Control", "no-store")])
        return [b"" if environment["REQUEST_METHOD"] == "HEAD" else body]

    return application


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        # WSGIServer's own asks the name server for this machine's name, which may take long
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "coordinator", self.server_address[1]
        self.setup_environ()


class _Handler(WSGIRequestHandler):
    timeout = SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)
