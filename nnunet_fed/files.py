"""What is done with files and folders everywhere: nobody else replaces, renames or flushes one."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, BinaryIO, cast

from filelock import FileLock

from nnunet_fed.errors import BusyError, ConfigurationError
from nnunet_fed.strict_json import to_json

PARTIAL = ".part"
"""Ending of a file or folder that is still being written."""
WINDOWS = os.name == "nt"
PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FOREIGN = (errno.EACCES, errno.EPERM, errno.EROFS)
"""Of errors that tell of another user's files, or of a disk that is mounted to be read only."""
NEXT_TO_NOTHING = 2**16
"""Free bytes, below which a disk is full: what was to be written was larger."""
LOCK_POLL_SECONDS = 0.01
PATIENCE = 2.0
"""Seconds for which a file that another process has open is tried again on Windows, which refuses to replace it."""


def free_bytes(path: Path) -> int:
    """On the disk of a file or folder, which need not be there yet."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def no_room(path: Path) -> BusyError:
    """What a user reads when ``path`` could not be written for want of room."""
    return BusyError(
        f"There is no room for {path}: its disk is full, or a quota is reached ({free_bytes(path) / 1e6:.0f} MB free). "
        "Make room, then give the same command again; a training goes on with --c."
    )


def in_words(error: OSError, place: str | None = None) -> ConfigurationError | None:
    """What a user reads of a full disk or of another user's files; ``None``: the error is of another kind.

    Args:
        error: of the operating system.
        place: what was being written, if the error does not tell.
    """
    path = str(error.filename or place or Path.cwd())
    if error.errno in FULL:
        return no_room(Path(path))
    if error.errno in FOREIGN:
        return ConfigurationError(
            f"{path}: {error.strerror}. The file or folder is another user's, or its disk is read-only: let its owner "
            "give you the right, or name other folders (nnUNet_raw, nnUNet_preprocessed, nnUNet_results)."
        )
    return None


@contextmanager
def replacing(path: Path, *, mode: int | None = None, durable: bool = True) -> Iterator[Path]:
    """Write a file that takes the place of ``path`` once it is whole: until then, and after an error, the old one is.

    One at a time for each path: two writers would write into the same partial file.

    Args:
        path: the file; there may be none yet.
        mode: permissions from the first byte on, less the umask's; else those of the old file, or what the umask says.
        durable: the file is on the disk when this ends. Without it, a machine that stops may leave an empty file.

    Yields:
        The partial file beside ``path``, empty, for the block to write.
    """
    part = path.with_name(path.name + PARTIAL)
    kept = None
    if mode is None and path.exists():
        kept = stat.S_IMODE(path.stat().st_mode)
    part.unlink(missing_ok=True)  # what a process that was killed has left may be readable for others
    # a file that may not be written is replaced all the same
    allowed = mode if mode is not None else 0o666 if kept is None else kept | stat.S_IWUSR
    os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, allowed))
    try:
        yield part
        if kept is not None and stat.S_IMODE(part.stat().st_mode) != kept:
            part.chmod(kept)
        if durable:
            flush(part)
        move(part, path)
    except BaseException:
        part.unlink(missing_ok=True)  # a full disk, above all, needs the room
        raise
    if durable:
        flush(path.parent)


def write_bytes(path: Path, content: bytes, *, mode: int | None = None, durable: bool = True) -> None:
    """Replace a file, or make it; see :func:`replacing`."""
    with replacing(path, mode=mode, durable=durable) as part:
        part.write_bytes(content)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace a file, or make it, in UTF-8 with the text's own line ends; see :func:`replacing`."""
    write_bytes(path, text.encode(), durable=durable)


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Replace a file, or make it, with JSON, in which a number that is not finite is null; see :func:`replacing`."""
    write_text(path, to_json(value, indent) + "\n")


def move(source: Path, target: Path) -> None:
    """Give a file or folder another name, in place of a file that has it; not durable by itself."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            source.replace(target)
            return
        except PermissionError:
            if not WINDOWS or time.monotonic() > end:
                raise
            time.sleep(0.05)


