"""Start Python's commands in processes that need not import PyTorch first: half of the time of a small training.

A process that has imported what nnU-Net imports, but nothing of nnU-Net or of ours, forks for each command; all of
pytest's processes share it. What it forks is a process like any other: with its own environment, log and random states,
in a session of its own, and it can be killed. Only no picture of the progress is drawn in it, and planning looks at
fewer intensities. What `simulate` and `compare` start in such a process is forked as well. The tutorial is tested with
ordinary processes, and one site of the README's walk-through with those that a user has: without what ``quick/``
spares.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

QUICK = Path(__file__).with_name("quick")
"""What spares processes of tests most of their time."""


class Forked:
    """A command that runs; what the tests need of :class:`subprocess.Popen`.

    Args:
        command: a file of Python's and its arguments, or ``python -m`` and a module's.
        environment: of the process.
        log: to which it writes what it says, after what is there.
        out: to which it writes what it prints, if not to the log.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: str | Path, out: str | Path = ""):
        self._command = list(command)
        self.returncode: int | None = None
        request = {"command": self._command, "environment": dict(environment), "log": str(log), "out": str(out or log)}
        self.pid: int = _ask({**request, "folder": str(Path.cwd())})

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(self._command, timeout or 0)
            time.sleep(0.02)
        return status

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


_run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
_address = Path(tempfile.gettempdir()) / f"warm-{_run}.socket"
_connection: IO[str] | None = None
_one_at_a_time = threading.Lock()


def _ask(request: dict[str, Any]) -> Any:
    global _connection
    with _one_at_a_time:
        if _connection is None:
            _connection = _connect()
        _connection.write(json.dumps(request) + "\n")
        _connection.flush()
        return json.loads(_connection.readline())


def _connect() -> IO[str]:
    """Connect to the forking process; the first who needs it starts it."""
    from filelock import FileLock

    connection = socket.socket(socket.AF_UNIX)
    with FileLock(_address.with_suffix(".lock")):
        try:
            connection.connect(str(_address))
        except OSError:
            with socket.socket(socket.AF_UNIX) as listener:
                _address.unlink(missing_ok=True)
                listener.bind(str(_address))
                listener.listen(64)
                subprocess.Popen(
                    [sys.executable, __file__, str(_address), str(listener.fileno())], pass_fds=[listener.fileno()],
                    env={**os.environ, "PYTHONPATH": str(QUICK)}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                    start_new_session=True,
                )  # fmt: skip
            connection.connect(str(_address))
    return connection.makefile("rw")


# ----------------------------------------------------------------------------------------------------- the forking side


def serve(listener: socket.socket) -> None:
    """Answer requests, one a line, until nobody is left who could ask."""
    import_heavy_modules()
    gc.freeze()  # what has been imported is no garbage: no forked process need look at it, and so copy it
    with selectors.DefaultSelector() as ready:
        ready.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    ready.register(connection, selectors.EVENT_READ, connection.makefile("rw"))
                    continue
                with suppress(OSError):  # who asked has been killed
                    if line := key.data.readline():
                        key.data.write(json.dumps(answer(json.loads(line), ready)) + "\n")
                        key.data.flush()
                        continue
                ready.unregister(key.fileobj)
                close(key)
                if len(ready.get_map()) == 1:
                    return


def close(key: selectors.SelectorKey) -> None:
    for file in filter(None, (key.data, key.fileobj)):
        with suppress(OSError):  # what was written and never read
            file.close()  # type: ignore[union-attr]


def answer(request: dict[str, Any], ready: selectors.BaseSelector) -> int | None:
    if "poll" not in request:
        return fork(request, ready)
    pid, status = os.waitpid(request["poll"], os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


HEAVY = (
    "torch._dynamo",
    "batchgenerators.utilities.file_and_folder_operations",
    "batchgeneratorsv2.transforms.base.basic_transform",
    "cryptography.x509",
    "dynamic_network_architectures.architectures.primus",
    "dynamic_network_architectures.architectures.unet",
    "google.protobuf.descriptor_pb2",
    "matplotlib.pyplot",
    "nibabel",
    "pandas",
    "pydantic",
    "rich.progress",
    "scipy.ndimage",
    "seaborn",
    "SimpleITK",
    "skimage.io",
    "skimage.morphology",
    "skimage.transform",
    "sklearn.model_selection",
    "typer",
)


def import_heavy_modules() -> None:
    for name in HEAVY:
        importlib.import_module(name)
    early = {"nnunetv2", "nnunet_fed", "grpc"} & set(sys.modules)
    assert not early, f"{early} must not be imported before the fork: they look at the environment, or start threads"


def fork(request: dict[str, Any], ready: selectors.BaseSelector) -> int:
    begun, begins = os.pipe()
    pid = os.fork()
    if pid:
        os.close(begins)
        os.read(begun, 1)  # until it has a log, and a session of its own: a signal to its group reaches it
        os.close(begun)
        return pid
    try:
        os.setsid()
        for key in list(ready.get_map().values()):
            close(key)
        append = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        log, out = (os.open(request[name], append, 0o644) for name in ("log", "out"))
        for descriptor, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out), (2, log)):
            os.dup2(source, descriptor)
        os.chdir(request["folder"])
        os.close(begun)
        os.close(begins)
    except OSError as error:
        sys.stderr.write(f"{error}\n")
        os._exit(1)
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = request["command"]
    raise Forking


class Forking(BaseException):
    """In the forked process: leave all that the server was doing."""


def run() -> None:
    """The command, as Python runs it; with random states that no other process has."""
    import random
    import runpy

    import numpy as np
    import torch

    random.seed()
    np.random.seed()
    torch.seed()
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))  # of another version of ours
    if "plan_and_preprocess" in sys.argv:
        sample_few_voxels()
    if sys.argv[:2] == [sys.executable, "-m"]:
        del sys.argv[:2]
        if sys.argv[1] in ("simulate", "compare"):
            fork_what_is_started()
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        if Path(sys.argv[0]).name in DRAWING:
            draw_no_progress()
        runpy.run_path(sys.argv[0], run_name="__main__")


EXTRACTION_TAKES = "WARM_EXTRACTION_TAKES"
"""Variable of a test that wants to meet a site while it extracts: seconds."""
DRAWING = ("nnUNetv2_train", "plain.py")
"""What trains."""


def draw_no_progress() -> None:
    from nnunetv2.training.logging.nnunet_logger import LocalLogger

    LocalLogger.plot_progress_png = lambda logger, folder: None


def sample_few_voxels() -> None:
    """In planning: a thousandth of nnU-Net's hundred million intensities, which it would sort for seconds."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    original = DatasetFingerprintExtractor.__init__

    def init(self: Any, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        time.sleep(float(os.environ.get(EXTRACTION_TAKES, "0")))
        self.num_foreground_voxels_for_intensitystats = 10e4

    DatasetFingerprintExtractor.__init__ = init


def fork_what_is_started() -> None:
    """In `simulate` and `compare`: their sites' commands, too, need not import PyTorch."""
    from nnunet_fed import processes

    def start(command: Sequence[str], *, env: Mapping[str, str], stdout: IO[bytes], **_: Any) -> Forked:
        return Forked(command, env, stdout.name)

    processes.subprocess = SimpleNamespace(  # type: ignore[assignment]
        Popen=start, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT
    )


if __name__ == "__main__":
    _address = Path(sys.argv[1])
    try:
        serve(socket.socket(fileno=int(sys.argv[2])))
    except Forking:
        run()
    else:
        _address.unlink(missing_ok=True)
        _address.with_suffix(".lock").unlink(missing_ok=True)
