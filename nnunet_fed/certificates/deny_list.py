"""The deny list: serial numbers of certificates that are no longer accepted. Source: ours.

A text file with a serial number (hexadecimal) a line, as ``nnunet_fed certs revoke`` and ``openssl x509 -serial`` write
them; what follows a ``#`` is comment.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.files import make_durable, write_text

HEADER = "# Certificates that are no longer accepted: a serial number (hexadecimal) a line, then who and since when.\n"


class DenyList:
    """The serial numbers in a file, which is read again whenever it has changed. Thread-safe.

    Args:
        path: the file.

    Raises:
        ConfigurationError: the file cannot be read, or a line of it is no serial number. Later questions raise it
            too: a list that cannot be understood lets nobody in.
    """

    def __init__(self, path: Path):
        self._path = path
        self._lock = threading.Lock()
        self._stamp: tuple[int, int, int] | None = None
        self._serials: frozenset[str] = frozenset()
        self._refresh()

    def __contains__(self, serial: str) -> bool:
        with self._lock:
            self._refresh()
            return _normal(serial) in self._serials

    def _refresh(self) -> None:
        try:
            status = self._path.stat()
            stamp = status.st_mtime_ns, status.st_size, status.st_ino
            if stamp == self._stamp:
                return
            self._stamp = None
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            self._stamp = None
            raise ConfigurationError(f"The deny list {self._path} cannot be read: {error}.") from None
        self._serials = frozenset(_serials(text, self._path))
        self._stamp = stamp


def deny(path: Path, serial: str, comment: str) -> None:
    """Add a serial number to the list; it is on the disk when this ends."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        text = HEADER
        write_text(path, text)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{'' if text.endswith(chr(10)) else chr(10)}{serial}  # {comment}\n")
    make_durable(path)


def _serials(text: str, path: Path) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        serial = line.partition("#")[0].strip()
        if serial:
            if re.fullmatch(r"(serial=|0x)?[0-9A-F:]+", serial, re.IGNORECASE) is None:
                raise ConfigurationError(
                    f"The deny list {path} has {serial!r} in line {number}: write a hexadecimal serial number a line, "
                    "and '#' before a comment."
                )
            yield _normal(serial)


def _normal(serial: str) -> str:
    return re.sub(r"^(SERIAL=|0X)", "", serial.upper()).replace(":", "").lstrip("0")
