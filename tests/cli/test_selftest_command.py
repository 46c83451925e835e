"""``nnunet_fed selftest`` on the command line; nothing is trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from commands import Command
from typer.testing import CliRunner

from nnunet_fed.cli.app import app
from nnunet_fed.selftest.outcome import Row
from nnunet_fed.selftest.parts import SelfTest


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there(command: Command, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert f"--device {device}: torch finds no such device here" in command.fails("selftest", "--device", device)


def test_an_unknown_method_makes_no_folder(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "no 'fedprocks'" in command.fails("selftest", "--device", "cpu", "--methods", "fedprocks", "--out", out)
    assert not out.exists()


@pytest.mark.parametrize(("failure", "status"), [(None, 0), ("its last words", 1)])
def test_table_verdict_and_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str | None, status: int
) -> None:
    def rows(self: SelfTest, begin: Callable[[str], None]) -> Iterator[Row]:
        for name in self.names:
            begin(name)
            yield Row(name, 1.0, failure if name == "fedavg" else None)

    monkeypatch.setattr(SelfTest, "rows", rows)
    figures = tmp_path / "figures.json"
    words = ["selftest", "--device", "cpu", "--methods", "fedavg, gcml", "--out", str(tmp_path / "out")]
    run = CliRunner().invoke(app, [*words, "--json", str(figures)])
    assert run.exit_code == status
    content = json.loads(figures.read_text())
    assert run.stdout.rstrip().endswith(content["verdict"])
    assert ("passed" if failure is None else "1 of 5 parts failed on cpu: fedavg.") in content["verdict"]
    assert [part["outcome"] for part in content["parts"]].count("failed") == status
    assert "To paste into a report" in run.stdout
