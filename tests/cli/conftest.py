from __future__ import annotations

import pytest
from commands import Command

from nnunet_fed.cli.app import DEBUG_VARIABLE
from nnunet_fed.study.site import SITE_FILE_VARIABLE


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    # set first, so that what --debug sets is taken back afterwards
    for variable in (DEBUG_VARIABLE, SITE_FILE_VARIABLE):
        monkeypatch.setenv(variable, "")
    return Command(monkeypatch, capsys)
