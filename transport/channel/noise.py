"""Random bytes with which both ends of a connection see that data pass, and how fast. Source: ours."""

from __future__ import annotations

import os
from collections.abc import Iterator

from nnunet_fed.exchange.payload import CHUNK
from nnunet_fed.transport.proto import check_pb2 as pb


def noise(size: int) -> Iterator[pb.Noise]:
    """Random bytes, which no line on the way can compress, in messages of at most :data:`CHUNK` bytes."""
    block = os.urandom(min(size, CHUNK))
    for start in range(0, size, CHUNK):
        yield pb.Noise(data=block[: size - start])
