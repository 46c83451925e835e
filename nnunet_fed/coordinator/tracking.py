"""Scalars for TensorBoard at the coordinator. Written with tensorboardX, which needs no torch. Source: ours."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from nnunet_fed.coordinator.store import Collective, Store
from nnunet_fed.exchange.keys import MODEL, round_of
from nnunet_fed.logs import open_tensorboard
from nnunet_fed.study.federation import Fold

CLOSING_SECONDS = 10.0


class FederationTracker:
    """What the coordinator sees of a federation: rounds, and what the sites report.

    Written by a thread of its own, so that a disk that is full or slow delays no round.

    Args:
        folder: for the event files.
        folds: the study has several, whose scalars stand apart.

    Raises:
        ConfigurationError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path, folds: bool = False):
        self._writer = open_tensorboard(folder)
        self._folds = folds
        self._told: dict[str, int] = {}
        """By tag: the epoch that was told last."""
        self._scalars: SimpleQueue[tuple[str, float, int] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="tensorboard", daemon=True)
        self._thread.start()

    def closed(self, store: Store, collective: Collective) -> None:
        """A collective is over; the mean of the models ends its round.

        Told are, by number of the round from 1: who took part, with which weight and, if the coordinator computed it,
        norm of the update; seconds since the round's first contribution; bytes that the sites sent in it.
        """
        place, run = round_of(collective.key), collective.run
        if place is None or collective.name != MODEL or collective.closed is None:
            return
        of_round = store.collectives_of_scope(run, collective.scope)
        given = {c.key: store.contributions(run, c.key) for c in of_round}
        models = given[collective.key]
        scalars = {
            "round/participants": len(models),
            "round/seconds": collective.closed - min(c.opened for c in of_round),
            "round/bytes_received": sum(one.size for sites in given.values() for one in sites.values()),
            **{f"weight/{site}": one.weight for site, one in models.items()},
            **{f"update_norm/{site}": one.norm for site, one in models.items() if one.norm is not None},
        }
        above = self._above(store.run(run).get("fold"))
        for tag, value in scalars.items():
            self._scalars.put((above + tag, value, place + 1))

    def reported(self, fold: Fold | None, site: str, progress: Mapping[str, Any]) -> None:
        """What a site has told of its training of a fold, by number of finished epochs; of each once."""
        above = self._above(fold)
        epoch = progress.get("epoch")
        figures = {name: progress.get(name) for name in ("loss", "dice")}
        known = {name: value for name, value in figures.items() if isinstance(value, float) and math.isfinite(value)}
        if not isinstance(epoch, int) or not 0 <= epoch < 2**31 or not known or self._told.get(above + site) == epoch:
            return
        self._told[above + site] = epoch
        for name, value in known.items():
            self._scalars.put((f"{above}site_{name}/{site}", value, epoch))

    def _above(self, fold: Fold | None) -> str:
        """What stands before the tags of a fold."""
        return "" if fold is None or not self._folds else f"fold_{fold}/"

    def close(self) -> None:
        """Have everything on disk, unless that takes too long."""
        self._scalars.put(None)
        self._thread.join(timeout=CLOSING_SECONDS)

    def _write(self) -> None:
        while (scalar := self._scalars.get()) is not None:
            self._writer.add_scalar(*scalar)
        self._writer.close()
