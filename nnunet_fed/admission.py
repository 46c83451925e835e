"""What the coordinator looks at before a contribution stands: its content, its numbers, its distance. Source: ours."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from nnunet_fed.errors import RefusedError
from nnunet_fed.payload import BLOCK, Array, is_floating, layout_of, open_payload, schema_of

Verb = Literal["mean", "sum", "gather"]

LARGEST_VALUE = 1 << 26
"""Bytes of a sum's or a gathered value's payload. Those of a mean are bounded by the first one of their name."""
RECENT = 5
"""Rounds over whose update norms the median is taken."""


def check_content(verb: Verb, path: Path) -> str | None:
    """The schema of a payload as JSON (``None`` for gathered values).

    Raises:
        RefusedError: no payload of this verb, or a number in it that is not finite.
    """
    if verb == "gather":
        try:
            json.loads(path.read_bytes(), parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            raise RefusedError("A gathered value is no JSON.") from None
        return None
    tensors = open_payload(path)
    if verb == "sum" and list(tensors) != ["value"]:
        raise RefusedError("A sum takes one array.")
    if verb == "mean" and not all(map(is_floating, tensors.values())):
        raise RefusedError("A mean takes floating-point tensors only.")
    for name, array in tensors.items():
        if is_floating(array) and not all(np.isfinite(block).all() for block in _blocks(array)):
            raise RefusedError(f"The tensor '{name}' holds a number that is not finite: a diverged training?")
    return json.dumps(schema_of(layout_of(tensors)), sort_keys=True)


def _refuse_constant(constant: str) -> None:
    raise ValueError(constant)


def _blocks(array: Array) -> Iterator[Array]:
    flat = array.reshape(-1)
    return (flat[start : start + BLOCK] for start in range(0, flat.size, BLOCK))


def distance(one: Mapping[str, Array], other: Mapping[str, Array]) -> float:
    """L2 norm of the difference of two sets of tensors of equal names and shapes, in float64."""
    squared = 0.0
    for name, array in one.items():
        for block, counterpart in zip(_blocks(array), _blocks(other[name]), strict=True):
            difference = block.astype(np.float64) - counterpart.astype(np.float64)
            squared += float(np.dot(difference, difference))
    return math.sqrt(squared)


def check_norm(site: str, key: str, norm: float, recent: Sequence[float], factor: float) -> None:
    """Compare an update with the accepted ones of the last :data:`RECENT` rounds; without any, all pass.

    Args:
        site: who brings it.
        key: the collective.
        norm: of the update, see :func:`distance`.
        recent: norms of the accepted updates.
        factor: ``max_update_norm`` of the study.

    Raises:
        RefusedError: it is above ``factor`` times their median.
    """
    if recent and norm > factor * (median := statistics.median(recent)):
        raise RefusedError(
            f"The update of site '{site}' for '{key}' is quarantined: its norm {norm:.4g} is above {factor:g} times "
            f"{median:.4g}, the median of recent rounds (max_update_norm). Look into the training at this site; if it "
            "is sound, raise max_update_norm in federation.toml, restart the coordinator, and continue with --c."
        )
