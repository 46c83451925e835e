"""A coordinator at an IPv6 address: certificates, site.toml, checks, and a proxy on the way."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from connect_proxy import ConnectProxy
from serving import Served, make_study

from nnunet_fed.addresses import host_and_port
from nnunet_fed.certificates.authority import Authority
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.study.site import Site
from nnunet_fed.transport.channel.listener import Listener
from nnunet_fed.transport.channel.tls import KeyFiles, diagnose
from nnunet_fed.transport.site import connection_checks
from nnunet_fed.transport.site.client import GrpcCommunicator

ELSEWHERE = "[fd00::7]:7464"
"""Only a proxy reaches it."""


def has_ipv6() -> bool:
    with suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@pytest.fixture
def served(serve: Callable[..., Served], authority: Authority) -> Served:
    files = authority.site("coordinator", ["[::1]", "fd00::7"])
    keys = KeyFiles(*(files / name for name in ("certificate.pem", "key.pem", "ca.pem")))
    return serve(make_study("a"), address="[::1]:0", keys=keys)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "authority", "study")


@pytest.fixture(autouse=True)
def _no_proxy_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "no_proxy", "no_grpc_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def gathers(site: Site) -> dict[str, int]:
    seat = GrpcCommunicator(site)
    try:
        seat.join("planning")
        return seat.gather("planning/x", 1)
    finally:
        seat.close()


@needs_ipv6
def test_a_site_and_its_coordinator_with_tls(served: Served, authority: Authority) -> None:
    site = served.settings("a", authority.site("a"))
    assert site.coordinator.startswith("[::1]:")
    assert gathers(site) == {"a": 1}
    assert diagnose(site) is None
    assert connection_checks.check_name_resolution(site).text == "::1 of the coordinator is ::1"
    assert connection_checks.check_port(site).text == f"{site.coordinator} is open"


@needs_ipv6
def test_without_tls_on_this_machine(serve: Callable[..., Served]) -> None:
    served = serve(make_study("a"), address="[::1]:0")
    assert gathers(served.settings("a")) == {"a": 1}


@needs_ipv6
def test_through_a_proxy(served: Served, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = ConnectProxy(served.server.address)
    monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy.address}")
    site = served.settings("a", authority.site("a"), coordinator=ELSEWHERE)
    assert gathers(site) == {"a": 1}
    by_grpc = len(proxy.asked)
    assert diagnose(site) is None
    assert len(proxy.asked) == by_grpc + 1
    assert all(line.startswith(f"CONNECT {ELSEWHERE} ") for line in proxy.asked)
    proxy.close()


@pytest.mark.parametrize("address", ["::1:7464", "[::1:7464", "[::g]:7464", "::1", "[::1]", "[127.0.0.1]:1"])
def test_how_an_address_is_not_written(address: str) -> None:
    with pytest.raises(ConfigurationError, match=r"\[.*\]:"):
        Listener(address, lambda server: None, ["a"], "", None, lambda keys: None, None)
    with pytest.raises(ValueError, match=r"\[.*\]:"):
        Site(name="a", coordinator=address)


def test_how_it_is() -> None:
    assert host_and_port("[::1]:7464") == ("::1", 7464)
    assert host_and_port("coordinator.example:0") == ("coordinator.example", 0)
