"""What a coordinator that cannot start says, and the exit status by which a service manager tells what to do."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

STUDY = 'name = "s"\nsites = ["a", "b"]\nrounds = 2\n[method]\nname = "fedavg"\n'


def start(folder: Path, *options: str, listen: str = "127.0.0.1:0") -> tuple[int, str]:
    """Exit status and last line of a coordinator that cannot start."""
    (folder / "f.toml").write_text(STUDY)
    command = ["coordinator", "f.toml", "--listen", listen, "--state", "state", "--insecure", *options]
    done = subprocess.run(
        [sys.executable, "-m", "nnunet_fed", *command], cwd=folder, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.splitlines()[-1]


@pytest.mark.parametrize("option", [None, "--http"])
def test_a_busy_port_is_tried_again(tmp_path: Path, option: str | None) -> None:
    """It ended with 2, after which systemd does not start it again, though the old process was about to end."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        given = start(tmp_path, listen=address) if option is None else start(tmp_path, option, address)
    assert (given[0], address in given[1]) == (75, True), given


def test_a_state_directory_in_use_is_tried_again(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    with sqlite3.connect(tmp_path / "state" / "journal.sqlite") as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        status, line = start(tmp_path)
    assert (status, "If another coordinator uses it" in line) == (75, True), line


def test_what_somebody_has_to_put_right_is_not_tried_again(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "journal.sqlite").write_bytes(b"no journal" * 1000)
    status, line = start(tmp_path)
    assert (status, "restore a back-up" in line) == (2, True), line
    shutil.rmtree(tmp_path / "state")
    (tmp_path / "state").write_text("a file")
    status, line = start(tmp_path)
    assert (status, "state" in line, "cannot be made or closed" in line) == (2, True, True), line


def test_the_state_is_its_owners_whatever_the_umask(tmp_path: Path) -> None:
    from nnunet_fed.coordinator.store import Store
    from nnunet_fed.exchange.uploads import Spool, Upload

    before = os.umask(0)
    try:
        (tmp_path / "state").mkdir(mode=0o777)
        store = Store(tmp_path / "state")
        spool = Spool(store.spool, 10**6)
        with spool.receive(Upload("r", "k", "a", "0" * 32, 9), 0) as receiver:
            receiver.write(b"123")
        paths = [tmp_path / "state", *(tmp_path / "state").rglob("*")]
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) & 0o077 for path in paths}
        store.close()
    finally:
        os.umask(before)
    assert len(modes) >= 5
    assert not any(modes.values()), modes
