"""The command line within this process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nnunet_fed.cli.app import main


class Command:
    """Runs commands in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self._patch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: str | Path) -> tuple[int, str, str]:
        """Exit status, standard output and standard error."""
        self._patch.setattr(sys, "argv", ["nnunet_fed", *map(str, arguments)])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        return (0 if code is None else int(code)), *self._capsys.readouterr()

    def fails(self, *arguments: str | Path, status: int = 2) -> str:
        """The sentence in which a command ends that fails."""
        found, out, err = self(*arguments)
        assert found == status, err
        assert "Traceback" not in out + err
        [line] = [line for line in err.splitlines() if line.strip()]
        assert line.startswith("Error: ")
        return line.removeprefix("Error: ")
