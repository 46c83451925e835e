"""What a coordinator's journal tells of its runs, collective by collective. Source: ours."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from nnunet_fed.coordinator.store import Collective, Store
from nnunet_fed.errors import RefusedError
from nnunet_fed.exchange.cross_site_matrix import DICE, Matrix, matrix
from nnunet_fed.study.federation import Federation

ENTRIES = 20_000
"""Contributions that a page has at most: of 250 bytes, some megabytes."""
EVENTS = 500
"""Events that a page has at most: a note may have 10 000 characters."""

_PAGE = re.compile(r"\d{1,18}-\d{1,18}")


def happened(store: Store) -> dict[str, Any]:
    """All that happened: the runs with their collectives, and the events."""
    return _told(store, store.collectives_after(0, -1).values(), store.events())


def page_of(store: Store, page: str) -> tuple[dict[str, Any], str]:
    """A part of what happened, so that it fits into a message however long the study is.

    Args:
        store: the coordinator's memory.
        page: :data:`nnunet_fed.coordinator.record_pages.FIRST_PAGE`, or what the page before has said.

    Returns:
        As :func:`happened`, but for collectives and events of other pages; and the name of the next page, empty after
        the last one.

    Raises:
        RefusedError: there is no such page.
    """
    if _PAGE.fullmatch(page) is None:
        raise RefusedError(f"{page[:50]!r} is no page of the record.")
    after, after_event = map(int, page.split("-"))
    most = max(1, ENTRIES // len((store.latest_study() or {}).get("sites", "?")))
    collectives, events = store.collectives_after(after, most), store.events_after(after_event, EVENTS)
    is_last = len(collectives) < most and len(events) < EVENTS
    following = f"{max(collectives, default=after)}-{max(events, default=after_event)}"
    return _told(store, collectives.values(), list(events.values())), "" if is_last else following


def _told(store: Store, collectives: Iterable[Collective], events: list[dict[str, Any]]) -> dict[str, Any]:
    by_run: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for collective in collectives:
        by_run[collective.run].append(_described(store, collective))
    return {
        "runs": {
            run: {**described, "collectives": by_run[run], "cross_site": _cross_site(store, run)}
            for run, described in store.runs().items()
        },
        "events": events,
    }


def _cross_site(store: Store, run: str) -> Matrix | None:
    """Each site's model at each site, once the sites have gathered that."""
    collective = store.collective(run, DICE)
    if collective is None or collective.status != "closed":
        return None
    gathered = json.loads(store.result_path(run, DICE).read_bytes())
    return matrix(gathered, (store.latest_study() or {}).get("sites", gathered))


def _described(store: Store, c: Collective) -> dict[str, Any]:
    return {
        "key": c.key, "verb": c.verb, "status": c.status, "opened": c.opened, "closed": c.closed,
        "seconds": c.closed and c.closed - c.opened, "digest": c.digest, "bytes": c.size, "error": c.error,
        "sites": {
            site: {
                "weight": given.weight, "bytes": given.size, "digest": given.digest, "at": given.at,
                "seconds": given.seconds, "norm": given.norm,
            }
            for site, given in store.contributions(c.run, c.key).items()
        },
    }  # fmt: skip


def record_of(store: Store) -> dict[str, Any]:
    """The whole record of a coordinator that does not run; what it knew of the sites' progress is not kept."""
    study = store.latest_study() or {}
    known = Federation.restore(study) if study else None
    standing = store.latest_standing()
    return {
        "study": study,
        "digest": None if known is None else known.digest_of_fold(known.fold),
        "attempt": store.fact("attempt"),
        "sites": {
            site: {"last_seen": None, "standing": standing.get(site), "progress": None}
            for site in study.get("sites", ())
        },
        "open": [],
        **happened(store),
    }
