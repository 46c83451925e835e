from __future__ import annotations

import pytest
from workers import look_in_threads


@pytest.fixture(autouse=True)
def _look_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    look_in_threads(monkeypatch)
