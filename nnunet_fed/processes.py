"""Commands that run side by side, each with a log file, and do not outlive who started them. Source: ours."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_fed.errors import FederationError

GRACE_SECONDS = 5.0
"""Between the request to end and the end."""
if sys.platform == "win32":
    DETACHED: dict[str, Any] = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    END: signal.Signals = signal.CTRL_BREAK_EVENT
else:
    DETACHED: dict[str, Any] = {"start_new_session": True}
    END: signal.Signals = signal.SIGTERM


def _existing(*names: str) -> list[signal.Signals]:
    """The signals of these names that this system has."""
    return [signal.Signals[name] for name in names if hasattr(signal, name)]


END_SIGNALS = _existing("SIGTERM", "SIGINT", "SIGBREAK")
"""With which a process is asked to end. SIGBREAK is Windows's."""
LINES_SHOWN = 15
SENTENCE = "Error: "
"""With what our commands and trainers begin their last words."""


@dataclass(frozen=True)
class Step:
    """A command to run."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path


class Process:
    """A running command. It leads a session of its own (on Windows, a group), so that it can be stopped by itself.

    Its children are stopped with it; on Windows, those that it stops.
    """

    def __init__(self, step: Step):
        self.step = step
        with step.log.open("wb") as log:
            self._process = subprocess.Popen(
                step.command, env=step.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                **DETACHED,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """Of the command."""
        return self._process.pid

    def exit_status(self) -> int | None:
        """``None`` while it runs; -N if signal N ended it."""
        return self._process.poll()

    def last_words(self) -> str:
        """The sentence that it ended with, or else the end of its log."""
        lines = self.step.log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
        for number in reversed(range(len(lines))):
            if lines[number].startswith(SENTENCE):
                return "\n".join(lines[number:]).removeprefix(SENTENCE)
        status = self.exit_status()
        state = "It is still running" if status is None else f"It ended with the exit status {status}"
        return f"{state}. The end of its log:\n" + ("\n".join(lines[-LINES_SHOWN:]) or "(empty)")

    def kill(self) -> None:
        """End it and its children at once."""
        if sys.platform == "win32":
            self._process.kill()
        else:
            self._signal(signal.SIGKILL)
        self._process.wait()

    def ask_to_end(self) -> bool:
        """Send SIGTERM (on Windows, Ctrl-Break) to it and its children; false if none of them is left."""
        return self._signal(END)

    def is_left(self) -> bool:
        """Whether it or one of its children runs."""
        return self.exit_status() is None if sys.platform == "win32" else self._signal(0)

    def _signal(self, number: int) -> bool:
        running = self._process.poll() is None  # a dead process that nobody has asked for would count as living
        try:
            if sys.platform == "win32":
                self._process.send_signal(number)
                return running
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):  # the latter is what macOS says of dead ones
            return False
        return True


def stop(processes: Iterable[Process]) -> None:
    """End processes and their children: they are asked to, and killed if they are still there after a while."""
    left = [process for process in processes if process.ask_to_end()]
    end = time.monotonic() + GRACE_SECONDS
    try:
        while left and time.monotonic() < end:
            time.sleep(0.05)
            left = [process for process in left if process.is_left()]
    finally:  # also when a second Ctrl-C ends the wait
        for process in left:
            process.kill()


class Parent:
    """The process that started this one.

    Args:
        number: its process id.
    """

    def __init__(self, number: int):
        self._number = number
        if sys.platform == "win32":
            # a process keeps the number of a parent that has ended; a handle of that parent tells of its end
            self._handle = ctypes.windll.kernel32.OpenProcess(0x100000, False, number)

    def lives(self) -> bool:
        """Whether it has not ended."""
        if sys.platform == "win32":
            return bool(ctypes.windll.kernel32.WaitForSingleObject(self._handle, 0) == 0x102)  # WAIT_TIMEOUT
        return os.getppid() == self._number


class Worker:
    """Runs the commands of one site one after the other."""

    def __init__(self, name: str, steps: Iterable[Step]):
        self.name = name
        self.process: Process | None = None
        self._steps = list(steps)

    def failed(self) -> bool:
        """Whether the present command has ended badly."""
        return self.process is not None and self.process.exit_status() not in (None, 0)

    def advance(self) -> bool:
        """Start the next command if the present one has ended well; false when all have."""
        if self.process is not None:
            if self.process.exit_status() != 0:
                return True
            self.stop()
        if self._steps:
            self.process = Process(self._steps.pop(0))
        return self.process is not None

    def stop(self) -> None:
        """End the present command, and what it has left behind."""
        if self.process is not None:
            stop([self.process])
            # forgotten at once, since the system may give its number to another
            self.process = None


def stop_workers(workers: Iterable[Worker]) -> None:
    """End the present commands of all sites together."""
    stop([worker.process for worker in workers if worker.process is not None])


def raise_first(failed: Sequence[Worker]) -> None:
    """Raise a :class:`FederationError` with the words of the first, and the names of all that ended with the same."""
    ended = [(worker.name, worker.process) for worker in failed if worker.process is not None]
    if not ended:
        return
    first = min((process for _, process in ended), key=lambda process: process.step.log.stat().st_mtime)
    words = first.last_words()
    names = [name for name, process in ended if process.last_words() == words]
    sites = f"site {names[0]}" if len(names) == 1 else f"the sites {', '.join(names)}"
    raise FederationError(f"{first.step.name} failed at {sites}. {words}\n(log: {first.step.log})")


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGTERM and a closed terminal raise :class:`KeyboardInterrupt`: they do not reach processes in other sessions."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    numbers = _existing("SIGTERM", "SIGHUP") if in_main_thread else []
    # what is ignored stays so: under nohup, a closed terminal does not matter
    before = {number: signal.getsignal(number) for number in numbers}
    changed = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    try:
        for number in changed:
            signal.signal(number, signal.default_int_handler)
        yield
    finally:
        for number in changed:
            with suppress(TypeError):  # None: not set from Python
                signal.signal(number, before[number])
