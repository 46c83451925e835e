"""Messages of uploads and downloads without copies that protobuf would make: as protobuf has them on the wire.

A message that holds data is a tag, a length and the bytes. Written here, it costs one copy instead of two, and is read
as a view of what has come. All others are left to protobuf. Source: ours; the format is
https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import grpc

from nnunet_fed.transport.proto import federation_pb2 as pb
from nnunet_fed.transport.proto.federation_pb2_grpc import (
    CoordinatorServicer,
    CoordinatorStub,
    PeerServicer,
    add_CoordinatorServicer_to_server,
    add_PeerServicer_to_server,
)
from nnunet_fed.transport.proto.federation_pb2_grpc import (
    PeerStub as GeneratedPeerStub,
)

M = TypeVar("M", pb.UploadChunk, pb.ResultChunk, pb.ModelChunk)

SERVICE, PEER_SERVICE = "nnunet_fed.v1.Coordinator", "nnunet_fed.v1.Peer"
_DATA_TAG = bytes(
    [pb.UploadChunk.DATA_FIELD_NUMBER << 3 | 2]
)  # 2: a length and so many bytes follow; all have one number


def write(message: M | memoryview) -> bytes:
    """Serialize a message, or data as the message that holds it."""
    if isinstance(message, memoryview):
        return b"".join((_DATA_TAG, _varint(len(message)), message))
    serialized: bytes = message.SerializeToString()
    return serialized


def _varint(number: int) -> bytes:
    digits = bytearray()
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*digits, number])


def reader(kind: type[M]) -> Callable[[bytes], M | memoryview]:
    """A deserializer: the data alone if a message holds data and nothing else."""

    def read(serialized: bytes) -> M | memoryview:
        for length in range(1, 6) if serialized[:1] == _DATA_TAG else ():
            size = len(serialized) - 1 - length
            if size >= 0 and serialized[1 : 1 + length] == _varint(size):
                return memoryview(serialized)[1 + length :]
        return kind.FromString(serialized)

    return read


class Stub(CoordinatorStub):  # type: ignore[misc]
    """The generated stub, whose streams take and give data as views."""

    def __init__(self, channel: grpc.Channel):
        super().__init__(channel)
        self.Upload = channel.stream_unary(
            f"/{SERVICE}/Upload", request_serializer=write, response_deserializer=pb.OfferReply.FromString
        )
        self.Result = channel.unary_stream(
            f"/{SERVICE}/Result",
            request_serializer=pb.ResultRequest.SerializeToString,
            response_deserializer=reader(pb.ResultChunk),
        )


def serve(service: CoordinatorServicer, server: grpc.Server) -> None:
    """Register a service; its streams take and give data as views."""
    add_CoordinatorServicer_to_server(service, server)
    streams = {
        "Upload": grpc.stream_unary_rpc_method_handler(
            service.Upload, reader(pb.UploadChunk), pb.OfferReply.SerializeToString
        ),
        "Result": grpc.unary_stream_rpc_method_handler(service.Result, pb.ResultRequest.FromString, write),
    }
    server.add_registered_method_handlers(SERVICE, streams)


class PeerStub(GeneratedPeerStub):  # type: ignore[misc]
    """The generated stub of a peer, whose streams take and give data as views."""

    def __init__(self, channel: grpc.Channel):
        super().__init__(channel)
        self.Push = channel.stream_unary(
            f"/{PEER_SERVICE}/Push", request_serializer=write, response_deserializer=pb.PeerReply.FromString
        )
        self.Pull = channel.unary_stream(
            f"/{PEER_SERVICE}/Pull",
            request_serializer=pb.PullRequest.SerializeToString,
            response_deserializer=reader(pb.ModelChunk),
        )


def serve_peer(service: PeerServicer, server: grpc.Server) -> None:
    """Register a peer's service; its streams take and give data as views."""
    add_PeerServicer_to_server(service, server)
    streams = {
        "Push": grpc.stream_unary_rpc_method_handler(
            service.Push, reader(pb.ModelChunk), pb.PeerReply.SerializeToString
        ),
        "Pull": grpc.unary_stream_rpc_method_handler(service.Pull, pb.PullRequest.FromString, write),
    }
    server.add_registered_method_handlers(PEER_SERVICE, streams)
