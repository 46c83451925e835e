"""What the coordinator answers to ``nnunet_fed check``. Source: ours."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import grpc

from nnunet_fed import __version__
from nnunet_fed.coordinator.coordinator import Coordinator
from nnunet_fed.errors import FederationError
from nnunet_fed.study.table import NEWEST_PROTOCOL
from nnunet_fed.transport.channel.noise import noise
from nnunet_fed.transport.channel.options import spoken_protocol
from nnunet_fed.transport.channel.refusals import refuse
from nnunet_fed.transport.proto import check_pb2 as pb
from nnunet_fed.transport.proto.check_pb2_grpc import CheckServicer, add_CheckServicer_to_server

MOST_NOISE = 64 * 2**20
"""Bytes that one call may send, or ask for."""


class CheckService(CheckServicer):  # type: ignore[misc]
    """Versions, the clock, and bytes to and fro; none of it touches a round."""

    def __init__(self, coordinator: Coordinator):
        self._coordinator = coordinator

    def Introduce(self, request: pb.IntroduceRequest, context: grpc.ServicerContext) -> pb.IntroduceReply:  # noqa: N802
        """Note the versions of a site, and tell it those of the others."""
        try:
            versions = self._coordinator.introduce(request.site, dict(request.versions))
        except FederationError as error:
            refuse(context, str(error))
        return pb.IntroduceReply(
            protocol=spoken_protocol(request.protocol, request.newest_protocol) or NEWEST_PROTOCOL,
            version=__version__,
            now=time.time(),
            planning_run=self._coordinator.planning_run() or "",
            versions=json.dumps(versions),
        )

    def Send(self, requests: Iterator[pb.Noise], context: grpc.ServicerContext) -> pb.NoiseCount:  # noqa: N802
        """Count bytes."""
        size = 0
        for request in requests:
            size += len(request.data)
            _check_size(size, context)
        return pb.NoiseCount(size=size)

    def Receive(self, request: pb.NoiseRequest, context: grpc.ServicerContext) -> Iterator[pb.Noise]:  # noqa: N802
        """Send bytes."""
        _check_size(request.size, context)
        yield from noise(request.size)


def _check_size(size: int, context: grpc.ServicerContext) -> None:
    if size > MOST_NOISE:
        refuse(context, f"A check takes {MOST_NOISE} bytes at most.", grpc.StatusCode.INVALID_ARGUMENT)


def serve_checks(coordinator: Coordinator, server: grpc.Server) -> None:
    """Let a server answer them."""
    add_CheckServicer_to_server(CheckService(coordinator), server)
