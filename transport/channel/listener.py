"""What every gRPC server of ours has: an address, and callers who show who they are."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import grpc

from nnunet_fed.certificates.deny_list import DenyList
from nnunet_fed.errors import BusyError, ConfigurationError
from nnunet_fed.exchange.payload import CHUNK
from nnunet_fed.study.address import Address
from nnunet_fed.transport.channel.calls import SHARE, Calls
from nnunet_fed.transport.channel.identity import Identity
from nnunet_fed.transport.channel.options import require_loopback, server_options
from nnunet_fed.transport.channel.tls import KeyFiles, Keys, server_credentials

logger = logging.getLogger(__name__)

NEW_CALLS, WAITING_CALLS = 16, 512
"""Calls of which it is found out at a time whose they are, which takes a fraction of a millisecond, and that wait."""


class AddressError(BusyError):
    """Another process listens at the address, or this machine does not have it at present."""


class Listener:
    """A gRPC server at an address.

    Args:
        address: ``host:port``; port 0 takes a free one.
        register: adds the service.
        sites: names in the certificates of those who may call.
        stranger: what another is told after its name, a sentence's end and what to do.
        keys: with which this server shows who it is; whoever calls must show a certificate too. ``None``: plain text,
            on a loopback address only; names are then believed.
        check: raises :class:`ConfigurationError` if the server's certificate is not the right one.
        revoked: file of the certificates that are no longer accepted (:mod:`nnunet_fed.certificates.deny_list`).
        meter: sees all calls, refused ones too.
        window: bytes that may arrive on a connection before they are read.

    Raises:
        ConfigurationError: the address is in use, or not allowed without TLS; a file for it is missing or wrong.
    """

    def __init__(
        self,
        address: str,
        register: Callable[[grpc.Server], None],
        sites: Sequence[str],
        stranger: str,
        keys: KeyFiles | None,
        check: Callable[[Keys], None],
        revoked: Path | None,
        meter: grpc.ServerInterceptor | None = None,
        window: int = CHUNK,
    ):
        try:
            place = Address.parse(address)
        except ValueError as error:
            raise ConfigurationError(f"{error}.") from None
        if keys is None:
            require_loopback(place)
        allow_connections()
        # the sites', those of who only reads, and those of whom nobody has looked at yet
        threads = SHARE * (len(sites) + 2) + NEW_CALLS
        workers = ThreadPoolExecutor(threads, thread_name_prefix="rpc")
        denied = DenyList(revoked) if revoked is not None else None
        self._calls = Calls(None if keys is None else Identity(sites, stranger, denied))
        guards = [self._calls] if meter is None else [meter, self._calls]  # the outermost, which sees refusals
        credentials = None if keys is None else server_credentials(keys, check)
        self._server = grpc.server(
            workers,
            options=server_options(window),
            interceptors=guards,
            maximum_concurrent_rpcs=threads + WAITING_CALLS,
        )
        register(self._server)
        try:
            port = (
                self._server.add_insecure_port(str(place))
                if credentials is None
                else self._server.add_secure_port(str(place), credentials)
            )
        except RuntimeError:
            port = 0
        if port == 0:
            _check_allowed(address)
            raise AddressError(
                f"Cannot listen on {address}: the port is in use, or the address is not this machine's. Stop the other "
                "process, or choose another address to listen on."
            )
        self.address = str(place._replace(port=port))

    def start(self) -> None:
        """Start to answer."""
        self._calls.start()
        self._server.start()
        logger.info("listening on %s", self.address)

    def stop(self, grace: float, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Take no more calls, let running ones end for ``grace`` seconds, then stop."""
        stopped = self._server.stop(grace)
        meanwhile()
        stopped.wait()
        self._calls.stop()


def _check_allowed(address: str) -> None:
    """Raise :class:`ConfigurationError` if this process may not listen there, which no other start would change."""
    try:
        family, kind, *_, place = socket.getaddrinfo(*Address.parse(address), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as one:
            one.bind(place)
    except PermissionError:
        raise ConfigurationError(
            f"Cannot listen on {address}: ports below 1024 are the system's. Choose another, or grant it "
            "(AmbientCapabilities=CAP_NET_BIND_SERVICE in the service's unit)."
        ) from None
    except OSError:
        return


def allow_connections() -> None:
    """Let this process have as many connections open as the system allows; on Windows there is no such limit."""
    try:
        import resource
    except ImportError:
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # of macOS, where "any number" is refused
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
