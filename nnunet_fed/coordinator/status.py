"""What a running coordinator tells of itself. As JSON. Source: ours."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from nnunet_fed.coordinator.generations import Generations
from nnunet_fed.coordinator.members import Members
from nnunet_fed.coordinator.round_closer import RoundCloser
from nnunet_fed.coordinator.store import Store
from nnunet_fed.study.federation import Federation


class Outlook(NamedTuple):
    """How a collective stands."""

    weights: dict[str, float]
    """Of the sites that have contributed."""
    missing: dict[str, str]
    """For whom it waits: by site, its name and what it said last of what it is doing; empty unless it is open."""
    closes_at: float | None
    """Deadline in seconds since the epoch; ``None``: it is not open."""


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
    generations: Generations,
    round_closer: RoundCloser,
    members: Members,
) -> dict[str, Any]:
    """What is going on.

    Args:
        study: the study.
        told: what the reader is told of it.
        attempt: that is open.
        store: the coordinator's memory.
        generations: of the runs.
        round_closer: knows for whom open collectives wait.
        members: know what the sites said last.
    """
    standing, undone, runs = store.latest_standing(), generations.undone(), store.runs()
    trainings = [run for run in store.runs_of(attempt) if runs[run]["purpose"] == "training" and run not in undone]
    return {
        "study": told,
        "digest": study.digest_of_fold(study.fold),
        "attempt": attempt,
        "now": time.time(),
        "undone": undone,
        "sites": {
            site: {
                "last_seen": members.seen.get(site),
                "standing": standing.get(site),
                "progress": members.progress.get(site),
            }
            for site in study.sites
        },
        "trainings": {
            run: {
                "fold": runs[run].get("fold", study.fold),  # version 0.1 has not journalled it
                **{name: runs[run][name] for name in ("configuration", "trainer")},
                "sites": {
                    site: {"standing": of_run, "progress": members.progress_in.get(run, {}).get(site)}
                    for site, of_run in store.standing(run).items()
                },
            }
            for run in trainings
        },
        "open": [
            {
                "run": c.run,
                "key": c.key,
                "missing": round_closer.missing(c),
                "closes_at": time.time() + round_closer.left(c),
            }
            for c in store.open_collectives()
        ],
        "failed": [
            {"run": c.run, "key": c.key, "error": c.error}
            for run in store.runs_of(attempt)
            if run not in undone
            for c in store.collectives(run, "failed")
        ],
    }
