"""What the benchmarks of other frameworks share: settings, tensors, processes, the sites' stamps, a server's memory.

The framework's own Python runs this: the standard library and NumPy only.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

VARIABLE = "FRAMEWORK_SETTINGS"
"""Environment variable with the settings' file: it reaches processes that the framework starts."""


@dataclass(frozen=True)
class Settings:
    """What a framework has to do.

    Attributes:
        shapes: of the float32 tensors, by name.
        sites: how many.
        rounds: that count; a first one comes before them.
        folder: to work in.
        certificates: ``ca``, ``certificate`` and ``key`` of the server, for 127.0.0.1; ``None``: plain text.
    """

    shapes: dict[str, list[int]]
    sites: int
    rounds: int
    folder: str
    certificates: dict[str, str] | None

    @classmethod
    def read(cls) -> Settings:
        """From the file that the environment names."""
        return cls(**json.loads(Path(os.environ[VARIABLE]).read_text()))

    @property
    def receipts(self) -> int:
        """How often each site gets a model: a round lies between two, and the first one does not count."""
        return self.rounds + 2


def random_tensors(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, Any]:
    """Float32 values of the size that trained weights have."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) * np.float32(0.02) for name, shape in shapes.items()}


def stamp(settings: Settings, site: str) -> None:
    """A site notes that it has the model of the next round; it calls this before anything else."""
    with (Path(settings.folder) / f"{site}.stamps").open("a") as file:
        file.write(f"{time.monotonic()}\n")


def stamps(settings: Settings) -> list[list[float]]:
    """Of each site that has begun."""
    files = sorted(Path(settings.folder).glob("*.stamps"))
    return [[float(line) for line in file.read_text().splitlines()] for file in files]


def finished(settings: Settings) -> bool:
    """Whether every site has had all its models."""
    found = stamps(settings)
    return len(found) == settings.sites and all(len(times) >= settings.receipts for times in found)


def wait_until_finished(settings: Settings, alive: Callable[[], bool], seconds: float = 1800) -> None:
    """Raises :class:`SystemExit` if a process has died before, or after so many seconds."""
    end = time.monotonic() + seconds
    while not finished(settings):
        if not alive() or time.monotonic() > end:
            raise SystemExit(f"after {[len(times) for times in stamps(settings)]} models: see the logs")
        time.sleep(0.1)


def seconds_of_rounds(settings: Settings) -> list[float]:
    """From when the last site has a model until the last one has the next: uploads, the reduction, downloads.

    The first round is left out.
    """
    complete = [max(times) for times in zip(*(found[: settings.receipts] for found in stamps(settings)), strict=True)]
    return [after - before for before, after in pairwise(complete[1:])]


class Processes:
    """The processes of a federation, which all write logs into its folder, and end with a ``with`` statement.

    Args:
        settings: whose folder it is.
    """

    def __init__(self, settings: Settings):
        self._folder = Path(settings.folder)
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Processes:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
        return self

    def __exit__(self, *_: object) -> None:
        everything = [pid for process in self._started for pid in tree_of(process.pid)]
        for process in self._started:
            process.terminate()
        end = time.monotonic() + 10
        for process in self._started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, end - time.monotonic()))
        kill(everything)

    def start(self, log: str, *command: str | Path, **options: Any) -> subprocess.Popen[bytes]:
        """Start one."""
        with (self._folder / f"{log}.log").open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, **options)
        self._started.append(process)
        return process

    def alive(self) -> bool:
        """Whether none has failed."""
        return all(process.poll() in (None, 0) for process in self._started)


def kill(pids: list[int]) -> None:
    """End what is left of these processes."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def wait_until_served(address: str, alive: Callable[[], bool], seconds: float = 120) -> None:
    """Until somebody listens at the address; raises :class:`SystemExit` as :func:`wait_until_finished`."""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=1):
                return
        except OSError:
            if not alive() or time.monotonic() > end:
                raise SystemExit(f"nobody listens at {address}: see the logs") from None
        time.sleep(0.1)


class Memory(threading.Thread):
    """Watch the memory of processes: the largest sums of RssAnon and RSS seen, in MB.

    Args:
        processes: gives their ids.
    """

    def __init__(self, processes: Callable[[], list[int]]):
        super().__init__(daemon=True)
        self._processes = processes
        self._stopped = threading.Event()
        self.anonymous = self.resident = 0.0

    def run(self) -> None:
        """Look every 5 ms, and for new processes every 250 ms, until it is stopped."""
        watched, looked = self._processes(), time.monotonic()
        while not self._stopped.wait(0.005):
            if time.monotonic() - looked > 0.25:
                watched, looked = self._processes(), time.monotonic()
            found = [_memory(pid) for pid in watched]
            self.anonymous = max(self.anonymous, sum(anonymous for anonymous, _ in found))
            self.resident = max(self.resident, sum(resident for _, resident in found))

    def stop(self) -> dict[str, float]:
        """Stop watching; returns the largest sums."""
        self._stopped.set()
        self.join()
        return {"rss_anon_mb": self.anonymous, "rss_mb": self.resident}


def tree_of(pid: int) -> list[int]:
    """A process and all that it has started."""
    found = [pid]
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in file.read_text().split()]
        except OSError:  # the thread has ended
            continue
        found += [descendant for child in children for descendant in tree_of(child)]
    return found


def started_with(words: str) -> list[int]:
    """The processes whose command lines hold these words."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if words.encode() in file.read_bytes():
                found.append(int(file.parent.name))
        except OSError:  # the process has ended
            continue
    return found


def _memory(pid: int) -> tuple[float, float]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # the process has ended
        return 0.0, 0.0
    fields = dict(line.split(":", 1) for line in lines)
    if "RssAnon" not in fields:  # it is ending
        return 0.0, 0.0
    return int(fields["RssAnon"].split()[0]) / 1e3, int(fields["VmRSS"].split()[0]) / 1e3
