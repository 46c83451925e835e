"""Each site's model at each site: the keys of the collectives, and the matrix that comes of them. Source: ours.

The coordinator knows these keys for its record only: what a site says is read with care, since a record must not fail.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nnunet_fed.exchange.keys import CROSS_SITE, cross_site_scope, key_of

DICE = key_of(CROSS_SITE, "dice")
"""Key of what the sites gather at the end: the Dice of each model, by the model's site."""

Column = dict[str, float | None]
"""Mean foreground Dice at one site, by the model's site; ``None``: there was nothing to compare."""
Matrix = dict[str, Column]
"""Mean foreground Dice by the model's site, then by the site at which it was evaluated."""


def model_key(site: str) -> str:
    """Key of the mean that hands a site's deployable model to the others.

    Not called ``model``: it is no round's model, from which a late site would go on, and may have other tensors.
    """
    return key_of(cross_site_scope(site), "deployed")


def matrix(columns: Mapping[str, Any], sites: Iterable[str]) -> Matrix:
    """The matrix, with a row for each model that was evaluated anywhere.

    Args:
        columns: by the site that says so, its :data:`Column`; what is no Dice counts as ``None``.
        sites: names of the sites whose models count.
    """
    known = {at: column for at, column in sorted(columns.items()) if isinstance(column, Mapping)}
    return {
        model: row
        for model in sorted(sites)
        if (row := {at: _dice(column[model]) for at, column in known.items() if model in column})
    }


def _dice(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value <= 1 else None
