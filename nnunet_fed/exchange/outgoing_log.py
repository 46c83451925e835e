"""``outgoing.jsonl``: what a site sends, a line of JSON each time, on disk before the bytes leave. Source: ours.

Every line says when (``at``), to whom (``to``) and what (``what``):

* ``offer``: the digest and size of a contribution to the collective ``key`` of the run ``run``, before it is asked for,
  and key and digest of the newest model of the federation that the site holds;
* ``upload``: the contribution itself. Of tensors: names, dtypes and shapes; of arrays: dtype, shape and ``value``, or
  ``nonzero`` (pairs of flattened index and value), unless it is too long; other values in full;
* ``join``, ``report``, ``note``, ``leave``, ``introduce`` (the versions, by ``nnunet_fed check``): the whole message;
* ``noise``: so many random bytes, to see how fast they pass (``check``).

To a peer (GCML) go ``info``, in full; ``offer`` and ``upload`` of a model, with its version and number of training
cases; ``ask``, for the peer's model. They stand in the file of this name in the training's mailbox.

A site's questions to the coordinator (for a result, for the newest round, for the status) hold nothing but the site's
name and that for which they ask; they have no line. What the network loses and a site sends again has a line again if
it is an upload.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_fed.exchange.payload import CHUNK, Array, Tensors, layout_of, schema_of
from nnunet_fed.logs import JsonLog
from nnunet_fed.strict_json import to_json

FILE = "outgoing.jsonl"
LARGEST_FILE, KEPT_FILES = 1 << 26, 9
"""Bytes from which on a file becomes ``outgoing.jsonl.1``, and how many older ones stay."""
LARGEST_ARRAY = 1024
"""Elements of an array that is written in full; of a larger one only those that are not 0, if so few are not."""

Outgoing = Callable[[Mapping[str, Any]], None]
"""Hears of everything that is about to leave this site."""


class OutgoingLog:
    """Append to a file; call it with an entry.

    Args:
        path: the file. It is opened for each line, so it may be moved away at any time.
    """

    def __init__(self, path: Path):
        self.path = path
        self._log = JsonLog(path, LARGEST_FILE, KEPT_FILES)

    def __call__(self, entry: Mapping[str, Any], repeats: bool = False) -> None:
        """Write one entry, and the time.

        Args:
            entry: what leaves.
            repeats: somebody else decides how often it is asked for. The same again is counted: the next line that
                differs, or comes a minute later, says how often (``repeated``).
        """
        if not repeats:
            self._log.write(entry)
            return
        # from which byte on is the other's choice, too
        place = {"from_byte": entry["from_byte"] // CHUNK} if "from_byte" in entry else {}
        self._log.write(entry, to_json({**entry, **place}))


def tensors_entry(tensors: Tensors) -> dict[str, Any]:
    """What the log says of tensors: dtype and shape by name."""
    return {"tensors": {name: [dtype, list(shape)] for name, (dtype, shape) in schema_of(layout_of(tensors)).items()}}


def array_entry(array: Array) -> dict[str, Any]:
    """What the log says of an array: all of it if it is small or nearly empty, as histograms are."""
    described = {"dtype": str(array.dtype), "shape": list(array.shape)}
    if array.size <= LARGEST_ARRAY:
        return {**described, "value": array.tolist()}
    places = np.flatnonzero(array)
    if len(places) <= LARGEST_ARRAY:
        pairs = zip(places.tolist(), array.reshape(-1)[places].tolist(), strict=True)
        return {**described, "nonzero": [list(pair) for pair in pairs]}
    return described


def value_entry(value: Any) -> dict[str, Any]:
    """What the log says of a JSON value: all of it."""
    return {"value": value}
