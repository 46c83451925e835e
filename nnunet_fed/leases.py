"""Who works in a folder: a file there names the process, so that no second one does the same.

The file is a *lease*: its holder touches it again and again, and removes it in the end. One whose process has ended,
whatever ended it, is taken over: at once on the same machine (process id, its start and the machine's boot tell), and
once nobody has touched it for :data:`LEASE_SECONDS` where that cannot be seen, as from another machine. It needs no
locks of the file system, and processes that the holder forks do not hold it. Source: ours, on filelock.
"""

from __future__ import annotations

import atexit
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import SoftFileLease, Timeout

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.files import in_words

logger = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
"""For which a holder may be silent whose end cannot be seen. The same in every process, and in every version."""
BEAT_SECONDS = 2.0
"""Between two touches: so soon a second process is sent away."""
PATIENCE_SECONDS = 600.0
"""For which :func:`in_turn` waits for the others."""


def take(path: Path, doing: str) -> SoftFileLease:
    """Be the one process that does something; until ``release()`` is called, or this process ends.

    Args:
        path: the lease's file.
        doing: the sentence that says what is done twice otherwise, without its full stop.

    Raises:
        ConfigurationError: another process is at it, or the file cannot be written.
    """
    lease = _lease(path)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        seen, end, told = _touched(path), time.monotonic() + LEASE_SECONDS + 2 * BEAT_SECONDS, False
        while True:
            try:
                lease.acquire(timeout=BEAT_SECONDS / 2)
                atexit.register(lease.release)
                return lease
            except Timeout:
                touched = _touched(path)
            if None not in (seen, touched) and (touched != seen or time.monotonic() > end):
                raise ConfigurationError(
                    f"{doing}: {_holder(path)} is at it, as {path} says. Wait until it has ended, or end it. The file "
                    "goes with its process; there is no need to delete it."
                )
            seen = touched if seen is None else seen
            if not told:
                logger.info("Looking whether %s still works in %s.", _holder(path), path.parent)
                told = True


@contextmanager
def taken(path: Path, doing: str) -> Iterator[None]:
    """Be the one process that does something meanwhile; see :func:`take`."""
    lease = take(path, doing)
    try:
        yield
    finally:
        lease.release()


@contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Let no other process be in such a block of the same file meanwhile; who comes later waits.

    Args:
        path: the lease's file, which is there only meanwhile.

    Raises:
        ConfigurationError: another process does not come to its end, or the file cannot be written.
    """
    lease = _lease(path)
    try:
        with _explained(path):
            lease.acquire(timeout=PATIENCE_SECONDS)
    except Timeout:
        raise ConfigurationError(
            f"{_holder(path)} has held {path} for {PATIENCE_SECONDS:.0f} seconds: look at what it does, or end it."
        ) from None
    try:
        yield
    finally:
        lease.release()


def _touched(path: Path) -> int | None:
    """When, by the clock of the file system; ``None``: the file is not there."""
    try:
        with path.open("rb") as file:  # opened, a network share tells it anew
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _lease(path: Path) -> SoftFileLease:
    return SoftFileLease(
        path, lease_duration=LEASE_SECONDS, heartbeat_interval=BEAT_SECONDS, poll_interval=0.02, thread_local=False
    )


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except Timeout:
        raise
    except OSError as error:
        told = in_words(error, str(path))
        if told is not None:
            raise told from None
        raise ConfigurationError(
            f"{path}, which says who works there, cannot be written: {error.strerror or error}. Look at the folder's "
            "owner, at how it is mounted, and at the room on its disk."
        ) from None


def _holder(path: Path) -> str:
    """The process that a lease's file names, in words."""
    with suppress(OSError, UnicodeDecodeError):
        facts = dict(line.partition("=")[::2] for line in path.read_text(encoding="utf-8").splitlines())
        if "pid" in facts and "host" in facts:
            return f"process {facts['pid']} on {facts['host'].partition('?')[0] or 'this machine'}"
    return "another process"
