"""``no_proxy`` as curl and gRPC read it, and more than either: against a plain reference, made beside each entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_fed.study.address import Address
from nnunet_fed.transport.channel.no_proxy import reached_directly


@pytest.mark.parametrize(
    ("host", "no_proxy", "direct"),
    [
        ("host.example", "", False),
        ("host.example", " , ,, ", False),
        ("host.example", "*", True),
        ("host.example", "other.example,*", True),
        ("host.example", "example", True),
        ("host.example", ".example", True),
        ("host.example", "*.example", True),
        ("HOST.Example", "hOst.eXample.", True),
        ("host.example.", "host.example", True),
        ("host.example", ".host.example", True),
        ("host.example", "*.host.example", False),
        ("host.example", "ost.example", False),
        ("host.example", "t.example", False),
        ("host.example", "*host.example", False),
        ("host.example", "a.host.example", False),
        ("host.example", ".", False),
        ("host.example", "other.example , host.example", True),
        ("host.example", "other.example\thost.example", True),
        ("host.example", "host.example:7464", True),
        ("host.example", "host.example:443", False),
        ("host.example", ".example:7464", True),
        ("host.example", "*:7464", True),
        ("host.example", "*:1", False),
        ("host.example", "10.0.0.0/8", False),
        ("10.1.2.3", "10.1.2.3", True),
        ("10.1.2.3", "10.1.2.3:7464", True),
        ("10.1.2.3", "10.1.2.3:443", False),
        ("10.1.2.3", "10.0.0.0/8", True),
        ("10.1.2.3", "10.9.9.9/8", True),
        ("10.1.2.3", "10.0.0.0/8:443", False),
        ("10.1.2.3", "10.1.2.3/32", True),
        ("10.1.2.3", "10.1.2.2/32", False),
        ("10.1.2.3", "192.168.0.0/16", False),
        ("10.1.2.3", "10.0.0.0/33", False),
        ("10.1.2.3", "10.0.0.0/", False),
        ("10.1.2.3", "10.", False),
        ("10.1.2.3", "10", False),
        ("10.1.2.3", "3", False),
        ("10.1.2.3", "2.3", False),
        ("10.1.2.3", ".2.3", False),
        ("10.1.2.3", "::/0", False),
        ("[::ffff:10.1.2.3]", "10.0.0.0/8", True),
        ("10.1.2.3", "::ffff:10.1.2.3", True),
        ("[fd00::5]", "fd00::5", True),
        ("[fd00::5]", "[fd00::5]", True),
        ("[fd00::5]", "FD00:0::0:5", True),
        ("[fd00::5]", "[fd00::5]:7464", True),
        ("[fd00::5]", "[fd00::5]:443", False),
        ("[fd00::5]", "fd00::/8", True),
        ("[fd00::5]", "[fd00::]/8", True),
        ("[fd00::5]", "[fd00::/8]:7464", True),
        ("[fd00::5]", "fe00::/8", False),
        ("[fd00::5]", "0.0.0.0/0", False),
        ("[fe80::5%eth0]", "fe80::/10", True),
    ],
)
def test_who_is_reached_directly(host: str, no_proxy: str, direct: bool) -> None:
    assert reached_directly(Address.parse(f"{host}:7464"), no_proxy) is direct


@dataclass(frozen=True)
class Host:
    """A name as its labels (version 0), or an IP address as its version and number; and a port."""

    labels: tuple[str, ...] | None
    version: int
    number: int
    port: int

    @property
    def text(self) -> str:
        if self.labels is not None:
            return f"{'.'.join(self.labels)}:{self.port}"
        return (
            f"{IPv4Address(self.number)}:{self.port}"
            if self.version == 4
            else f"[{IPv6Address(self.number)}]:{self.port}"
        )


Entry = tuple[str, Callable[[Host], bool]]
"""As it is written, and whom it means."""

LABELS = st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=3).map(tuple)
PORTS = st.sampled_from([443, 7464])
BASES = {4: int(IPv4Address("10.1.2.3")), 6: int(IPv6Address("fd00::5"))}
WIDTHS = {4: 32, 6: 128}


@st.composite
def numbers(draw: st.DrawFn, version: int) -> int:
    """Near each other, so that ranges have some of them and not all."""
    return BASES[version] ^ (1 << draw(st.integers(0, WIDTHS[version] - 1)) if draw(st.booleans()) else 0)


@st.composite
def hosts(draw: st.DrawFn) -> Host:
    if draw(st.booleans()):
        return Host(draw(LABELS), 0, 0, draw(PORTS))
    version = draw(st.sampled_from([4, 6]))
    return Host(None, version, draw(numbers(version)), draw(PORTS))


@st.composite
def domains(draw: st.DrawFn) -> Entry:
    labels, start, end = draw(LABELS), draw(st.sampled_from(["", ".", "*."])), draw(st.sampled_from(["", "."]))
    text = start + ".".join(labels) + end
    least = len(labels) + (1 if start == "*." else 0)

    def means(host: Host) -> bool:
        return host.labels is not None and host.labels[-len(labels) :] == labels and len(host.labels) >= least

    return draw(st.sampled_from([text, text.upper()])), means


@st.composite
def ranges(draw: st.DrawFn) -> Entry:
    version = draw(st.sampled_from([4, 6]))
    number, bits = draw(numbers(version)), draw(st.integers(0, WIDTHS[version]))
    shift = WIDTHS[version] - bits
    ip = IPv4Address(number) if version == 4 else IPv6Address(number)
    text = draw(st.sampled_from([str(ip), ip.exploded]))
    text = f"[{text}]" if version == 6 and draw(st.booleans()) else text
    text = text if bits == WIDTHS[version] and draw(st.booleans()) else f"{text}/{bits}"
    return text, lambda host: host.version == version and host.number >> shift == number >> shift


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    star: Entry = ("*", lambda host: True)
    nonsense = st.sampled_from(["", "10.", "a..b/8", "/", "[", "]", "[]", "::/", "1/1/1", "fd00::5/129"])
    nobody = nonsense.map(lambda text: (text, lambda host: False))
    text, means = draw(st.one_of(domains(), ranges(), st.just(star), nobody))
    if text and (text.count(":") == 0 or (text.startswith("[") and len(text) > 2)) and draw(st.booleans()):
        port = draw(PORTS)
        return f"{text}:{port}", lambda host: host.port == port and means(host)
    return text, means


@given(hosts(), st.lists(entries(), max_size=4), st.sampled_from([",", ", ", " ,", " "]))
def test_a_list_means_what_its_entries_mean(host: Host, given: list[Entry], separator: str) -> None:
    no_proxy = separator.join(text for text, _ in given)
    assert reached_directly(Address.parse(host.text), no_proxy) is any(means(host) for _, means in given)


@given(st.text(), st.sampled_from(["a:1", "10.0.0.1:1", "[::1]:1"]))
def test_nonsense_is_no_error(no_proxy: str, address: str) -> None:
    reached_directly(Address.parse(address), no_proxy)
