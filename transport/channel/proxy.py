"""The hospital's proxy between a site and its coordinator: which one, and a connection through it. Source: ours.

A proxy is passed by the method CONNECT (RFC 9110, section 9.3.6), within which TLS is end to end. Whether it is asked
is decided here, for gRPC and for our own connections. gRPC by itself reads the variables in small letters only, asks
the proxy even for this machine's own addresses, takes every ending of a host's name for its domain and knows no
``*.domain``; so its own reading is off.
"""

from __future__ import annotations

import base64
import http.client
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies_environment

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.study.address import Address
from nnunet_fed.transport.channel.no_proxy import reached_directly

VARIABLES = "https_proxy or HTTPS_PROXY"


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy."""

    place: Address
    authorization: str = field(repr=False)
    """Value of the header Proxy-Authorization, with the password in it; empty: none."""

    def connect(self, address: Address, timeout: float) -> socket.socket:
        """A connection to an address through the proxy, which resolves the host's name.

        Raises:
            ProxyRefusalError: the proxy answers, and does not let it through.
            OSError: the proxy does not answer.
        """
        headers = [f"Host: {address}"]
        if self.authorization:
            headers.append(f"Proxy-Authorization: {self.authorization}")
        request = "\r\n".join([f"CONNECT {address} HTTP/1.1", *headers, "", ""])
        connection = None
        try:
            connection = socket.create_connection(self.place, timeout=timeout)
            connection.sendall(request.encode("latin-1"))
            answer = http.client.HTTPResponse(connection, method="CONNECT")
            answer.begin()
        except (OSError, ValueError, http.client.HTTPException) as error:
            if connection is not None:
                connection.close()
            raise OSError(f"the proxy {self.place} does not answer: {error}") from None
        answer.close()  # which leaves the connection open
        if not 200 <= answer.status < 300:
            connection.close()
            raise ProxyRefusalError(self.place, f"{answer.status} {answer.reason}")
        return connection


class ProxyRefusalError(OSError):
    """A proxy answered that it does not let a connection through.

    Args:
        place: the proxy's.
        answer: status and reason, such as ``403 Forbidden``.
    """

    def __init__(self, place: Address, answer: str):
        super().__init__(f"the proxy {place} says {answer}")
        self.place = place
        self.answer = answer

    @property
    def lasts(self) -> bool:
        """The proxy's operator has to change something (403, 407, ...); 5xx may pass, or the coordinator is away."""
        return self.answer.startswith("4")


def proxy_for(address: Address) -> Proxy | None:
    """The proxy for a coordinator or a peer, by ``https_proxy`` and ``no_proxy`` (or in capitals, as curl reads them).

    This machine's own addresses are never asked of a proxy: there they would be its own.

    Raises:
        ConfigurationError: the variable names no HTTP proxy.
    """
    given = getproxies_environment()
    text = given.get("https")
    if not text or address.is_loopback or reached_directly(address, given.get("no", "")):
        return None
    with suppress(ValueError):  # a port beyond all, or brackets that do not close
        parts = urlsplit(text if "://" in text else f"http://{text}")
        if parts.scheme == "http" and parts.hostname:
            place = Address.of(parts.hostname, parts.port or 80)
            return Proxy(place, _authorization(parts.username, parts.password))
    raise ConfigurationError(
        f"{VARIABLES} names no proxy of the form http://HOST:PORT. Correct it, or put '{address.host}' into no_proxy."
    )


def _authorization(user: str | None, password: str | None) -> str:
    if user is None:
        return ""
    pair = f"{unquote(user)}:{unquote(password or '')}"
    return "Basic " + base64.b64encode(pair.encode()).decode()


def way_of_grpc(address: Address, server_name: str | None = None) -> tuple[str, list[tuple[str, str | int]]]:
    """Target and options of a channel to an address, through the proxy if there is one.

    Args:
        address: of the coordinator or a peer.
        server_name: host in the certificate, if it is another one.

    Raises:
        ConfigurationError: as :func:`proxy_for`.
    """
    proxy = proxy_for(address)
    options: list[tuple[str, str | int]] = [("grpc.enable_http_proxy", 0)]
    if server_name is not None:
        options.append(("grpc.ssl_target_name_override", server_name))
    if proxy is None:
        return str(address), options
    options.append(("grpc.http_connect_server", str(address)))
    if proxy.authorization:
        options.append(("grpc.http_connect_headers", f"Proxy-Authorization:{proxy.authorization}"))
    if server_name is None:  # or TLS would ask for the proxy's certificate
        options.append(("grpc.default_authority", str(address)))
    return str(proxy.place), options