def flush(path: Path) -> None:
    """Have a file's bytes, or the names in a folder, on disk, not only in the system's memory."""
    folder = path.is_dir()
    if folder and WINDOWS:  # which cannot, and need not: NTFS journals names
        return
    descriptor = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not folder or error.errno != errno.EINVAL:  # network shares know it of files only
            raise
    finally:
        os.close(descriptor)


def make_durable(path: Path) -> None:
    """Have a file or folder and its name on disk."""
    flush(path)
    flush(path.parent)


def append_line(path: Path, line: str, largest: int, kept: int) -> None:
    """Append to a text file, all of the line or nothing of it.

    A file of more than ``largest`` bytes becomes ``path.1`` before, that one ``path.2``, ...

    Args:
        path: the file; there may be none yet.
        line: without its end.
        largest: see above.
        kept: number of older files; what is older still is deleted.
    """
    if path.exists() and path.stat().st_size > largest:
        RotatingFileHandler(path, backupCount=kept, encoding="utf-8", delay=True).doRollover()
    content = (line + "\n").encode()
    with path.open("ab", buffering=0) as file:
        start = file.tell()
        if file.write(content) < len(content):  # half a line would spoil the next one, too
            file.truncate(start)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let no other thread or process be in such a block of the same file meanwhile. The lock dies with its holder.

    Raises:
        ConfigurationError: the file system has no locks.
    """
    lock = FileLock(path, thread_local=False, poll_interval=LOCK_POLL_SECONDS, fallback_to_soft=False)
    try:
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        raise ConfigurationError(
            f"{path.parent} is on a file system without locks ({error}): two processes could spoil what the other "
            "writes. Use a folder on a local disk, or have the network share mounted with locks."
        ) from None
    try:
        yield
    finally:
        lock.release()


def same_file(source: Path, target: Path) -> None:
    """A hard link, for a file that is never changed, only deleted; a copy on a file system without."""
    try:
        target.hardlink_to(source)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target)


def new_folder(out: Path, may_hold: str = "") -> None:
    """Make ``out`` with its parents, or take it if it is empty; else raise :class:`ConfigurationError`.

    Args:
        out: the folder.
        may_hold: name of something in it that is left alone.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        empty = all(entry.name == may_hold for entry in out.iterdir())
    except OSError as error:
        raise ConfigurationError(f"{out} cannot be made: {error.strerror}. Name another folder.") from None
    if not empty:
        raise ConfigurationError(f"{out} is not empty: name a new folder, or remove this one first.")


def private_folder(path: Path) -> None:
    """Make a folder with its parents, or take one that is there, and let its owner alone look into it.

    Raises:
        ConfigurationError: it cannot be made, written or closed to others.
    """
    try:
        path.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
        if not WINDOWS and stat.S_IMODE(path.stat().st_mode) & 0o077:
            path.chmod(PRIVATE_FOLDER)
    except OSError as error:
        raise ConfigurationError(
            f"The folder {path} cannot be made or closed to others: {error.strerror}. Give this process's user a "
            "folder of its own that it can write to."
        ) from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigurationError(f"The folder {path} cannot be written: look at its owner, and at how it is mounted.")


def open_private(path: Path, mode: str) -> BinaryIO:
    """Open a file of bytes, which its owner alone can read if it is made."""
    return cast(BinaryIO, open(path, mode, buffering=0, opener=lambda name, flags: os.open(name, flags, PRIVATE_FILE)))


def link(source: Path, target: Path) -> None:
    """Symbolic link to a file or folder, or a copy on a system or file system without."""
    try:
        target.symlink_to(source.resolve(), source.is_dir())
    except (OSError, NotImplementedError):
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy2(source, target)
