"""The coordinator on gRPC."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import grpc

from nnunet_fed.coordinator.coordinator import Coordinator
from nnunet_fed.coordinator.members import Purpose
from nnunet_fed.coordinator.store import Collective
from nnunet_fed.coordinator.verdict import Offer
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.exchange.communicator import Held, Verb
from nnunet_fed.exchange.payload import chunks
from nnunet_fed.logs import printable
from nnunet_fed.strict_json import to_json
from nnunet_fed.study.federation import Fold
from nnunet_fed.study.table import NEWEST_PROTOCOL, OLDEST_PROTOCOL
from nnunet_fed.transport.channel.listener import Listener
from nnunet_fed.transport.channel.options import message_bytes, spoken_protocol
from nnunet_fed.transport.channel.refusals import Refusals, refuse
from nnunet_fed.transport.channel.tls import KeyFiles, Keys
from nnunet_fed.transport.channel.transfer import data_of
from nnunet_fed.transport.channel.zero_copy_streams import serve
from nnunet_fed.transport.coordinator.check_service import serve_checks
from nnunet_fed.transport.coordinator.health import serve_health
from nnunet_fed.transport.coordinator.metrics import Meter
from nnunet_fed.transport.proto import federation_pb2 as pb
from nnunet_fed.transport.proto.federation_pb2_grpc import CoordinatorServicer

LONGEST_PROGRESS = 10_000
"""Characters of what a site says of what it is doing."""
LONGEST_WAIT = 20.0
"""Seconds for which one call may wait for a collective; the site then asks again. Short enough for any proxy."""


class CoordinatorServer:
    """Serve a coordinator.

    Args:
        coordinator: the state machine.
        address: ``host:port``; port 0 takes a free one.
        insecure: plain text, on a loopback address only; names are then believed.
        keys: with which the coordinator shows who it is; whoever calls must show a certificate too.
        revoked: file of the certificates that are no longer accepted (:mod:`nnunet_fed.certificates.deny_list`).
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
        sites = coordinator.study.sites
        self._coordinator = coordinator

        def register(server: grpc.Server) -> None:
            serve(_Service(coordinator), server)
            serve_checks(coordinator, server)
            serve_health(server)

        self._listener = Listener(
            address,
            register,
            sites,
            f"is not a site of the study '{coordinator.study.name}'. Use the certificate of a site, or add the site to "
            "federation.toml at the coordinator and restart it.",
            keys,
            lambda own: _check_certificate(own, sites),
            revoked,
            meter,
            message_bytes(len(sites)),
        )
        self.address = self._listener.address

    def start(self) -> None:
        """Start to answer."""
        self._listener.start()

    def stop(self, grace: float = 20.0) -> None:
        """Take no more calls, let running ones end for ``grace`` seconds, then stop. Who waits is sent away at once."""
        self._listener.stop(grace, meanwhile=self._coordinator.drain)


def _check_certificate(keys: Keys, sites: Sequence[str]) -> None:
    if keys.owner.name in sites:
        raise ConfigurationError(
            f"{keys.files.certificate} is the certificate of site '{keys.owner.name}': the coordinator needs one of "
            "its own ('nnunet_fed certs site DIR coordinator --host NAME')."
        )


