"""What an administrator does to the memory of a stopped coordinator."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from serving import make_study
from typer.testing import CliRunner
from version_0_1 import STUDIES, LeftBehind

from nnunet_fed.cli.app import app
from nnunet_fed.coordinator.coordinator import Coordinator
from nnunet_fed.coordinator.store import Store
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.study.toml import to_toml


def call(*words: object) -> str:
    """What a command prints; raises what it raises."""
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("wanted", ["0", "round-0000"])
def test_rewind_says_what_goes_on_and_what_to_do(tmp_path: Path, wanted: str) -> None:
    left = LeftBehind("fedavg", tmp_path)
    run = STUDIES["fedavg"]["runs"][-1]
    assert (
        call("rewind", left.state, wanted).split()
        == (
            f"The training goes on from the model of round-0000, as the run {run}.1. Start the coordinator, then the "
            "training at every site with --c."
        ).split()
    )
    store = Store(left.state)
    assert [*store.runs()] == [*STUDIES["fedavg"]["runs"], f"{run}.1"]
    store.close()


def test_a_new_attempt(tmp_path: Path) -> None:
    left = LeftBehind("fedavg", tmp_path)
    assert "Attempt 2 is open. Start the coordinator" in call("new-attempt", left.state)
    store = Store(left.state)
    assert store.fact("attempt") == 2
    store.close()


@pytest.mark.parametrize("command", [("rewind", "0"), ("new-attempt",)])
def test_no_state_is_made_by_looking_for_one(tmp_path: Path, command: tuple[str, ...]) -> None:
    name, *rest = command
    with pytest.raises(ConfigurationError, match="is not the state directory of a coordinator"):
        call(name, tmp_path / "mistyped", *rest)
    assert not (tmp_path / "mistyped").exists()


@pytest.mark.parametrize("command", [("rewind", "0"), ("new-attempt",)])
def test_not_while_the_coordinator_runs(tmp_path: Path, command: tuple[str, ...]) -> None:
    """In a process of its own: within one, SQLite lets both have the journal."""
    name, *rest = command
    coordinator = Coordinator(make_study(), Store(tmp_path / "state"))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "nnunet_fed", name, str(tmp_path / "state"), *rest],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    finally:
        coordinator.close()
    assert done.returncode == 75
    assert "cannot be opened" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_attempt_is_no_option_of_a_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its file it would open one at every restart."""
    monkeypatch.setenv("INVOCATION_ID", "systemd's")
    study = tmp_path / "federation.toml"
    study.write_text(to_toml(make_study().stored()))
    with pytest.raises(ConfigurationError, match=r"is a command for services: nnunet_fed new-attempt .*state"):
        call(
            "coordinator",
            study,
            "--listen",
            "127.0.0.1:0",
            "--state",
            tmp_path / "state",
            "--insecure",
            "--new-attempt",
        )
    assert not (tmp_path / "state").exists()
