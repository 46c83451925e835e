"""A site's side of a transfer: what it sends and takes, and where to go on after a connection broke. Source: ours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import xxhash

from nnunet_fed.payload import chunks, measure
from nnunet_fed.transport import federation_pb2 as pb


class Outbound:
    """A payload that leaves: its bytes in memory, and how many of them have been handed to the network.

    Args:
        pieces: the payload.
    """

    def __init__(self, pieces: Iterable[bytes | memoryview]):
        self._pieces = list(pieces)
        self.digest, self.size = measure(self._pieces)
        self.reached = 0

    def messages(self, offer: pb.OfferRequest) -> Iterator[pb.UploadChunk | memoryview]:
        """The messages of an upload: the offer, then what follows its position."""
        yield pb.UploadChunk(offer=offer)
        self.reached = offer.position
        for chunk in chunks(self._from(offer.position)):
            yield memoryview(chunk)
            self.reached += len(chunk)

    def _from(self, position: int) -> Iterator[memoryview]:
        for piece in self._pieces:
            if position < len(piece):
                yield memoryview(piece)[position:]
            position = max(0, position - len(piece))


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
            self.buffer = memoryview(bytearray(header.size))
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
