"""``HOST:PORT``: read in one place, shown so that it can be read again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nnunet_fed
from nnunet_fed import transport
from nnunet_fed.study.address import Address, readable
from nnunet_fed.study.site import Site

HOME = "study/address.py"


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:7464", "127.0.0.1", 7464),
        ("host.example:0", "host.example", 0),
        ("[::1]:7464", "::1", 7464),
        ("[0:0:0:0:0:0:0:1]:1", "::1", 1),
        ("[2001:DB8::1]:1", "2001:db8::1", 1),
        ("[::ffff:7f00:1]:1", "::ffff:127.0.0.1", 1),
        ("[fe80::1%eth0]:65535", "fe80::1%eth0", 65535),
    ],
)
def test_what_an_address_means(text: str, host: str, port: int) -> None:
    address = Address.parse(text)
    assert address == (host, port)
    assert Address.parse(str(address)) == address


@given(st.ip_addresses(), st.integers(0, 65535))
def test_every_ip_address_is_read_as_it_is_shown(ip: object, port: int) -> None:
    address = Address.of(str(ip), port)
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is no HOST:PORT"),
        ("host", "is no HOST:PORT"),
        (":7464", "is no HOST:PORT"),
        ("host:65536", "is no HOST:PORT"),
        ("host:\u0663", "is no HOST:PORT"),
        ("::1:7464", "in brackets, for example [::1]:7464"),
        ("::1", "in brackets, for example [::1]:7464"),
        ("[::1]", "no HOST:PORT"),
        ("[::1:7464", "in brackets"),
        ("https://host:7464", "without a scheme"),
        ("[127.0.0.1]:1", "no IPv6 address"),
        ("[host]:1", "no IPv6 address"),
        ("[]:1", "no IPv6 address"),
    ],
)
def test_what_is_no_address(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        Address.parse(text)
    with pytest.raises(ValueError, match=re.escape(told)):
        Site(name="a", coordinator=text)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True), ("127.8.8.8", True), ("localhost", True), ("Localhost", True), ("[::1]", True),
        ("[0:0:0:0:0:0:0:1]", True), ("[::ffff:127.0.0.1]", True), ("[::ffff:7f00:1]", True),
        ("0.0.0.0", False), ("[::]", False), ("[::ffff:0.0.0.0]", False), ("[::ffff:10.0.0.1]", False),
        ("[fe80::1%lo]", False), ("10.0.0.1", False), ("localhost.example", False), ("127.0.0.1.example", False),
    ],
)  # fmt: skip
def test_what_is_reached_from_this_machine_only(host: str, loopback: bool) -> None:
    assert Address.parse(f"{host}:1").is_loopback is loopback


def test_two_peers_at_one_address_however_it_is_written() -> None:
    with pytest.raises(ValueError, match="have one address"):
        Site(name="a", coordinator="c:1", listen="[::]:1", peers={"a": "[::1]:1", "b": "[0:0:0:0:0:0:0:1]:1"})


def test_grpcs_brackets() -> None:
    assert readable("ipv6:%5B::1%5D:9: 100%5") == "ipv6:[::1]:9: 100%5"


def test_nobody_else_splits_host_and_port() -> None:
    by_hand = re.compile(r"""(r?partition|r?split)\((":"|':')|strip\("\[\]"\)""")
    found = [
        f"{path.name}:{number}"
        for package in (nnunet_fed, transport)
        for path in sorted(Path(package.__path__[0]).rglob("*.py"))
        if not path.as_posix().endswith((HOME, "channel/no_proxy.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if by_hand.search(line)
    ]
    allowed = {"option_values.py", "refusals.py"}  # SITE:LABEL; whose lines are counted, whatever gRPC writes
    assert [place for place in found if place.partition(":")[0] not in allowed] == []
