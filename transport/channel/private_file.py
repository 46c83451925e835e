"""A private key's file is its owner's: who else may read it, and what can be done about it. Source: ours."""

from __future__ import annotations

import os
import shlex
import stat
from pathlib import Path

from nnunet_fed.errors import ConfigurationError

OF_OTHERS = 0o037
"""Rights that nobody but the owner may have; reading may be granted to a group."""


def require_private(path: Path) -> None:
    """See that others cannot read a private key. Windows has no such modes, and nothing is looked at there.

    Raises:
        ConfigurationError: they can; it says what helps, which is not chmod where a container mounts the file.
    """
    status = path.stat()
    mode = stat.S_IMODE(status.st_mode)
    if os.name == "posix" and mode & OF_OTHERS:
        raise ConfigurationError(
            f"The private key {path} has the mode {mode:o}: whoever can read it can take part under its name. "
            f"{_remedy(path, status)} Reading may be granted to a group (640), more may not."
        )


def _remedy(path: Path, status: os.stat_result) -> str:
    file = shlex.quote(str(path))
    copy = (
        f"copy it into a folder of your own, with 'install -m 600 {file} FOLDER', and name the copy as the key instead"
    )
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        return (
            "It lies on a file system that is mounted read-only, where chmod cannot close it. Mount it closed "
            "(Kubernetes: 'defaultMode: 0400' of the secret's volume, with 'fsGroup' for a user who is not root; "
            "Docker: 'mode: 0400' and 'uid' of the secret; a folder of the host: chmod there), or "
            f"{copy}."
        )
    if os.geteuid() not in (0, status.st_uid):
        return f"Only its owner (user {status.st_uid}) can close it, with 'chmod 600 {file}'; or {copy}."
    return f"Close it with 'chmod 600 {file}'."
