"""Who works in a folder: another process is sent away, and one that has ended is not waited for."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from nnunet_fed import leases
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.leases import in_turn, take

HOLDER = """
import os, pathlib, sys, time
from nnunet_fed.leases import take
take(pathlib.Path(sys.argv[1]), "It runs")
worker = os.fork() if sys.argv[2] == "with worker" else 1
print(worker, flush=True)
time.sleep(60 if worker else 20)
"""


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.8)
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.1)


def holder(path: Path, *words: str) -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, path, *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def written(path: Path, **changes: object) -> None:
    """The file of a holder: this process, but for what is said."""
    lease = take(path, "It runs")
    facts = dict(line.split("=") for line in path.read_text().splitlines()[1:])
    lease.release()
    lines = [f"{name}={value}" for name, value in {**facts, **changes}.items()]
    path.write_text("\n".join(["filelock/2", *lines]) + "\n")


def test_a_second_process_is_sent_away_while_the_first_lives_and_not_once_it_was_killed(tmp_path: Path) -> None:
    """A worker that the first has forked lives on when it is killed, as nnU-Net's do, and holds nothing."""
    path = tmp_path / "fold_0" / "training.lock"
    process, worker = holder(path, "with worker")
    # of the holder's own seconds, as every version's are
    leases.LEASE_SECONDS, leases.BEAT_SECONDS = 60.0, 2.0
    try:
        with pytest.raises(ConfigurationError, match=rf"^It runs twice: process {process.pid} on .* is at it, as .*"):
            take(path, "It runs twice")
        process.kill()
        process.wait()
        os.kill(worker, 0)
        leases.BEAT_SECONDS = 20.0  # so that it takes over at once, or this test takes long
        lease = take(path, "It runs twice")
        assert f"pid={os.getpid()}\n" in path.read_text()
        lease.release()
        assert not path.exists()
    finally:
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
        process.kill()
        process.wait()


@pytest.mark.parametrize("start", [7, (5 << 64) + 7])
def test_the_number_of_a_process_that_has_ended_is_given_again(tmp_path: Path, start: int) -> None:
    """Also after the machine has started anew: another process has the number then, or this one itself."""
    written(tmp_path / "lock", start=start, duration=60.0)
    leases.LEASE_SECONDS = 60.0
    take(tmp_path / "lock", "It runs").release()


def test_of_another_machine_s_process_it_counts_whether_it_is_heard_of(tmp_path: Path) -> None:
    path, stopped = tmp_path / "lock", threading.Event()

    def beat() -> None:
        while not stopped.wait(0.1):
            os.utime(path)

    written(path, host="node7.cluster", pid=99)
    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(ConfigurationError, match=r"^It runs: process 99 on node7\.cluster is at it"):
            take(path, "It runs")
    finally:
        stopped.set()
        beating.join()
    take(path, "It runs").release()


def test_a_file_system_without_locks_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "there are none")

    monkeypatch.setattr(fcntl, "flock", flock)
    lease = take(tmp_path / "lock", "It runs")
    with pytest.raises(ConfigurationError, match=r"^It runs: process"):
        take(tmp_path / "lock", "It runs")
    lease.release()


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "lock"
    with pytest.raises(ConfigurationError, match=rf"^{re.escape(str(path))}, which says who works there, cannot be"):
        take(path, "It runs")


def test_in_turn_waits_for_the_others(tmp_path: Path) -> None:
    order = []

    def second() -> None:
        with in_turn(tmp_path / "lock"):
            order.append("second")

    with in_turn(tmp_path / "lock"):
        waiting = threading.Thread(target=second)
        waiting.start()
        waiting.join(0.2)
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]
    assert not (tmp_path / "lock").exists()
