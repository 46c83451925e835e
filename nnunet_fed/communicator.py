"""The four verbs through which a method sees the other sites, and a federation of threads for tests.

The word *communicator* is MPI's: a site's seat in a federation. Source: ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]


class Collectives(Protocol):
    """Verbs that involve all sites of a round; every site gets the same answer.

    A ``key`` such as ``"round-0003/model"`` names one use of one verb in one run. The part before the slash is the
    *scope*: the sites that take part are frozen at the first collective of a scope.
    """

    @property
    def site(self) -> str:
        """Name of this site."""
        ...

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of all sites of the study, sorted."""
        ...

    def mean(self, key: str, tensors: Tensors, weight: float) -> dict[str, Array]:
        """Weighted mean over the sites of this round.

        Args:
            key: name of the collective.
            tensors: floating-point arrays by name; names, shapes and dtypes are the same at every site.
            weight: non-negative and finite; a site of weight 0 sends no tensors.

        Returns:
            Arrays of the given names, shapes and dtypes; summed in float64 in the order of the site names.

        Raises:
            NoContributionError: every weight is 0.
            RoundClosedError: the round closed without this site.
            RefusedError: negative or non-finite weight, or another schema than the other sites'.
            DeadlineError: the deadline passed with fewer than ``min_sites`` sites.
        """
        ...

    def sum(self, key: str, array: Array) -> Array:
        """Plain sum of a small integer or floating-point array; same shape at every site.

        Integers are summed exactly in int64, floating-point numbers in float64. Errors as in :meth:`mean`.
        """
        ...

    def gather(self, key: str, value: Any) -> dict[str, Any]:
        """Every site's small JSON value, by site name, sorted. Errors as in :meth:`mean`."""
        ...


class Gossip(Protocol):
    """Site to site, without a coordinator."""

    def push(self, peer: str, tensors: Tensors, meta: Mapping[str, Any]) -> None:
        """Send tensors and a small JSON value to one peer; never waits for the peer to read them."""
        ...

    def inbox(self) -> list[tuple[str, dict[str, Array], dict[str, Any]]]:
        """What peers have pushed since the last call: (peer, tensors, meta), oldest first."""
        ...


class Communicator(Collectives, Gossip, Protocol):
    """All four verbs: the whole network that a method sees."""
