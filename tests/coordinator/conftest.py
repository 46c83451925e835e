"""A coordinator at which a test calls, with a clock that it turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from desk import Clock, Desk

from nnunet_fed.coordinator import coordinator, members, reconciliation, round_closer, status, store
from nnunet_fed.coordinator.members import Purpose


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (coordinator, members, reconciliation, round_closer, status, store):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def desk(tmp_path: Path, clock: Clock) -> Iterator[Callable[..., Desk]]:
    """Makes one, of a study with these settings; its sites have joined."""
    with ExitStack() as stack:

        def make(sites: str = "ab", purpose: Purpose = "training", **study: Any) -> Desk:
            made = Desk(tmp_path / "state", clock, sites=tuple(sites), **study)
            stack.callback(lambda: made.close())
            made.join(*sites, purpose=purpose)
            return made

        yield make
