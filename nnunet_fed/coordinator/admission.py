"""What the coordinator looks at before a contribution stands: its content, its numbers, its distance. Source: ours."""

from __future__ import annotations

import json
import math
import statistics
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_fed.coordinator.ballots import can_win, elected
from nnunet_fed.coordinator.store import Ballot, Collective, Store
from nnunet_fed.coordinator.verdict import Offer
from nnunet_fed.errors import RefusedError
from nnunet_fed.exchange.communicator import Verb
from nnunet_fed.exchange.keys import MODEL, name_of
from nnunet_fed.exchange.payload import Array, blocks, check_finite, is_floating, layout_of, open_payload, schema_of
from nnunet_fed.study.federation import Federation

LARGEST = {"sum": 1 << 26, "gather": 1 << 23}
"""Bytes of a payload, by verb. Those of a mean are bounded by the first one of their name."""
MOST_ELEMENTS, DEEPEST = 1 << 19, 32
"""Of a gathered value: numbers, texts, lists and tables in it, of which each may take 200 bytes once it is decoded, and
how deep they lie. The geometry of 40 000 cases has as many."""
_DECODING = threading.Lock()
"""One gathered value is decoded at a time."""
RECENT = 5
"""Rounds over whose update norms the median is taken."""


def check_content(verb: Verb, path: Path) -> str | None:
    """The schema of a payload as JSON (``None`` for gathered values).

    Raises:
        RefusedError: no payload of this verb, or a number in it that is not finite.
    """
    if verb == "gather":
        with _DECODING:
            _check_gathered(path.read_bytes())
        return None
    tensors = open_payload(path)
    if verb == "sum" and list(tensors) != ["value"]:
        raise RefusedError("A sum takes one array.")
    if verb == "mean" and not all(map(is_floating, tensors.values())):
        raise RefusedError("A mean takes floating-point tensors only.")
    check_finite(tensors)
    return json.dumps(schema_of(layout_of(tensors)), sort_keys=True)


def _check_gathered(text: bytes) -> None:
    if sum(map(text.count, (b",", b":", b"[", b"{"))) > MOST_ELEMENTS:
        raise RefusedError(f"A gathered value has more than {MOST_ELEMENTS} elements.")
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise RefusedError("A gathered value is no JSON.") from None
    layer = [value]
    for _ in range(DEEPEST):
        layer = [inner for outer in layer for inner in _within(outer)]
    if layer:
        raise RefusedError(f"A gathered value lies more than {DEEPEST} lists and tables deep.")


def _within(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _refuse_constant(constant: str) -> None:
    raise ValueError(constant)


def distance(one: Mapping[str, Array], other: Mapping[str, Array]) -> float:
    """L2 norm of the difference of two sets of tensors of equal names and shapes, in float64."""
    squared = 0.0
    for name, array in one.items():
        for block, counterpart in zip(blocks(array), blocks(other[name]), strict=True):
            difference = block.astype(np.float64) - counterpart.astype(np.float64)
            squared += float(np.dot(difference, difference))
    return math.sqrt(squared)


def differs(key: str, *sites: str) -> str:
    """The sentence that says that the tensors of some sites are not those of the others."""
    quoted = ", ".join(f"'{site}'" for site in sites)
    return (
        f"The tensors of site {quoted} for '{key}' differ in names, shapes or dtypes from those of "
        "the other sites or of the first round. Do all sites train the same plans and configuration?"
    )


class QuarantinedError(RefusedError):
    """An update that moved further than ``max_update_norm`` allows."""


class Admission:
    """What the first payloads of a run and its recent rounds lay down for later ones. Called under the store's lock.

    Args:
        study: the study.
        store: the coordinator's memory.
        share: a site's of the spool in a run, in bytes; it bounds its payloads of a name until that has closed once.
    """

    def __init__(self, study: Federation, store: Store, share: int):
        self._study = study
        self._store = store
        self._share = share

    def check_size(self, offer: Offer) -> None:
        """Bound a payload before it is sent; raises :class:`RefusedError`."""
        key, site, size = offer.key, offer.site, offer.size
        if offer.verb != "mean":
            if size > LARGEST[offer.verb]:
                raise RefusedError(
                    f"A {offer.verb} takes {LARGEST[offer.verb]} bytes at most, not {size} ('{key}', site '{site}')."
                )
        elif (agreed := self._store.agreed(offer.run, name_of(key))) is not None:
            if size > agreed.size:
                raise RefusedError(
                    f"The tensors of site '{site}' for '{key}' differ from those of the first round: they have {size} "
                    f"bytes instead of {agreed.size}. Do all sites train the same plans and configuration?"
                )
        elif size > self._share:
            raise RefusedError(
                f"'{key}' of site '{site}' has {size / 1e9:.3f} GB, more than its share of {self._share / 1e9:.3f} GB "
                "in the coordinator's spool. Restart the coordinator with a larger --spool-quota-gb."
            )

    def check_kind(self, offer: Offer, ballot: Ballot, collective: Collective | None, missing: Iterable[str]) -> None:
        """Compare with the first round's and the other sites', as far as these have settled it.

        Args:
            offer: the site's.
            ballot: of which kind its contribution is.
            collective: to which it would contribute; ``None``: nobody has yet.
            missing: the sites for which the collective waits.

        Raises:
            RefusedError: its tensors are not those of the first round, or the other sites have outvoted it already.
        """
        agreed = self._store.agreed(offer.run, name_of(offer.key)) if offer.verb == "mean" else None
        if agreed is not None and ballot.schema not in (None, agreed.schema):
            raise RefusedError(differs(offer.key, offer.site))
        cast = {} if collective is None else self._store.ballots(collective)
        if cast and not can_win(offer.site, ballot, cast, missing):
            winner = elected(cast)
            if winner.verb != ballot.verb:
                raise RefusedError(f"'{offer.key}' is a {winner.verb} at the other sites, not a {ballot.verb}.")
            raise RefusedError(differs(offer.key, offer.site))

    def last_model(self, offer: Offer, schema: str | None) -> Path | None:
        """The model from which an update is measured; ``None``: its norm is not bounded, or cannot be."""
        run, agreed = offer.run, self._store.agreed(offer.run, MODEL)
        if self._study.max_update_norm is None or offer.verb != "mean" or name_of(offer.key) != MODEL:
            return None
        closed = [c for c in self._store.collectives(run, "closed") if c.verb == "mean" and c.name == MODEL]
        if not closed or agreed is None or agreed.schema != schema:
            return None
        return self._store.result_path(run, closed[-1].key)

    def check_norm(self, offer: Offer, norm: float) -> None:
        """Compare an update with the accepted ones of the last :data:`RECENT` rounds; without any, all pass.

        Raises:
            QuarantinedError: its norm (:func:`distance`) is above ``max_update_norm`` times their median.
        """
        run = offer.run
        means = [c.key for c in self._store.newest_means(run, MODEL, RECENT)]
        recent, factor = self._store.norms(run, means), self._study.max_update_norm
        if recent and factor is not None and norm > factor * (median := statistics.median(recent)):
            raise QuarantinedError(
                f"The update of site '{offer.site}' for '{offer.key}' is quarantined: its norm {norm:.4g} is above "
                f"{factor:g} times {median:.4g}, the median of recent rounds (max_update_norm). Look into the training "
                "at this site; if it is sound, raise max_update_norm in federation.toml, restart the coordinator, and "
                "continue with --c."
            )
