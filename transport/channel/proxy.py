"""The hospital's proxy between a site and its coordinator: which one, and a connection through it. Source: ours.

gRPC passes a proxy by the method CONNECT (RFC 9110, section 9.3.6), within which TLS is end to end. Left to itself it
reads ``https_proxy`` in small letters only, and asks the proxy even for this machine's own addresses; so it is told.
"""

from __future__ import annotations

import base64
import http.client
import socket
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.transport.channel.options import is_loopback

VARIABLES = "https_proxy or HTTPS_PROXY"


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy."""

    url: str
    """``http://[USER:PASSWORD@]HOST:PORT``. It may hold a password: show :attr:`address` instead."""
    host: str
    port: int

    @property
    def address(self) -> str:
        """``host:port``."""
        return f"{self.host}:{self.port}"

    def connect(self, host: str, port: int, timeout: float) -> socket.socket:
        """A connection to a host through the proxy, which resolves the host's name.

        Raises:
            ProxyRefusalError: the proxy answers, and does not let it through.
            OSError: the proxy does not answer.
        """
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        connection.set_tunnel(host, port, self._authorization())
        try:
            connection.connect()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            _, failed, answer = str(error).partition("Tunnel connection failed: ")  # so http.client says it
            if failed:
                raise ProxyRefusalError(self.address, answer) from None
            raise OSError(f"the proxy {self.address} does not answer: {error}") from None
        return connection.sock

    def _authorization(self) -> dict[str, str]:
        parts = urlsplit(self.url)
        if parts.username is None:
            return {}
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        return {"Proxy-Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}


class ProxyRefusalError(OSError):
    """A proxy answered that it does not let a connection through.

    Args:
        address: the proxy's.
        answer: status and reason, such as ``403 Forbidden``.
    """

    def __init__(self, address: str, answer: str):
        super().__init__(f"the proxy {address} says {answer}")
        self.address = address
        self.answer = answer

    @property
    def lasts(self) -> bool:
        """The proxy's operator has to change something (403, 407, ...); 5xx may pass, or the coordinator is away."""
        return self.answer.startswith("4")


def proxy_for(address: str) -> Proxy | None:
    """The proxy for a coordinator, by ``https_proxy`` and ``no_proxy`` (or in capitals, as curl reads them).

    Args:
        address: ``host:port``. This machine's own addresses are never asked of a proxy: there they would be its own.

    Raises:
        ConfigurationError: the variable names no HTTP proxy.
    """
    host = address.rpartition(":")[0].strip("[]")
    given = getproxies_environment()
    if not given.get("https") or is_loopback(address) or proxy_bypass(host):
        return None
    text = given["https"]
    url = text if "://" in text else f"http://{text}"
    parts = urlsplit(url)
    try:
        port = parts.port or 80
    except ValueError:
        port = 0
    if parts.scheme != "http" or not parts.hostname or not port:
        raise ConfigurationError(
            f"{VARIABLES} names no proxy of the form http://HOST:PORT. Correct it, or put '{host}' into no_proxy."
        )
    credentials, at, _ = parts.netloc.rpartition("@")
    shown_host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return Proxy(f"http://{credentials}{at}{shown_host}:{port}", parts.hostname, port)


def proxy_options(proxy: Proxy | None) -> list[tuple[str, str | int]]:
    """Channel options that say so to gRPC."""
    return [("grpc.enable_http_proxy", 0)] if proxy is None else [("grpc.http_proxy", proxy.url)]
