"""The coordinator on gRPC."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn, cast, get_args

import grpc

from nnunet_fed.coordinator import Coordinator, Purpose, Verdict
from nnunet_fed.errors import ConfigurationError, FederationError
from nnunet_fed.payload import CHUNK
from nnunet_fed.reduction import Verb
from nnunet_fed.revocation import DenyList
from nnunet_fed.store import Collective
from nnunet_fed.transport import federation_pb2 as pb
from nnunet_fed.transport.check_service import serve_checks
from nnunet_fed.transport.federation_pb2_grpc import CoordinatorServicer, add_CoordinatorServicer_to_server
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
        workers = ThreadPoolExecutor(4 * len(coordinator.study.sites) + 8, thread_name_prefix="rpc")
        denied = DenyList(revoked) if revoked is not None else None
        guards: list[grpc.ServerInterceptor] = [] if meter is None else [meter]  # the outermost, which sees refusals
        if keys is not None:
            guards.append(IdentityInterceptor(coordinator.study, denied))
        credentials = None if keys is None else server_credentials(keys, coordinator.study.sites)
        self._server = grpc.server(workers, options=SERVER_OPTIONS, interceptors=guards)
        add_CoordinatorServicer_to_server(_Service(coordinator), self._server)
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

    def stop(self, grace: float = 5.0) -> None:
        """Let running calls end for ``grace`` seconds, then stop."""
        self._server.stop(grace).wait()


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
            return pb.OfferReply(verdict=self._offer(request, context))

    def _offer(self, offer: pb.OfferRequest, context: grpc.ServicerContext) -> Verdict:
        if offer.verb not in get_args(Verb):
            _refuse(context, f"There is no verb {offer.verb!r}.")
        return self._coordinator.offer(
            offer.run, offer.key, offer.site, cast(Verb, offer.verb), offer.weight, offer.digest, offer.size
        )

    def Upload(self, requests: Iterator[pb.UploadChunk], context: grpc.ServicerContext) -> pb.OfferReply:  # noqa: N802
        with _Refusals(context):
            offer = next(requests).offer
            verdict = self._offer(offer, context)
            if verdict != "send":
                return pb.OfferReply(verdict=verdict)
            part = self._coordinator.upload_path(offer.run, offer.key, offer.site)
            try:
                self._spool(part, offer, requests, context)
                verdict = self._coordinator.accept(
                    offer.run, offer.key, offer.site, cast(Verb, offer.verb), offer.weight, offer.digest, part
                )
            finally:
                part.unlink(missing_ok=True)
            return pb.OfferReply(verdict=verdict)

    def _spool(
        self, part: Path, offer: pb.OfferRequest, requests: Iterator[pb.UploadChunk], context: grpc.ServicerContext
    ) -> None:
        digest, size = hashlib.sha256(), 0
        with part.open("wb") as file:
            for request in requests:
                size += len(request.data)
                if size > offer.size:
                    break
                digest.update(request.data)
                file.write(request.data)
        if size != offer.size or digest.hexdigest() != offer.digest:
            text = f"The upload of '{offer.key}' did not arrive as it was offered."
            _refuse(context, text, grpc.StatusCode.DATA_LOSS)

    def Result(self, request: pb.ResultRequest, context: grpc.ServicerContext) -> Iterator[pb.ResultChunk]:  # noqa: N802
        with _Refusals(context):
            seconds = min(max(request.wait_seconds, 0.0), LONGEST_WAIT)
            collective = self._coordinator.wait(request.run, request.key, seconds)
            if collective is None:
                _refuse(context, f"Nobody has contributed to '{request.key}'.", grpc.StatusCode.NOT_FOUND)
            yield pb.ResultChunk(header=self._header(collective))
            if collective.status == "closed":
                with self._coordinator.result_file(collective).open("rb") as file:
                    while data := file.read(CHUNK):
                        yield pb.ResultChunk(data=data)

    def _header(self, collective: Collective) -> pb.ResultHeader:
        waiting = collective.status == "open"
        return pb.ResultHeader(
            status=collective.status,
            digest=collective.digest or "",
            size=collective.size or 0,
            error=collective.error or "",
            missing=[self._coordinator.doing(site) for site in self._coordinator.missing(collective)]
            if waiting
            else [],
            closes_at=self._coordinator.closes_at(collective) if waiting else 0.0,
            weights=self._coordinator.weights(collective),
        )

    def Newest(self, request: pb.NewestRequest, context: grpc.ServicerContext) -> pb.NewestReply:  # noqa: N802
        with _Refusals(context):
            return pb.NewestReply(key=self._coordinator.newest(request.run, request.name) or "")

    def Report(self, request: pb.ReportRequest, context: grpc.ServicerContext) -> pb.Empty:  # noqa: N802
        with _Refusals(context):
            if request.progress:
                self._coordinator.report(request.site, json.loads(request.progress))
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


class _Refusals:
    """Turn the core's errors into gRPC's; their text is for the reader at the site."""

    def __init__(self, context: grpc.ServicerContext):
        self._context = context

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, FederationError):
            _refuse(self._context, str(error))


def _refuse(
    context: grpc.ServicerContext, text: str, code: grpc.StatusCode = grpc.StatusCode.FAILED_PRECONDITION
) -> NoReturn:
    logger.warning("refused: %s", text)
    context.abort(code, text)
    raise AssertionError("abort does not return")
