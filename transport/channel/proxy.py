"""The hospital's proxy between a site and its coordinator: which one, and a connection through it. Source: ours.

gRPC passes a proxy by the method CONNECT (RFC 9110, section 9.3.6), within which TLS is end to end. Left to itself it
reads ``https_proxy`` in small letters only, and asks the proxy even for this machine's own addresses; so it is told.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import re
import socket
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies_environment

from nnunet_fed.addresses import host_and_port, in_brackets, without_brackets
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
        return f"{in_brackets(self.host)}:{self.port}"

    def connect(self, host: str, port: int, timeout: float) -> socket.socket:
        """A connection to a host through the proxy, which resolves the host's name.

        Raises:
            ProxyRefusalError: the proxy answers, and does not let it through.
            OSError: the proxy does not answer.
        """
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        connection.set_tunnel(host, port, self._authorization())
        # before Python 3.12, it asks for an IPv6 address without the brackets that RFC 9112 wants
        connection._tunnel_host = in_brackets(host)  # type: ignore[attr-defined]
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
    host, port_there = host_and_port(address)
    given = getproxies_environment()
    if not given.get("https") or is_loopback(address) or bypasses(given.get("no", ""), host, port_there):
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
    return Proxy(f"http://{credentials}{at}{in_brackets(parts.hostname)}:{port}", parts.hostname, port)


def bypasses(no_proxy: str, host: str, port: int) -> bool:
    """Whether ``no_proxy`` names a host, as curl and gRPC read it together.

    Args:
        no_proxy: entries between commas or spaces: ``*``; a domain, which stands for all below it, also as
            ``.domain`` or ``*.domain``; an address; a range of addresses, ``10.0.0.0/8``; each but the range also with
            a port, ``host:port``, for which alone it then counts.
        host: name or address, without brackets.
        port: at which it is reached.
    """
    return any(
        _names(entry.lower(), host.lower().rstrip("."), port) for entry in re.split(r"[,\s]+", no_proxy) if entry
    )


def _names(entry: str, host: str, port: int) -> bool:
    if entry == "*":
        return True
    address = _address(host)
    if "/" in entry:
        try:
            network = ipaddress.ip_network(entry.replace("[", "").replace("]", ""), strict=False)
        except ValueError:
            return False
        return address is not None and address.version == network.version and address in network
    if _address(without_brackets(entry)) is None:  # it is a name, or has a port
        name, separator, number = entry.rpartition(":")
        if separator and number.isdecimal():
            if int(number) != port:
                return False
            entry = name
    entry = without_brackets(entry)
    if address is not None:
        return address == _address(entry)
    domain = entry.removeprefix("*").strip(".")
    return bool(domain) and (host == domain or host.endswith(f".{domain}"))


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def proxy_options(proxy: Proxy | None) -> list[tuple[str, str | int]]:
    """Channel options that say so to gRPC."""
    return [("grpc.enable_http_proxy", 0)] if proxy is None else [("grpc.http_proxy", proxy.url)]
