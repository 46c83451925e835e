"""A hospital's proxy on the way to the coordinator: a tiny one that knows a name which nobody else does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from connect_proxy import ConnectProxy
from serving import Served, make_study

from nnunet_fed.certificates.authority import Authority
from nnunet_fed.errors import ConfigurationError, UnreachableError
from nnunet_fed.study.site import Site
from nnunet_fed.transport.channel.proxy import proxy_for
from nnunet_fed.transport.channel.tls import KeyFiles, diagnose
from nnunet_fed.transport.site import connection_checks
from nnunet_fed.transport.site.client import GrpcCommunicator

Serve = Callable[..., Served]
NAME = "coordinator.invalid"
"""Only the proxy resolves it."""


@pytest.fixture(autouse=True)
def no_proxy_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "no_proxy", "no_grpc_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "authority", "study")


@pytest.fixture
def served(serve: Serve, authority: Authority) -> Served:
    folder = authority.site("coordinator", [NAME])
    return serve(make_study("a"), keys=KeyFiles(*(folder / f"{name}.pem" for name in ("certificate", "key", "ca"))))


@pytest.fixture
def proxy(served: Served) -> Iterator[ConnectProxy]:
    proxy = ConnectProxy(served.server.address)
    yield proxy
    proxy.close()


@pytest.fixture
def site(served: Served, authority: Authority) -> Site:
    return served.settings("a", authority.site("a"), coordinator=f"{NAME}:7464")


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy"])
@pytest.mark.parametrize("scheme", ["http://", ""])
def test_a_site_behind_a_proxy(
    site: Site, proxy: ConnectProxy, monkeypatch: pytest.MonkeyPatch, variable: str, scheme: str
) -> None:
    monkeypatch.setenv(variable, f"{scheme}user:pass%20word@{proxy.address}")
    seat = GrpcCommunicator(site)
    try:
        seat.join("planning")
        assert seat.gather("planning/x", 1) == {"a": 1}
    finally:
        seat.close()
    assert proxy.asked
    assert all(line.startswith(f"CONNECT {NAME}:7464 ") for line in proxy.asked)
    by_grpc = len(proxy.asked)
    assert diagnose(site) is None
    assert connection_checks.check_port(site).text == f"{NAME}:7464 is open through the proxy {proxy.address}"
    assert len(proxy.asked) == by_grpc + 2
    assert len(proxy.authorizations) == len(proxy.asked)
    assert len({line.lower() for line in proxy.authorizations}) == 1, "ours are gRPC's"


def test_what_is_wrong_behind_the_proxy_is_told(
    site: Site, proxy: ConnectProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy.address}")
    other = Authority.create(tmp_path / "other", "other")
    told = diagnose(site.model_copy(update={"ca": other.folder / "ca.pem"}))
    assert told is not None
    assert "is not signed by an authority" in told


def test_a_proxy_that_refuses(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = ConnectProxy(None)
    monkeypatch.setenv("HTTPS_PROXY", f"http://secret:word@{proxy.address}")
    with pytest.raises(UnreachableError) as refused:
        GrpcCommunicator(site).status()
    told = str(refused.value)
    assert f"The proxy {proxy.address} (https_proxy or HTTPS_PROXY) does not let this site through" in told
    assert "403 Forbidden" in told
    assert "word" not in told.replace("password", "")
    proxy.answer = "503 Service Unavailable"
    assert diagnose(site) is None, "another try may help"
    finding = connection_checks.check_port(site)
    assert "503 Service Unavailable" in finding.text
    proxy.close()


def test_a_proxy_that_is_away(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    assert diagnose(site) is None
    assert "the proxy 127.0.0.1:9 does not answer" in connection_checks.check_port(site).text


def test_this_machine_is_never_asked_of_a_proxy(serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    proxy = ConnectProxy(None)
    for variable in ("https_proxy", "http_proxy", "HTTPS_PROXY", "grpc_proxy"):
        monkeypatch.setenv(variable, f"http://{proxy.address}")
    seat = serve(make_study("a"), tmp_path / "plain").seat("a")
    assert seat.gather("r/x", 1) == {"a": 1}
    assert proxy.asked == []
    proxy.close()


@pytest.mark.parametrize(
    ("address", "no_proxy", "proxied"),
    [
        ("host.example:1", "", True),
        ("host.example:1", "other.example", True),
        ("host.example:1", "localhost,.example", False),
        ("host.example:1", "host.example", False),
        ("host.example:1", "*", False),
        ("[::1]:1", "", False),
        ("localhost:1", "", False),
        ("10.0.0.1:1", "", True),
        ("10.1.2.3:7464", "192.168.0.0/16", True),
        ("10.1.2.3:7464", "192.168.0.0/16,10.0.0.0/8", False),
        ("10.1.2.3:7464", "10.1.2.3/8", False),
        ("10.1.2.3:7464", "10.1.2.3:7464", False),
        ("10.1.2.3:7464", "10.1.2.3:443", True),
        ("10.1.2.3:7464", "10.", True),
        ("c.example.org:7464", "*.example.org", False),
        ("c.example.org:7464", "example.org another.org", False),
        ("C.Example.org.:7464", ".EXAMPLE.org", False),
        ("c.example.org:7464", ".example.org:7464", False),
        ("c.example.org:7464", "example.org:443", True),
        ("notexample.org:7464", "example.org,*.example.org", True),
        ("c.example.org:7464", "10.0.0.0/8, nonsense/x", True),
        ("[fd00::7]:7464", "fd00::/8", False),
        ("[fd00::7]:7464", "[fd00::7]", False),
        ("[fd00::7]:7464", "[fd00:0::7]:7464", False),
        ("[fd00::7]:7464", "fd00::7", False),
        ("[fd00::7]:7464", "fd00::8,[fd00::7]:443,10.0.0.0/8", True),
    ],
)
def test_for_whom_a_proxy_is_asked(address: str, no_proxy: str, proxied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", no_proxy)
    assert (proxy_for(address) is not None) is proxied


@pytest.mark.parametrize("url", ["socks5://proxy:1080", "https://proxy:3128", "http://", "http://proxy:99999"])
def test_a_variable_that_names_no_proxy(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", url)
    with pytest.raises(ConfigurationError, match="http://HOST:PORT"):
        proxy_for("host.example:1")
