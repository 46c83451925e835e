"""Start nnU-Net's commands in processes that need not import PyTorch first: half of the time of a small training.

A process that has imported what nnU-Net imports, but nothing of nnU-Net or of ours, forks for each command. What it
forks is a process like any other: with its own environment, log and random states, in a group of its own, and it can be
killed. Only no picture of the progress is drawn in it. `simulate`, `compare` and the tutorial are tested with ordinary
processes, and the README's walk-through with those that a user has: without what ``quick/`` spares.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

QUICK = Path(__file__).with_name("quick")
"""What spares processes of tests most of their time."""


class Forked:
    """A command that runs; what the tests need of :class:`subprocess.Popen`."""

    def __init__(self, command: list[str], environment: dict[str, str], log: str):
        self._command = command
        self._status: int | None = None
        self.pid: int = _ask({"command": command, "environment": environment, "log": log})

    def poll(self) -> int | None:
        if self._status is None:
            self._status = _ask({"poll": self.pid})
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(self._command, timeout or 0)
            time.sleep(0.02)
        return status


_server: subprocess.Popen[str] | None = None


def _ask(request: dict[str, Any]) -> Any:
    global _server
    if _server is None:
        quick = {**os.environ, "PYTHONPATH": str(QUICK)}
        _server = subprocess.Popen(
            [sys.executable, __file__], env=quick, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(_server.kill)
    assert _server.stdin is not None
    assert _server.stdout is not None
    _server.stdin.write(json.dumps(request) + "\n")
    _server.stdin.flush()
    return json.loads(_server.stdout.readline())


# ----------------------------------------------------------------------------------------------------- the forking side


def serve() -> None:
    """Answer requests, one a line, until there are no more."""
    import_heavy_modules()
    gc.freeze()  # what has been imported is no garbage: no forked process need look at it, and so copy it
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = fork(request)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


HEAVY = (
    "torch._dynamo",
    "batchgenerators.utilities.file_and_folder_operations",
    "batchgeneratorsv2.transforms.base.basic_transform",
    "dynamic_network_architectures.architectures.primus",
    "dynamic_network_architectures.architectures.unet",
    "matplotlib.pyplot",
    "pandas",
    "scipy.ndimage",
    "seaborn",
    "SimpleITK",
    "skimage.transform",
    "sklearn.model_selection",
)


def import_heavy_modules() -> None:
    for name in HEAVY:
        importlib.import_module(name)
    early = {"nnunetv2", "nnunet_fed", "grpc"} & set(sys.modules)
    assert not early, f"{early} must not be imported before the fork: they look at the environment, or start threads"


def fork(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        os.setpgid(pid, pid)
        return pid
    os.setpgid(0, 0)
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for descriptor, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(source, descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = request["command"]
    raise Forking


class Forking(BaseException):
    """In the forked process: leave all that the server was doing."""


def run() -> None:
    """The command, as Python runs a script; with random states that no other process has."""
    import random
    import runpy

    import numpy as np
    import torch
    from nnunetv2.training.logging.nnunet_logger import LocalLogger

    LocalLogger.plot_progress_png = lambda logger, folder: None
    random.seed()
    np.random.seed()
    torch.seed()
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))  # of another version of ours
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    try:
        serve()
    except Forking:
        run()
