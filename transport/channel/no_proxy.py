"""``no_proxy``: for which addresses no proxy is asked. Source: ours, after curl's and gRPC's documentation.

No library reads all that either of them reads: the standard library knows no ranges and takes any ending of an IP
address for a domain, requests knows no ``*.domain`` and no IPv6 ranges, httpx no ranges at all.
"""

from __future__ import annotations

import ipaddress
import re

from nnunet_fed.study.address import Address, IPAddress, ip_address, unmapped


def reached_directly(address: Address, no_proxy: str) -> bool:
    """Whether a list of ``no_proxy`` has an address.

    Args:
        address: the host as it is written, since neither curl nor gRPC resolves names for this.
        no_proxy: entries with commas or blanks between them; each may end in ``:PORT`` and is then for that port only.

            ===================================  =================================================================
            ``*``                                everything
            ``example.org``, ``.example.org``    this host and all within the domain, as in curl
            ``*.example.org``                    all within the domain
            ``10.1.2.3``, ``::1``, ``[::1]``     this address, however it is written
            ``10.0.0.0/8``, ``fd00::/8``         the addresses of this range
            ===================================  =================================================================

            Letters' case and a name's last dot do not count. What is none of these has no address.
    """
    return any(_has(entry, address) for entry in re.split(r"[\s,]+", no_proxy) if entry)


def _has(entry: str, address: Address) -> bool:
    pattern, port = _split(entry)
    if port is not None and port != str(address.port):
        return False
    if pattern == "*":
        return True
    ip = unmapped(ip_address(address.host))
    return _has_name(pattern, address.host) if ip is None else _has_ip(pattern, ip)


def _split(entry: str) -> tuple[str, str | None]:
    """Pattern without brackets, and port."""
    if entry.startswith("["):
        inside, _, rest = entry[1:].partition("]")
        bits, colon, port = rest.partition(":")
        return inside + bits, port if colon else None
    if entry.count(":") != 1:  # none, or an IPv6 address
        return entry, None
    pattern, _, port = entry.partition(":")
    return pattern, port


def _has_name(pattern: str, host: str) -> bool:
    host, pattern = host.lower().removesuffix("."), pattern.lower().removesuffix(".")
    domain = pattern.removeprefix("*").removeprefix(".")
    within = bool(domain) and host.endswith(f".{domain}")
    return within or (host == domain and not pattern.startswith("*"))


def _has_ip(pattern: str, ip: IPAddress) -> bool:
    one = unmapped(ip_address(pattern))
    if one is not None:
        return one == ip
    try:
        network = ipaddress.ip_network(pattern, strict=False)
    except ValueError:
        return False
    return ip in network
