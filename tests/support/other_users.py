"""Commands that the permissions of files bind, and that have a small disk, whoever runs the tests."""

from __future__ import annotations

import os
import shutil

import pytest

RIGHTS = "-dac_override,-dac_read_search"
"""Of the superuser, which let files be read and written whatever their permissions say."""


def bound_to_permissions(*command: str) -> list[str]:
    """The command, as a user to whom files can be closed."""
    if os.geteuid() != 0:
        return list(command)
    if shutil.which("setpriv") is None:
        pytest.skip("the superuser reads and writes all files, and there is no setpriv (util-linux) to hinder it")
    return ["setpriv", f"--bounding-set={RIGHTS}", f"--inh-caps={RIGHTS}", *command]
