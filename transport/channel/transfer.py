"""Transfers: what is sent and taken, and where to go on after a connection broke. Source: ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import xxhash

from nnunet_fed.exchange.payload import CHUNK, chunks, measure
from nnunet_fed.exchange.uploads import Spool, Upload
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


def received(
    spool: Spool,
    upload: Upload,
    position: int,
    messages: Iterable[pb.UploadChunk | pb.ModelChunk | memoryview],
    arrived: Callable[[int], None] = lambda number: None,
) -> Path | None:
    """Take a payload's bytes from ``position`` on into a file; ``None``: they are not what was offered, or too few.

    Args:
        spool: where the file is made.
        upload: what was offered.
        position: how many bytes are there.
        messages: whose data follow.
        arrived: hears how many bytes are there, with each message.

    Raises:
        NoRoomError: see :meth:`nnunet_fed.exchange.uploads.Spool.receive`, as for the next two.
        InterruptedUploadError: the same payload comes another way.
        OSError: the disk is full, or broken.
    """
    with spool.receive(upload, position) as receiver:
        for message in messages:
            data = message if isinstance(message, memoryview) else message.data
            if receiver.written + len(data) > upload.size:
                spool.discard(receiver)
                return None
            receiver.write(data)
            arrived(receiver.written)
        if receiver.is_whole():
            return spool.complete(receiver)
        if receiver.written == upload.size:  # else the connection broke, and another may go on
            spool.discard(receiver)
    return None


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
