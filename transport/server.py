"""The coordinator on gRPC."""

from __future__ import annotations

import errno
import json
import logging
import math
import mmap
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn, cast, get_args

import grpc

from nnunet_fed.admission import Verb
from nnunet_fed.coordinator import Coordinator, Purpose, Verdict
from nnunet_fed.errors import ConfigurationError, FederationError, NoRoomError
from nnunet_fed.payload import chunks
from nnunet_fed.revocation import DenyList
from nnunet_fed.spool import InterruptedUploadError, Upload
from nnunet_fed.store import Collective
from nnunet_fed.transport import federation_pb2 as pb
from nnunet_fed.transport.check_service import serve_checks
from nnunet_fed.transport.federation_pb2_grpc import CoordinatorServicer
from nnunet_fed.transport.frames import serve
from nnunet_fed.transport.health import serve_health
from nnunet_fed.transport.identity import IdentityInterceptor
from nnunet_fed.transport.metrics import Meter
from nnunet_fed.transport.options import PROTOCOL, SERVER_OPTIONS, require_loopback
from nnunet_fed.transport.tls import KeyFiles, server_credentials

logger = logging.getLogger(__name__)

LONGEST_WAIT = 20.0
"""Seconds for which one call may wait for a collective; the site then asks again. Short enough for any proxy."""


