"""The same collective by other frameworks: federated averaging of the same tensors, which nobody trains.

Each runs in the Python that it is installed in (``benchmarks/frameworks``, one script a framework). A round's seconds
run from when the last site has a model until the last one has the next, by the sites' own stamps: all upload, the
server averages, all download. The memory is that of the server's processes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from certificates import certificates
from rich.console import Console

FRAMEWORKS = {
    "flower": ("flower.py", "flwr"),
    "flower-legacy": ("flower_legacy.py", "flwr"),
    "nvflare": ("nvflare_fedavg.py", "nvflare"),
}
"""Script and package by name. Flower's TLS shows who the server is; that of NVIDIA FLARE is mutual."""


@dataclass(frozen=True)
class Framework:
    """A framework and the Python that it is installed in."""

    name: str
    python: str

    @classmethod
    def parse(cls, text: str) -> Framework:
        """Of ``NAME`` or ``NAME=PYTHON``; raises :class:`ValueError`."""
        name, _, python = text.partition("=")
        if name not in FRAMEWORKS:
            raise ValueError(f"no such framework: {name}")
        return cls(name, python or sys.executable)

    def exchange(self, sites: int, shapes: dict[str, tuple[int, ...]], rounds: int, tls: bool) -> dict[str, Any] | None:
        """Measure rounds; the first one is not counted. ``None``, and a line that says why: it could not be done."""
        script, package = FRAMEWORKS[self.name]
        console = Console(stderr=True)
        if not self._has(package):
            console.print(f"{self.name} is left out: {self.python} has no {package} (pip install {package}).")
            return None
        folder = Path(tempfile.mkdtemp(prefix="nnunet_fed_exchange_"))
        settings = {
            "shapes": shapes, "sites": sites, "rounds": rounds, "folder": str(folder),
            "certificates": server_files(folder) if tls else None,
        }  # fmt: skip
        file = folder / "settings.json"
        file.write_text(json.dumps(settings))
        with (folder / "framework.log").open("wb") as log:
            done = subprocess.run(
                [self.python, Path(__file__).parents[1] / "frameworks" / script],
                env={**os.environ, "FRAMEWORK_SETTINGS": str(file)}, cwd=folder, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        if done.returncode != 0:
            console.print(f"{self.name} is left out: it failed, see the logs in {folder}.")
            return None
        result = json.loads(done.stdout.splitlines()[-1])
        shutil.rmtree(folder, ignore_errors=True)
        transport = f"{result.pop('framework')}{', TLS' if tls else ''}"
        return {"transport": transport, "sites": sites, "wire_dtype": "float32", **result}

    def _has(self, package: str) -> bool:
        try:
            return subprocess.run([self.python, "-c", f"import {package}"], capture_output=True).returncode == 0
        except OSError:
            return False


def server_files(folder: Path) -> dict[str, str]:
    """Files of a server on this machine, for a framework's script."""
    [own] = certificates(["coordinator"], folder)
    return {what: str(file) for what, file in own.items()}
