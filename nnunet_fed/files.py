"""What is done with files and folders everywhere."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from nnunet_fed.errors import ConfigurationError

PARTIAL = ".part"
"""Ending of a file that is still being written."""


def make_durable(path: Path) -> None:
    """Have a file and its name on disk, not only in the system's memory."""
    for each in (path, path.parent):
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def same_file(source: Path, target: Path) -> None:
    """A hard link, for a file that is never changed, only deleted; a copy on a file system without."""
    try:
        target.hardlink_to(source)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target)


def new_folder(out: Path) -> None:
    """Make ``out`` with its parents, or take it if it is empty; else raise :class:`ConfigurationError`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        empty = not any(out.iterdir())
    except OSError as error:
        raise ConfigurationError(f"{out} cannot be made: {error.strerror}. Name another folder.") from None
    if not empty:
        raise ConfigurationError(f"{out} is not empty: name a new folder, or remove this one first.")


def link(source: Path, target: Path) -> None:
    """Symbolic link to a file or folder, or a copy on a system or file system without."""
    try:
        target.symlink_to(source.resolve(), source.is_dir())
    except (OSError, NotImplementedError):
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy2(source, target)
