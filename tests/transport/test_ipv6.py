"""IPv6 from end to end, over real gRPC with TLS on ::1."""

from __future__ import annotations

import http.client
import logging
import re
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from connect_proxy import ConnectProxy
from ipv6 import needs_ipv6
from serving import Served, make_study
from typer.testing import CliRunner

from nnunet_fed.certificates.authority import Authority
from nnunet_fed.cli.certs_command import app as certs
from nnunet_fed.coordinator.coordinator import Coordinator
from nnunet_fed.coordinator.store import Store
from nnunet_fed.errors import ConfigurationError, UnreachableError
from nnunet_fed.preflight.site_checks import Outcome
from nnunet_fed.study.address import Address
from nnunet_fed.transport.channel.tls import KeyFiles, diagnose
from nnunet_fed.transport.coordinator.http import StatusServer
from nnunet_fed.transport.site import connection_checks
from nnunet_fed.transport.site.client import GrpcCommunicator

pytestmark = needs_ipv6

Serve = Callable[..., Served]


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Authority:
    """With a coordinator's files, made by the command."""
    for name in ("https_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    authority = Authority.create(tmp_path / "authority", "study")
    hosts = ["--host", "::1", "--host", "2001:db8::7"]
    made = CliRunner().invoke(certs, ["site", str(authority.folder), "coordinator", *hosts])
    assert made.exit_code == 0, made.output
    shown = CliRunner().invoke(certs, ["show", str(authority.folder)]).output
    assert "at ::1 2001:db8::7" in re.sub(r"\s+", " ", shown)
    authority.site("a")
    return authority


def test_an_address_in_brackets_is_one_for_certificates_too(authority: Authority) -> None:
    made = CliRunner().invoke(certs, ["site", str(authority.folder), "b", "--host", "[2001:db8::8]"])
    assert made.exit_code == 0, made.output
    assert "2001:db8::8" in CliRunner().invoke(certs, ["show", str(authority.folder)]).output


def keys(authority: Authority) -> KeyFiles:
    """The coordinator's."""
    folder = authority.folder / "sites" / "coordinator"
    return KeyFiles(*(folder / f"{name}.pem" for name in ("certificate", "key", "ca")))


@pytest.mark.parametrize("listen", ["[::1]", "[::]"])
@pytest.mark.parametrize("host", ["[::1]", "[0:0:0:0:0:0:0:1]"])
def test_a_site_and_its_coordinator(serve: Serve, authority: Authority, listen: str, host: str) -> None:
    served = serve(make_study("a"), address=f"{listen}:0", keys=keys(authority))
    port = Address.parse(served.server.address).port
    assert served.server.address == f"{listen}:{port}"
    settings = served.settings("a", authority.folder / "sites" / "a", coordinator=f"{host}:{port}")
    seat = GrpcCommunicator(settings)
    seat.join("planning")
    assert seat.gather("planning/x", 1) == {"a": 1}
    seat.close()
    assert diagnose(settings) is None
    for check in (connection_checks.check_port, connection_checks.check_handshake):
        assert check(settings).state == Outcome.ok
    assert connection_checks.check_name_resolution(settings).text == "::1 of the coordinator is ::1"


def test_ipv4_reaches_a_coordinator_that_listens_everywhere(serve: Serve, authority: Authority) -> None:
    served = serve(make_study("a"), address="[::]:0", keys=keys(authority))
    reached = f"127.0.0.1:{Address.parse(served.server.address).port}"
    settings = served.settings("a", authority.folder / "sites" / "a", coordinator=reached, server_name="::1")
    seat = GrpcCommunicator(settings)
    assert seat.status()["study"]["name"] == "study"
    seat.close()


@pytest.mark.parametrize("address", ["[::1]:0", "[::ffff:127.0.0.1]:0"])
def test_plain_text_on_loopback(serve: Serve, address: str, tmp_path: Path) -> None:
    assert serve(make_study("a"), tmp_path / "plain", address=address).seat("a").gather("r/x", 1) == {"a": 1}


@pytest.mark.parametrize("address", ["[::]:0", "[::ffff:0.0.0.0]:0", "[2001:db8::7]:0"])
def test_plain_text_does_not_leave_the_machine(serve: Serve, address: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"'{re.escape(address)}' is not on this machine"):
        serve(make_study("a"), address=address)


def test_the_certificate_is_for_another_address(serve: Serve, authority: Authority, tmp_path: Path) -> None:
    folder = authority.site("coordinator", ["2001:db8::7", "c.example"], renew=True)
    served = serve(
        make_study("a"), address="[::1]:0", keys=KeyFiles(*(folder / f"{n}.pem" for n in ("certificate", "key", "ca")))
    )
    told = diagnose(served.settings("a", authority.folder / "sites" / "a"))
    assert told is not None
    assert f"coordinator at {served.server.address} is for c.example, 2001:db8::7, not for ::1" in told


def test_a_coordinator_that_is_away_is_named_readably(
    authority: Authority, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    served = serve(make_study("a"))
    settings = served.settings("a", authority.folder / "sites" / "a", coordinator="[::1]:9", connect_minutes=0.01)
    with caplog.at_level(logging.WARNING), pytest.raises(UnreachableError) as told:
        GrpcCommunicator(settings).status()
    assert "The coordinator at [::1]:9 does not answer" in str(told.value)
    assert "%5B" not in str(told.value) + caplog.text
    assert "no connection to [::1]:9" in connection_checks.check_port(settings).text


def test_a_refusal_is_logged_readably(serve: Serve, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    served = serve(make_study("a"), tmp_path / "plain", address="[::1]:0")
    with caplog.at_level(logging.WARNING), pytest.raises(Exception, match="stranger"):
        GrpcCommunicator(served.settings("stranger")).join("planning")
    assert "refused ipv6:[::1]:" in caplog.text


def test_a_proxy_on_the_way(serve: Serve, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve(make_study("a"), address="[::1]:0", keys=keys(authority))
    proxy = ConnectProxy(served.server.address, "::1")
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:word@{proxy.address}")
    settings = served.settings("a", authority.folder / "sites" / "a", coordinator="[2001:DB8:0::7]:7464")
    seat = GrpcCommunicator(settings)
    assert seat.status()["study"]["name"] == "study"
    seat.close()
    by_grpc = len(proxy.asked)
    assert by_grpc
    assert diagnose(settings) is None
    assert len(proxy.asked) == by_grpc + 1
    assert {line.split()[1] for line in proxy.asked} == {"[2001:db8::7]:7464"}
    assert len(proxy.authorizations) == len(proxy.asked)
    assert f"through the proxy {proxy.address}" in connection_checks.check_port(settings).text
    proxy.asked.clear()
    monkeypatch.setenv("NO_PROXY", "2001:db8::/32")
    assert "through the proxy" not in connection_checks.check_port(settings).text
    assert not proxy.asked
    proxy.close()


@pytest.mark.parametrize(("address", "hosts"), [("[::1]:0", ["::1"]), ("[::]:0", ["::1", "127.0.0.1"])])
def test_status_over_http(tmp_path: Path, address: str, hosts: list[str]) -> None:
    with ExitStack() as stack:
        store = Store(tmp_path / "state")
        stack.callback(store.close)
        coordinator = Coordinator(make_study("a"), store)
        if address.startswith("[::]"):
            with pytest.raises(ConfigurationError, match="--http-insecure"):
                StatusServer(coordinator, address)
        pages = StatusServer(coordinator, address, anywhere=True)
        pages.start()
        stack.callback(pages.stop)
        port = Address.parse(pages.address).port
        assert pages.address == address.replace(":0", f":{port}")
        for host in hosts:
            connection = http.client.HTTPConnection(host, port, timeout=10)
            connection.request("GET", "/status")
            assert connection.getresponse().status == 200
            connection.close()


def test_an_address_that_another_has(serve: Serve, authority: Authority) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as other:
        address = f"[::1]:{other.getsockname()[1]}"
        with pytest.raises(ConfigurationError, match=re.escape(f"Cannot listen on {address}: the port is in use")):
            serve(make_study("a"), address=address, keys=keys(authority))