class _Service(CoordinatorServicer):  # type: ignore[misc]
    def __init__(self, coordinator: Coordinator):
        self._coordinator = coordinator
        self._message_bytes = message_bytes(len(coordinator.study.sites))

    def Join(self, request: pb.JoinRequest, context: grpc.ServicerContext) -> pb.JoinReply:  # noqa: N802
        protocol = spoken_protocol(request.protocol, request.newest_protocol)
        if protocol is None:
            refuse(
                context,
                f"Site '{request.site}' speaks version {request.protocol} of the protocol, the coordinator versions "
                f"{OLDEST_PROTOCOL} to {NEWEST_PROTOCOL}. Install the same version of nnunet_fed everywhere.",
            )
        with Refusals(context, "The coordinator's disk"):
            if request.purpose not in get_args(Purpose):
                refuse(context, f"A run cannot be for {request.purpose!r}.")
            study = self._coordinator.study.stored(protocol)
            run = self._coordinator.join(
                request.site,
                cast(Purpose, request.purpose),
                request.digest,
                request.configuration,
                request.trainer,
                request.fresh,
                _fold_of(request, context),
                can_go_back=protocol > OLDEST_PROTOCOL,
            )
            held = _held_of(request)
            return pb.JoinReply(
                run=run,
                attempt=self._coordinator.attempt,
                study=json.dumps(study),
                protocol=protocol,
                generation=self._coordinator.generation(run),
                standing="" if held is None else self._coordinator.standing(run, request.site, held),
            )

    def Offer(self, request: pb.OfferRequest, context: grpc.ServicerContext) -> pb.OfferReply:  # noqa: N802
        with Refusals(context, "The coordinator's disk"):
            offer = _offer_of(request, context)
            verdict = self._coordinator.offer(offer)
            position = self._coordinator.position(offer) if verdict == "send" else 0
            return pb.OfferReply(verdict=verdict, position=position)

    def Upload(  # noqa: N802
        self, requests: Iterator[pb.UploadChunk | memoryview], context: grpc.ServicerContext
    ) -> pb.OfferReply:
        with Refusals(context, "The coordinator's disk"):
            first = next(requests, None)
            if not isinstance(first, pb.UploadChunk):
                refuse(context, "An upload begins with an offer.", grpc.StatusCode.INVALID_ARGUMENT)
            offer = _offer_of(first.offer, context)
            verdict = self._coordinator.take(offer, first.offer.position, data_of(requests))
            if verdict is None:
                text = f"The upload of '{offer.key}' did not arrive as it was offered."
                refuse(context, text, grpc.StatusCode.DATA_LOSS)
            return pb.OfferReply(verdict=verdict)

    def Result(  # noqa: N802
        self, request: pb.ResultRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ResultChunk | memoryview]:
        with Refusals(context, "The coordinator's disk"):
            seconds = min(max(request.wait_seconds, 0.0), LONGEST_WAIT) if math.isfinite(request.wait_seconds) else 0.0
            collective = self._coordinator.wait(request.run, request.key, seconds)
            if collective is None:
                refuse(context, f"Nobody has contributed to '{request.key}'.", grpc.StatusCode.NOT_FOUND)
            header, result = self._header(collective, request.site), memoryview(b"")
            if header.status == "closed":
                try:
                    with self._coordinator.result_file(collective).open("rb") as file:
                        result = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                except FileNotFoundError:  # deleted since
                    self._coordinator.wait(request.run, request.key, 0)  # a planning that begins anew says so
                    header.status = "pruned"
                if request.digest == collective.digest and request.position <= len(result):
                    header.position = request.position
            yield pb.ResultChunk(header=header)
            for chunk in chunks([result[header.position :]], self._message_bytes):
                yield memoryview(chunk)
            self._coordinator.wait_until_saved(collective)

    def _header(self, collective: Collective, site: str) -> pb.ResultHeader:
        outlook = self._coordinator.outlook(collective)
        turned_down = self._coordinator.turned_down(collective, site)
        return pb.ResultHeader(
            status="failed" if turned_down else collective.status,
            digest=collective.digest or "",
            size=collective.size or 0,
            error=turned_down or collective.error or "",
            missing=outlook.missing.values(),
            closes_at=outlook.closes_at or 0.0,
            weights=outlook.weights,
            wanted=site in outlook.missing,
        )

    def Newest(self, request: pb.NewestRequest, context: grpc.ServicerContext) -> pb.NewestReply:  # noqa: N802
        with Refusals(context, "The coordinator's disk"):
            return pb.NewestReply(key=self._coordinator.newest(request.run, request.name) or "")

    def Report(self, request: pb.ReportRequest, context: grpc.ServicerContext) -> pb.Empty:  # noqa: N802
        with Refusals(context, "The coordinator's disk"):
            if request.progress:
                self._coordinator.report(request.site, _progress_of(request, context), request.run)
            if request.note:
                self._coordinator.note(request.run, request.site, printable(request.note))
            return pb.Empty()

    def Leave(self, request: pb.LeaveRequest, context: grpc.ServicerContext) -> pb.Empty:  # noqa: N802
        with Refusals(context, "The coordinator's disk"):
            self._coordinator.leave(request.run, request.site, printable(request.reason), request.returns)
            return pb.Empty()

    def Status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.StatusReply:  # noqa: N802
        with Refusals(context, "The coordinator's disk"):
            protocol = spoken_protocol(OLDEST_PROTOCOL, request.newest_protocol)
            protocol = protocol or OLDEST_PROTOCOL
            if request.record and request.page:
                page, following = self._coordinator.record_page(request.page, protocol)
                return pb.StatusReply(status=to_json(page), next=following)
            return pb.StatusReply(status=to_json(self._coordinator.status(request.record, protocol)))


def _progress_of(request: pb.ReportRequest, context: grpc.ServicerContext) -> dict[str, Any]:
    """What a site says of what it is doing: a table of short texts and numbers, which others read on their screens."""
    try:
        progress = json.loads(request.progress) if len(request.progress) <= LONGEST_PROGRESS else None
    except (ValueError, RecursionError):
        progress = None
    if not isinstance(progress, dict) or not all(
        value is None or isinstance(value, str | int | float) for value in progress.values()
    ):
        text = f"A site's progress is JSON: a table of texts and numbers, of {LONGEST_PROGRESS} characters at most."
        refuse(context, text, grpc.StatusCode.INVALID_ARGUMENT)
    return {name: printable(value) if isinstance(value, str) else value for name, value in progress.items()}


def _fold_of(request: pb.JoinRequest, context: grpc.ServicerContext) -> Fold | None:
    """The fold that a run is for; ``None``: the study's."""
    if request.fold in ("", "all"):
        return "all" if request.fold else None
    if not request.fold.isdecimal():
        refuse(context, f"A run cannot be for the fold {request.fold[:20]!r}.")
    return int(request.fold)


def _offer_of(request: pb.OfferRequest, context: grpc.ServicerContext) -> Offer:
    if request.verb not in get_args(Verb):
        refuse(context, f"There is no verb {request.verb!r}.")
    verb = cast(Verb, request.verb)
    return Offer(
        request.run,
        request.key,
        request.site,
        verb,
        request.weight,
        request.digest,
        request.size,
        _held_of(request),
        request.correct,
    )


def _held_of(request: pb.JoinRequest | pb.OfferRequest) -> Held | None:
    return Held(request.held.key, request.held.digest) if request.HasField("held") else None
