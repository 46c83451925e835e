"""gRPC's health service (grpc.health.v1), for load balancers, ``grpc_health_probe`` and the like."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health, health_pb2_grpc

from nnunet_fed.transport.channel.refusals import refuse


class HealthService(health.HealthServicer):  # type: ignore[misc]
    """The library's, but for ``Watch``: each watcher would hold one of the server's threads for ever."""

    def Watch(self, request: object, context: grpc.ServicerContext, *_: object) -> None:  # noqa: N802
        """Refused."""
        refuse(context, "Ask again with Check instead of Watch.", grpc.StatusCode.UNIMPLEMENTED)


def serve_health(server: grpc.Server) -> None:
    """Let a server tell that it serves; one that stops does not answer at all."""
    health_pb2_grpc.add_HealthServicer_to_server(HealthService(), server)
