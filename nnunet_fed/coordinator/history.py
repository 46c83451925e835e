"""What a coordinator's journal tells of its runs, collective by collective. Source: ours."""

from __future__ import annotations

import json
from typing import Any

from nnunet_fed.coordinator.store import Store
from nnunet_fed.exchange.cross_site_matrix import DICE, Matrix, matrix
from nnunet_fed.study.federation import Federation


def happened(store: Store) -> dict[str, Any]:
    """All that happened: the runs with their collectives, and the events."""
    return {
        "runs": {
            run: {**described, **_collectives(store, run), "cross_site": _cross_site(store, run)}
            for run, described in store.runs().items()
        },
        "events": store.events(),
    }


def _cross_site(store: Store, run: str) -> Matrix | None:
    """Each site's model at each site, once the sites have gathered that."""
    collective = store.collective(run, DICE)
    if collective is None or collective.status != "closed":
        return None
    gathered = json.loads(store.result_path(run, DICE).read_bytes())
    return matrix(gathered, (store.latest_study() or {}).get("sites", gathered))


def _collectives(store: Store, run: str) -> dict[str, Any]:
    return {
        "collectives": [
            {
                "key": c.key, "verb": c.verb, "status": c.status, "opened": c.opened, "closed": c.closed,
                "seconds": c.closed and c.closed - c.opened, "digest": c.digest, "bytes": c.size, "error": c.error,
                "sites": {
                    site: {
                        "weight": given.weight, "bytes": given.size, "digest": given.digest, "at": given.at,
                        "seconds": given.seconds, "norm": given.norm,
                    }
                    for site, given in store.contributions(run, c.key).items()
                },
            }
            for c in store.collectives(run)
        ]
    }  # fmt: skip


def record_of(store: Store) -> dict[str, Any]:
    """The whole record of a coordinator that does not run; what it knew of the sites' progress is not kept."""
    study = store.latest_study() or {}
    standing = store.latest_standing()
    return {
        "study": study,
        "digest": Federation.restore(study).digest if study else None,
        "attempt": store.fact("attempt"),
        "sites": {
            site: {"last_seen": None, "standing": standing.get(site), "progress": None}
            for site in study.get("sites", ())
        },
        "open": [],
        **happened(store),
    }
