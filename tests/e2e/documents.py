"""The shell blocks of a page, run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from harness import environment

ROOT = Path(__file__).parents[2]


def blocks(page: str, kind: str) -> dict[str, str]:
    """The blocks whose first line is a comment of a kind, by that line: ``terminal 1: the coordinator``."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return dict(re.findall(rf"```bash\n# ({kind} [^:\n]*: [^\n]*)\n(.*?)```", text, re.DOTALL))


def shell(
    script: str, folder: Path, log: Path, variables: Callable[..., dict[str, str]] = environment
) -> subprocess.Popen[bytes]:
    """A terminal of its own, in which ``nnunet_fed`` is the one under test; the first failure ends it."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with log.open("wb") as file:
        return subprocess.Popen(
            ["bash", "-e", "-c", script], cwd=folder, env=variables(PATH=path), stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