class CoordinatorServer:
    """Serve a coordinator.

    Args:
        coordinator: the state machine.
        address: ``host:port``; port 0 takes a free one.
        insecure: plain text, on a loopback address only; names are then believed.
        keys: with which the coordinator shows who it is; whoever calls must show a certificate too.
        revoked: file of the certificates that are no longer accepted (:mod:`nnunet_fed.revocation`).
        meter: counts calls and bytes.

    Raises:
        ConfigurationError: the address is in use, or not allowed without TLS; a file for it is missing or wrong.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        address: str,
        insecure: bool = False,
        keys: KeyFiles | None = None,
        revoked: Path | None = None,
        meter: Meter | None = None,
    ):
        if insecure == (keys is not None) or (insecure and revoked is not None):
            raise ConfigurationError(
                "Give either --cert, --key and --ca (and perhaps --revoked), with which the sites and the coordinator "
                "show each other who they are ('nnunet_fed certs' makes these files), or --insecure, for this machine "
                "only."
            )
        if insecure:
            require_loopback(address)
        port_text = address.rpartition(":")[2]
        if not port_text.isdecimal() or int(port_text) > 65535:  # gRPC would take the number modulo 65536
            raise ConfigurationError(f"'{address}' is no HOST:PORT, for example 127.0.0.1:7464.")
        # a site holds at most one waiting call, one upload or download, and short ones
        calls = 4 * len(coordinator.study.sites) + 8
        workers = ThreadPoolExecutor(calls, thread_name_prefix="rpc")
        denied = DenyList(revoked) if revoked is not None else None
        guards: list[grpc.ServerInterceptor] = [] if meter is None else [meter]  # the outermost, which sees refusals
        if keys is not None:
            guards.append(IdentityInterceptor(coordinator.study, denied))
        credentials = None if keys is None else server_credentials(keys, coordinator.study.sites)
        self._coordinator = coordinator
        self._server = grpc.server(workers, options=SERVER_OPTIONS, interceptors=guards, maximum_concurrent_rpcs=calls)
        serve(_Service(coordinator), self._server)
        serve_checks(coordinator, self._server)
        serve_health(self._server)
        try:
            port = (
                self._server.add_insecure_port(address)
                if credentials is None
                else self._server.add_secure_port(address, credentials)
            )
        except RuntimeError:
            port = 0
        if port == 0:
            raise ConfigurationError(
                f"Cannot listen on {address}: the port is in use, or the address is not this machine's. Stop the other "
                "process, or choose another --listen."
            )
        self.address = f"{address.rpartition(':')[0]}:{port}"

    def start(self) -> None:
        """Start to answer."""
        self._server.start()
        logger.info("listening on %s", self.address)

    def stop(self, grace: float = 20.0) -> None:
        """Take no more calls, let running ones end for ``grace`` seconds, then stop. Who waits is sent away at once."""
        stopped = self._server.stop(grace)
        self._coordinator.drain()
        stopped.wait()


class _Service(CoordinatorServicer):  # type: ignore[misc]
    def __init__(self, coordinator: Coordinator):
        self._coordinator = coordinator

    def Join(self, request: pb.JoinRequest, context: grpc.ServicerContext) -> pb.JoinReply:  # noqa: N802
        if request.protocol != PROTOCOL:
            _refuse(
                context,
                f"Site '{request.site}' speaks version {request.protocol} of the protocol, the coordinator version "
                f"{PROTOCOL}. Install the same version of nnunet_fed everywhere.",
            )
        with _Refusals(context):
            if request.purpose not in get_args(Purpose):
                _refuse(context, f"A run cannot be for {request.purpose!r}.")
            seat = self._coordinator.join(
                request.site,
                cast(Purpose, request.purpose),
                request.digest,
                request.configuration,
                request.trainer,
                request.fresh,
            )
            return pb.JoinReply(run=seat["run"], attempt=seat["attempt"], study=json.dumps(seat["study"]))

    def Offer(self, request: pb.OfferRequest, context: grpc.ServicerContext) -> pb.OfferReply:  # noqa: N802
        with _Refusals(context):
            verdict = self._offer(request, context)
            position = self._coordinator.spool.position(_upload(request)) if verdict == "send" else 0
            return pb.OfferReply(verdict=verdict, position=position)

    def _offer(self, offer: pb.OfferRequest, context: grpc.ServicerContext) -> Verdict:
        if offer.verb not in get_args(Verb):
            _refuse(context, f"There is no verb {offer.verb!r}.")
        return self._coordinator.offer(
            offer.run, offer.key, offer.site, cast(Verb, offer.verb), offer.weight, offer.digest, offer.size
        )

    def Upload(  # noqa: N802
        self, requests: Iterator[pb.UploadChunk | memoryview], context: grpc.ServicerContext
    ) -> pb.OfferReply:
        with _Refusals(context):
            first = next(requests, None)
            if not isinstance(first, pb.UploadChunk):
                _refuse(context, "An upload begins with an offer.", grpc.StatusCode.INVALID_ARGUMENT)
            offer, started = first.offer, time.monotonic()
            verdict = self._offer(offer, context)
            if verdict != "send":
                return pb.OfferReply(verdict=verdict)
            payload = self._receive(offer, requests, context)
            verdict = self._coordinator.accept(
                offer.run, offer.key, offer.site, cast(Verb, offer.verb), offer.weight, offer.digest, payload,
                time.monotonic() - started,
            )  # fmt: skip
            return pb.OfferReply(verdict=verdict)

    def _receive(
        self, offer: pb.OfferRequest, requests: Iterator[pb.UploadChunk | memoryview], context: grpc.ServicerContext
    ) -> Path:
        spool = self._coordinator.spool
        with spool.receive(_upload(offer), offer.position) as receiver:
            for request in requests:
                data = request if isinstance(request, memoryview) else request.data
                if receiver.written + len(data) > offer.size:
                    spool.discard(receiver)
                    break
                receiver.write(data)
            else:
                if receiver.is_whole():
                    return spool.complete(receiver)
                if receiver.written == offer.size:  # else the connection broke, and another may go on
                    spool.discard(receiver)
        text = f"The upload of '{offer.key}' did not arrive as it was offered."
        _refuse(context, text, grpc.StatusCode.DATA_LOSS)

    def Result(  # noqa: N802
        self, request: pb.ResultRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ResultChunk | memoryview]:
        with _Refusals(context):
            seconds = min(max(request.wait_seconds, 0.0), LONGEST_WAIT) if math.isfinite(request.wait_seconds) else 0.0
            collective = self._coordinator.wait(request.run, request.key, seconds)
            if collective is None:
                _refuse(context, f"Nobody has contributed to '{request.key}'.", grpc.StatusCode.NOT_FOUND)
            header, result = self._header(collective), memoryview(b"")
            if collective.status == "closed":
                try:
                    with self._coordinator.result_file(collective).open("rb") as file:
                        result = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                except FileNotFoundError:  # deleted since
                    header.status = "pruned"
                if request.digest == collective.digest and request.position <= len(result):
                    header.position = request.position
            yield pb.ResultChunk(header=header)
            for chunk in chunks([result[header.position :]]):
                yield memoryview(chunk)

    def _header(self, collective: Collective) -> pb.ResultHeader:
        waiting = collective.status == "open"
        missing = self._coordinator.missing(collective) if waiting else []
        return pb.ResultHeader(
            status=collective.status,
            digest=collective.digest or "",
            size=collective.size or 0,
            error=collective.error or "",
            missing=[self._coordinator.doing(site) for site in missing],
            closes_at=self._coordinator.closes_at(collective) if waiting else 0.0,
            weights=self._coordinator.weights(collective),
        )

    def Newest(self, request: pb.NewestRequest, context: grpc.ServicerContext) -> pb.NewestReply:  # noqa: N802
        with _Refusals(context):
            return pb.NewestReply(key=self._coordinator.newest(request.run, request.name) or "")

    def Report(self, request: pb.ReportRequest, context: grpc.ServicerContext) -> pb.Empty:  # noqa: N802
        with _Refusals(context):
            if request.progress:
                try:
                    self._coordinator.report(request.site, json.loads(request.progress))
                except (ValueError, RecursionError):
                    _refuse(context, "A site's progress is JSON.", grpc.StatusCode.INVALID_ARGUMENT)
            if request.note:
                self._coordinator.note(request.run, request.site, request.note)
            return pb.Empty()

    def Leave(self, request: pb.LeaveRequest, context: grpc.ServicerContext) -> pb.Empty:  # noqa: N802
        with _Refusals(context):
            self._coordinator.leave(request.run, request.site, request.reason)
            return pb.Empty()

    def Status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.StatusReply:  # noqa: N802
        with _Refusals(context):
            return pb.StatusReply(status=json.dumps(self._coordinator.status(request.record)))


def _upload(offer: pb.OfferRequest) -> Upload:
    return Upload(offer.run, offer.key, offer.site, offer.digest, offer.size)


class _Refusals:
    """Turn errors into gRPC's; their text is for the reader at the site."""

    def __init__(self, context: grpc.ServicerContext):
        self._context = context

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, NoRoomError):
            _refuse(self._context, str(error), grpc.StatusCode.RESOURCE_EXHAUSTED)
        elif isinstance(error, FederationError):
            _refuse(self._context, str(error))
        elif isinstance(error, InterruptedUploadError):
            _refuse(self._context, "This upload goes on elsewhere.", grpc.StatusCode.ABORTED)
        elif _is_full(error):
            text = f"The coordinator's disk is full ({error}). Free some of it there; the sites go on by themselves."
            _refuse(self._context, text, grpc.StatusCode.RESOURCE_EXHAUSTED)


def _is_full(error: BaseException | None) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, sqlite3.OperationalError) and "full" in str(error)


def _refuse(
    context: grpc.ServicerContext, text: str, code: grpc.StatusCode = grpc.StatusCode.FAILED_PRECONDITION
) -> NoReturn:
    logger.warning("refused: %s", text)
    context.abort(code, text)
    raise AssertionError("abort does not return")
