"""What a running coordinator tells of itself. As JSON. Source: ours."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from nnunet_fed.coordinator.round_closer import Closing
from nnunet_fed.coordinator.store import Store
from nnunet_fed.study.federation import Federation


class Tally(NamedTuple):
    """Totals of a coordinator."""

    rounds: dict[str, int]
    """Closed rounds by run."""
    reductions: int
    reduction_seconds: float


def status_of(
    study: Federation,
    told: Mapping[str, Any],
    attempt: int,
    store: Store,
    closing: Closing,
    seen: Mapping[str, float],
    progress: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    """What is going on.

    Args:
        study: the study.
        told: what the reader is told of it.
        attempt: that is open.
        store: the coordinator's memory.
        closing: knows for whom open collectives wait.
        seen: when each site called last, in seconds since the epoch.
        progress: what each site said last of what it is doing.
    """
    standing = store.latest_standing()
    return {
        "study": told,
        "digest": study.digest,
        "attempt": attempt,
        "now": time.time(),
        "sites": {
            site: {"last_seen": seen.get(site), "standing": standing.get(site), "progress": progress.get(site)}
            for site in study.sites
        },
        "open": [
            {"run": run, "key": c.key, "missing": closing.missing(c), "closes_at": closing.closes_at(c)}
            for run in store.runs()
            for c in store.collectives(run, "open")
        ],
    }
