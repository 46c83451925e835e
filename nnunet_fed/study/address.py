"""``HOST:PORT``, wherever one is given: what it means, and how it is shown.

IPv6 addresses stand in brackets (RFC 3986). Source: ours, on the standard library's ``ipaddress``.
"""

from __future__ import annotations

import ipaddress
import socket
from contextlib import suppress
from typing import NamedTuple

LARGEST_PORT = 65535

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class Address(NamedTuple):
    """Where somebody listens; as a pair, what sockets take."""

    host: str
    """Name or IP address, without brackets. IPv6 addresses as certificates' readers write them, for gRPC compares the
    texts."""
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read ``HOST:PORT`` or ``[IPv6]:PORT``; port 0 is allowed.

        Raises:
            ValueError: it has another form; the text is a sentence's, without its end.
        """
        host, _, port = text.rpartition(":")
        if not host or not (port.isascii() and port.isdecimal()) or int(port) > LARGEST_PORT:
            raise ValueError(f"{text!r} is no HOST:PORT, for example 127.0.0.1:7464 or [::1]:7464")
        if not (host.startswith("[") and host.endswith("]")):
            if ":" in host or "[" in host or "]" in host:
                raise ValueError(
                    f"{text!r} is no HOST:PORT: an IPv6 address stands in brackets, for example [::1]:7464, and a "
                    "host's name without a scheme"
                )
            return cls(host, int(port))
        address = ip_address(host[1:-1])
        if address is None or address.version != 6:
            raise ValueError(f"{text!r}: what stands in brackets is no IPv6 address, for example [::1]:7464")
        return cls.of(host[1:-1], int(port))

    @classmethod
    def of(cls, host: str, port: int) -> Address:
        """Of a host without brackets."""
        address = ip_address(host)
        if isinstance(address, ipaddress.IPv6Address):
            _, percent, zone = host.partition("%")
            host = socket.inet_ntop(socket.AF_INET6, address.packed) + percent + zone
        return cls(host, port)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether it can be reached from this machine only. ``::`` and ``0.0.0.0`` can be from anywhere."""
        address = unmapped(ip_address(self.host))
        if address is None:
            return self.host.lower().rstrip(".") == "localhost"
        return address.is_loopback


def ip_address(text: str) -> IPAddress | None:
    """An IP address without brackets and, of a link-local one, without its zone; ``None``: it is none."""
    with suppress(ValueError):
        return ipaddress.ip_address(text.partition("%")[0])
    return None


def unmapped(address: IPAddress | None) -> IPAddress | None:
    """The IPv4 address within an IPv6 one (``::ffff:127.0.0.1``), which leads to the same place; others as they are."""
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def readable(text: str) -> str:
    """gRPC's words with the brackets around IPv6 addresses, which it writes as %5B and %5D."""
    return text.replace("%5B", "[").replace("%5D", "]")
