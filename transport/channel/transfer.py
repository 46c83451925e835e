"""Transfers: what is sent and taken, and where to go on after a connection broke. Source: ours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import xxhash

from nnunet_fed.exchange.payload import CHUNK, chunks, measure
from nnunet_fed.transport.proto import federation_pb2 as pb


class Outbound:
    """A payload that leaves: its bytes in memory, and how many of them have been handed to the network.

    Args:
        pieces: the payload.
    """

    def __init__(self, pieces: Iterable[bytes | memoryview]):
        self._pieces = list(pieces)
        self.digest, self.size = measure(self._pieces)
        self.reached = 0

    def messages(self, offer: pb.OfferRequest, size: int = CHUNK) -> Iterator[pb.UploadChunk | memoryview]:
        """The messages of an upload: the offer, then what follows its position."""
        yield pb.UploadChunk(offer=offer)
        yield from self.data(offer.position, size)

    def data(self, position: int = 0, size: int = CHUNK) -> Iterator[memoryview]:
        """The payload from a position on, in messages of at most ``size`` bytes."""
        self.reached = position
        for chunk in chunks(self._from(position), size):
            yield memoryview(chunk)
            self.reached += len(chunk)

    def _from(self, position: int) -> Iterator[memoryview]:
        for piece in self._pieces:
            if position < len(piece):
                yield memoryview(piece)[position:]
            position = max(0, position - len(piece))


def seconds_allowed(size: int) -> float:
    """Time allowed for a transfer: a minute and what 100 kB/s need."""
    return 60 + size / 100_000


def data_of(messages: Iterable[pb.UploadChunk | pb.ModelChunk | memoryview]) -> Iterator[bytes | memoryview]:
    """The bytes in the messages of an upload that follow the first."""
    for message in messages:
        yield message if isinstance(message, memoryview) else message.data


class Inbound:
    """A result that arrives, in one piece of memory; it is kept when a connection breaks, and filled up by the next."""

    def __init__(self) -> None:
        self.buffer = memoryview(b"")
        self.digest = ""
        self.reached = 0
        self._running = xxhash.xxh3_128()

    def start(self, header: pb.ResultHeader) -> None:
        """Make room, unless this goes on with what is there."""
        if header.position != self.reached or header.digest != self.digest or len(self.buffer) != header.size:
            self.buffer = np.empty(header.size, np.uint8).data
            self.digest, self.reached, self._running = header.digest, 0, xxhash.xxh3_128()

    def write(self, data: memoryview) -> None:
        """Append; raises :class:`ValueError` if there is more than the header said."""
        self.buffer[self.reached : self.reached + len(data)] = data
        self._running.update(data)
        self.reached += len(data)

    def is_whole(self) -> bool:
        """Whether what has arrived is what the header said. Else it starts anew."""
        whole = self.reached == len(self.buffer) and self._running.hexdigest() == self.digest
        if not whole:
            self.digest, self.reached = "", 0
        return whole
