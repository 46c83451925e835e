"""What every gRPC server of ours has: an address, callers who show who they are, and refusals that can be read."""

from __future__ import annotations

import errno
import logging
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import grpc

from nnunet_fed.addresses import host_and_port
from nnunet_fed.certificates.deny_list import DenyList
from nnunet_fed.errors import ConfigurationError, FederationError, NoRoomError
from nnunet_fed.exchange.payload import CHUNK
from nnunet_fed.exchange.uploads import InterruptedUploadError
from nnunet_fed.transport.channel.identity import IdentityInterceptor
from nnunet_fed.transport.channel.options import require_loopback, server_options
from nnunet_fed.transport.channel.tls import KeyFiles, Keys, server_credentials

logger = logging.getLogger(__name__)


class AddressError(ConfigurationError):
    """Another process listens at the address."""


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
            host_and_port(address)  # gRPC would take a port modulo 65536
        except ValueError as error:
            raise ConfigurationError(f"{error}.") from None
        if keys is None:
            require_loopback(address)
        # a site holds at most one waiting call, one upload or download, and short ones
        calls = 4 * len(sites) + 8
        workers = ThreadPoolExecutor(calls, thread_name_prefix="rpc")
        denied = DenyList(revoked) if revoked is not None else None
        guards: list[grpc.ServerInterceptor] = [] if meter is None else [meter]  # the outermost, which sees refusals
        if keys is not None:
            guards.append(IdentityInterceptor(sites, stranger, denied))
        credentials = None if keys is None else server_credentials(keys, check)
        self._server = grpc.server(
            workers, options=server_options(window), interceptors=guards, maximum_concurrent_rpcs=calls
        )
        register(self._server)
        try:
            port = (
                self._server.add_insecure_port(address)
                if credentials is None
                else self._server.add_secure_port(address, credentials)
            )
        except RuntimeError:
            port = 0
        if port == 0:
            raise AddressError(
                f"Cannot listen on {address}: the port is in use, or the address is not this machine's. Stop the other "
                "process, or choose another address to listen on."
            )
        self.address = f"{address.rpartition(':')[0]}:{port}"

    def start(self) -> None:
        """Start to answer."""
        self._server.start()
        logger.info("listening on %s", self.address)

    def stop(self, grace: float, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Take no more calls, let running ones end for ``grace`` seconds, then stop."""
        stopped = self._server.stop(grace)
        meanwhile()
        stopped.wait()


class Refusals:
    """Turn errors into gRPC's; their text is for the reader at the caller's.

    Args:
        context: of the call.
        disk: what may be full, as a sentence begins.
    """

    def __init__(self, context: grpc.ServicerContext, disk: str):
        self._context = context
        self._disk = disk

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, NoRoomError):
            refuse(self._context, str(error), grpc.StatusCode.RESOURCE_EXHAUSTED)
        elif isinstance(error, FederationError):
            refuse(self._context, str(error))
        elif isinstance(error, InterruptedUploadError):
            refuse(self._context, "This upload goes on elsewhere.", grpc.StatusCode.ABORTED)
        elif _is_full(error):
            text = f"{self._disk} is full ({error}). Free some of it there; the sites go on by themselves."
            refuse(self._context, text, grpc.StatusCode.RESOURCE_EXHAUSTED)


def _is_full(error: BaseException | None) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, sqlite3.OperationalError) and "full" in str(error)


def refuse(
    context: grpc.ServicerContext, text: str, code: grpc.StatusCode = grpc.StatusCode.FAILED_PRECONDITION
) -> NoReturn:
    """End a call with a sentence for the caller, which is logged here."""
    logger.warning("refused: %s", text)
    context.abort(code, text)
    raise AssertionError("abort does not return")
