"""A hospital's proxy on the way to the coordinator: a tiny one that knows a name which nobody else does."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
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


class ConnectProxy:
    """An HTTP proxy that knows the method CONNECT and one host.

    Args:
        target: ``host:port`` to which it leads; ``None``: it refuses.
    """

    def __init__(self, target: str | None):
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.asked: list[str] = []
        """First lines of the requests."""
        self.authorizations: list[str] = []
        self.answer = "403 Forbidden"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            data = client.recv(1)
            if not data:
                return
            head += data
        first, *headers = head.decode().splitlines()
        self.asked.append(first)
        self.authorizations += [line for line in headers if line.lower().startswith("proxy-authorization")]
        if self._target is None:
            client.sendall(f"HTTP/1.1 {self.answer}\r\n\r\n".encode())
            client.close()
            return
        host, _, port = self._target.rpartition(":")
        server = socket.create_connection((host, int(port)))
        client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        for source, sink in ((client, server), (server, client)):
            threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)


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
