"""Uploads on their way into the coordinator: files that grow, and from which an upload goes on where it broke.

A partial file belongs to one payload of one site for one collective (run, key, site and digest make its name). It
outlives connections and the coordinator, and goes when the payload is complete, when it turns out damaged, when the
site offers another one, when the collective closes or the site leaves, and on a restart after :data:`OLDEST`.
Thread-safe. Source: ours.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import xxhash

from nnunet_fed.errors import NoRoomError
from nnunet_fed.files import PARTIAL, move, open_private

OLDEST = 24 * 3600.0
"""Seconds without a byte after which a restart of the coordinator deletes a partial file."""
UPLOADS = 2
"""That one site may have under way in a run at a time."""
INTERRUPTED = 4
"""Uploads of one site in a run that may go on after a connection broke."""
READ = 1 << 24
"""Bytes of a partial file digested at a time when an upload goes on."""


class InterruptedUploadError(Exception):
    """The same payload arrives through another connection, which goes on with it."""


@dataclass(frozen=True)
class Upload:
    """What makes the name of a partial file."""

    run: str
    key: str
    site: str
    digest: str
    size: int

    @property
    def collective(self) -> str:
        """Begins the names of all files of the collective."""
        return f"{_short(self.run)}.{_short(self.key)}."

    @property
    def contribution(self) -> str:
        """Begins the names of all files of the site for the collective."""
        return f"{self.collective}{_short(self.site)}."

    @property
    def file(self) -> str:
        """Name of the partial file."""
        return f"{self.contribution}{_short(self.digest)}{PARTIAL}"


def _short(text: str) -> str:
    return str(xxhash.xxh3_64_hexdigest(text.encode()))


class Receiver:
    """Takes the bytes of one upload."""

    def __init__(self, upload: Upload, path: Path):
        self.upload = upload
        self.path = path
        self.written = 0
        self._digest = xxhash.xxh3_128()
        self._file: BinaryIO | None = None
        self._stopped = False
        self._lock = threading.Lock()

    def start(self, position: int) -> None:
        """Go on after the first ``position`` bytes of the file, or make one.

        Raises:
            InterruptedUploadError: the file does not have so many, or another connection has taken over.
        """
        with self._lock:
            if self._stopped:
                raise InterruptedUploadError
            try:
                self._file = open_private(self.path, "r+b" if position else "w+b")
            except FileNotFoundError:
                raise InterruptedUploadError from None
            while self.written < position and (read := self._file.read(min(READ, position - self.written))):
                self._digest.update(read)
                self.written += len(read)
            if self.written < position:
                raise InterruptedUploadError
            if position:  # truncated to nothing, ext4 would write the whole file to the disk when it is closed
                self._file.truncate()

    def write(self, data: bytes | memoryview) -> None:
        """Append.

        Raises:
            InterruptedUploadError: another connection has taken over.
            OSError: the disk is full, or broken.
        """
        with self._lock:
            if self._stopped or self._file is None:
                raise InterruptedUploadError
            rest = memoryview(data)
            while rest:  # an unbuffered file may take less than it is given
                rest = rest[self._file.write(rest) :]
            self._digest.update(data)
            self.written += len(data)

    def is_whole(self) -> bool:
        """Whether what has arrived is what was offered."""
        return self.written == self.upload.size and self._digest.hexdigest() == self.upload.digest

    def stop(self) -> None:
        """Take no more."""
        with self._lock:
            self._stopped = True
            if self._file is not None:
                self._file.close()


class Spool:
    """The folder of payloads that have not been reduced yet.

    Args:
        folder: where the files are.
        quota: bytes that they may take in all.
        share: bytes that those of one site in a run may take; ``None``: all.
        runs: in which a site takes part at once. What it may have in one it has in each of them, so that none waits for
            room that another one takes; in all it has no more, whatever it calls its runs.
    """

    def __init__(self, folder: Path, quota: int, share: int | None = None, runs: int = 1):
        self.folder = folder
        self.quota = quota
        self._share = share
        self._runs = runs
        self._lock = threading.Lock()
        self._receivers: dict[str, Receiver] = {}

    def position(self, upload: Upload) -> int:
        """How many bytes of a payload are there."""
        try:
            return min((self.folder / upload.file).stat().st_size, upload.size)
        except FileNotFoundError:
            return 0

    @contextmanager
    def receive(self, upload: Upload, position: int) -> Iterator[Receiver]:
        """Take a payload's bytes from ``position`` on; who was sending the same payload before is interrupted.

        Raises:
            NoRoomError: the quota does not allow it now, or the site has too many uploads under way.
            InterruptedUploadError: so many bytes are not there.
        """
        receiver = Receiver(upload, self.folder / upload.file)
        with self._lock:
            earlier = self._receivers.pop(upload.file, None)
            if earlier is not None:
                earlier.stop()
            self._admit(upload)
            for other in self.folder.glob(f"{upload.contribution}*{PARTIAL}"):
                if other.name != upload.file and other.name not in self._receivers:
                    other.unlink(missing_ok=True)
            self._forget_oldest(upload)
            self._receivers[upload.file] = receiver
        try:
            receiver.start(position)
            yield receiver
        finally:
            receiver.stop()
            with self._lock:
                if self._receivers.get(upload.file) is receiver:
                    del self._receivers[upload.file]

    def take(
        self,
        upload: Upload,
        position: int,
        pieces: Iterable[bytes | memoryview],
        arrived: Callable[[int], None] = lambda number: None,
    ) -> Path | None:
        """Take a payload's bytes from ``position`` on; ``None``: they are not what was offered, or too few.

        Args:
            upload: what was offered.
            position: how many bytes are there.
            pieces: the bytes that follow.
            arrived: hears how many bytes are there, with each piece.

        Raises:
            NoRoomError: see :meth:`receive`, as for the next one.
            InterruptedUploadError: the same payload comes another way.
            OSError: the disk is full, or broken.
        """
        with self.receive(upload, position) as receiver:
            for piece in pieces:
                if receiver.written + len(piece) > upload.size:
                    self.discard(receiver)
                    return None
                receiver.write(piece)
                arrived(receiver.written)
            if receiver.is_whole():
                return self.complete(receiver)
            if receiver.written == upload.size:  # else the connection broke, and another may go on
                self.discard(receiver)
        return None

    def _forget_oldest(self, upload: Upload) -> None:
        """A site goes on with its last uploads only, so that their number is bounded, too."""
        for run, runs in ((_short(upload.run), 1), ("*", self._runs)):
            waiting = [
                path
                for path in self.folder.glob(f"{run}.*.{_short(upload.site)}.*{PARTIAL}")
                if path.name != upload.file and path.name not in self._receivers
            ]
            for path in sorted(waiting, key=lambda path: path.stat().st_mtime)[: -(INTERRUPTED * runs - 1)]:
                path.unlink(missing_ok=True)

    def _admit(self, upload: Upload) -> None:
        others = [receiver for receiver in self._receivers.values() if receiver.upload.site == upload.site]
        in_run = [receiver for receiver in others if receiver.upload.run == upload.run]
        if len(in_run) >= UPLOADS or len(others) >= UPLOADS * self._runs:
            raise NoRoomError(
                f"Site '{upload.site}' has {len(others)} uploads under way, and has to wait for one to end."
            )
        coming = sum(receiver.upload.size - receiver.written for receiver in self._receivers.values())
        sizes = {path.name: self._size(path) for path in self.folder.iterdir() if path.name != upload.file}
        for run, receivers, runs in ((f"{_short(upload.run)}.", in_run, 1), ("", others, self._runs)):
            own = sum(
                size for name, size in sizes.items() if f".{_short(upload.site)}." in name and name.startswith(run)
            )
            own += sum(receiver.upload.size - receiver.written for receiver in receivers)
            if self._share is not None and own + upload.size > self._share * runs:
                raise NoRoomError(
                    f"Site '{upload.site}' has {own / 1e9:.3f} GB in the coordinator's spool, or on the way; with "
                    f"{upload.size / 1e9:.3f} GB more it would pass its share of {self._share * runs / 1e9:g} GB "
                    "(--spool-quota-gb, divided by the sites and the folds)."
                )
        there = sum(sizes.values())
        if there + coming + upload.size > self.quota:
            raise NoRoomError(
                f"The coordinator's spool holds {there / 1e9:.3f} GB and expects {coming / 1e9:.3f} GB more; with "
                f"{upload.size / 1e9:.3f} GB of site '{upload.site}' it would pass its quota of "
                f"{self.quota / 1e9:g} GB (--spool-quota-gb)."
            )

    @staticmethod
    def _size(path: Path) -> int:
        try:
            return path.stat().st_size
        except FileNotFoundError:
            return 0

    def complete(self, receiver: Receiver) -> Path:
        """Give a whole payload a name of its own, which no other connection can touch."""
        path = receiver.path.with_suffix(f".{secrets.token_hex(4)}")
        with self._lock:
            if self._receivers.get(receiver.path.name) is not receiver:
                raise InterruptedUploadError
            move(receiver.path, path)
        return path

    def discard(self, receiver: Receiver) -> None:
        """Delete a partial file, whose bytes are not what was offered."""
        with self._lock:
            if self._receivers.get(receiver.path.name) is receiver:
                receiver.path.unlink(missing_ok=True)

    def forget_collective(self, run: str, key: str) -> None:
        """A collective is over: what is on its way for it is not wanted any more."""
        self._forget(f"{Upload(run, key, '', '', 0).collective}*{PARTIAL}")

    def forget_site(self, run: str, site: str) -> None:
        """A site leaves a run."""
        self._forget(f"{_short(run)}.*.{_short(site)}.*{PARTIAL}")

    def forget_run(self, run: str) -> None:
        """A run is over."""
        self._forget(f"{_short(run)}.*{PARTIAL}")

    def _forget(self, pattern: str) -> None:
        with self._lock:
            for path in self.folder.glob(pattern):
                receiver = self._receivers.pop(path.name, None)
                if receiver is not None:
                    receiver.stop()
                path.unlink(missing_ok=True)

    def sweep(self, wanted: set[str]) -> None:
        """After a restart: delete what no contribution refers to, and partial files that have grown old."""
        for path in self.folder.iterdir():
            old = time.time() - path.stat().st_mtime > OLDEST
            if path.name not in wanted and (path.suffix != PARTIAL or old):
                with suppress(FileNotFoundError):
                    path.unlink()
