"""``HOST:PORT`` as it is written everywhere; an IPv6 address stands in brackets, as in ``[::1]:7464``."""

from __future__ import annotations

import ipaddress

EXAMPLES = "for example 127.0.0.1:7464 or [::1]:7464"


def host_and_port(address: str) -> tuple[str, int]:
    """Host, without brackets, and port of an address, as sockets take them.

    Raises:
        ValueError: it is none; the text says how to write it.
    """
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise ValueError(f"'{address}' is no HOST:PORT, {EXAMPLES}")
    if host.startswith("[") and host.endswith("]"):
        try:
            ipaddress.IPv6Address(host[1:-1])
        except ValueError:
            raise ValueError(f"'{address}' has no IPv6 address in its brackets, {EXAMPLES}") from None
        return host[1:-1], int(port)
    if ":" in host:
        raise ValueError(f"'{address}': put an IPv6 address into brackets, [{host}]:{port}")
    return host, int(port)


def in_brackets(host: str) -> str:
    """A host as it stands before ``:PORT``."""
    return f"[{host}]" if ":" in host else host


def without_brackets(host: str) -> str:
    """A host as sockets and certificates have it."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host
