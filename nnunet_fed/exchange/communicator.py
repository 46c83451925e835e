"""The collectives through which a method sees the other sites, and a federation of threads for tests.

Models that go from one site to another take :mod:`nnunet_fed.gossip.mailbox` and the peer process instead.

The word *communicator* is MPI's: through it a site takes part in a federation. Source: ours.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np

from nnunet_fed.errors import DeadlineError, NoContributionError, RefusedError
from nnunet_fed.exchange.payload import Array, Tensors, layout_of, schema_of
from nnunet_fed.exchange.reduction import exact_sum, weighted_mean

T = TypeVar("T")

SMALLEST_WEIGHT, LARGEST_WEIGHT = 1e-9, 1e9
"""Of a site that takes part in a mean: beyond them its arithmetic would lose, or overflow."""
Verb = Literal["mean", "sum", "gather"]
"""Kinds of collectives."""


class Held(NamedTuple):
    """The newest model of the federation that a site has taken: a closed mean."""

    key: str
    digest: str
    """Of its payload, as it came."""


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

    def mean(self, key: str, tensors: Tensors, weight: float, exact: bool = False) -> dict[str, Array]:
        """Weighted mean over the sites of this round.

        Args:
            key: name of the collective.
            tensors: floating-point arrays by name; names, shapes and dtypes are the same at every site.
            weight: 0, or from :data:`SMALLEST_WEIGHT` to :data:`LARGEST_WEIGHT`; a site of weight 0 sends no tensors.
            exact: send every bit, whatever the study's ``wire_dtype``: for what must not be rounded, such as a state
                that the other sites have computed themselves. Without it, float32 tensors may come back rounded to the
                wire's dtype, the same at every site (:mod:`nnunet_fed.exchange.precision`).

        Returns:
            Arrays of the given names, shapes and dtypes; summed in float64 in the order of the site names.

        Raises:
            NoContributionError: every weight is 0.
            RoundClosedError: the round closed without this site.
            RefusedError: a weight that is not allowed, or another schema than the other sites'.
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


def check_weight(weight: float) -> float:
    """The weight; raises :class:`RefusedError` for one that no mean can take (rule 4 of the protocol)."""
    if not (weight == 0 or SMALLEST_WEIGHT <= weight <= LARGEST_WEIGHT):
        raise RefusedError(
            f"The weight of a site must be 0, or a number from {SMALLEST_WEIGHT:g} to {LARGEST_WEIGHT:g}, not {weight}."
        )
    return weight


class LocalFederation:
    """Sites as threads. Each verb returns once all sites have called it with the same key.

    Args:
        sites: names of the sites.
        deadline: seconds after which a verb that still misses a site raises :class:`DeadlineError`.
    """

    def __init__(self, sites: Sequence[str], deadline: float = 60.0):
        self.sites = tuple(sorted(sites))
        self.deadline = deadline
        self._changed = threading.Condition()
        self._contributions: dict[str, dict[str, Any]] = {}

    def communicator(self, site: str) -> LocalCommunicator:
        """That of one site."""
        return LocalCommunicator(self, site)

    def run(self, function: Callable[[LocalCommunicator], T]) -> dict[str, T]:
        """Call ``function`` once per site, each in a thread of its own; returns the answers by site.

        Raises:
            Exception: the first error of any site, in the order of the names; errors that only follow from another
                site's absence (:class:`DeadlineError`) come last.
        """
        with ThreadPoolExecutor(len(self.sites)) as executor:
            futures = {site: executor.submit(function, self.communicator(site)) for site in self.sites}
        errors = [error for future in futures.values() if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, DeadlineError)):
            raise error
        return {site: future.result() for site, future in futures.items()}

    def exchange(self, key: str, site: str, value: Any) -> dict[str, Any]:
        """Hand in a value and wait for those of all sites; returns them in the order of the site names."""
        with self._changed:
            contributions = self._contributions.setdefault(key, {})
            contributions.setdefault(site, value)
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: len(contributions) == len(self.sites), self.deadline):
                missing = ", ".join(s for s in self.sites if s not in contributions)
                raise DeadlineError(f"'{key}' still misses {missing} after {self.deadline:g} s.")
            return {name: contributions[name] for name in self.sites}


class LocalCommunicator:
    """The :class:`Collectives` at one site of a :class:`LocalFederation`."""

    def __init__(self, federation: LocalFederation, site: str):
        if site not in federation.sites:
            raise RefusedError(f"There is no site '{site}' in this federation of {', '.join(federation.sites)}.")
        self._federation = federation
        self.site = site
        self.sites = federation.sites

    def mean(self, key: str, tensors: Tensors, weight: float, exact: bool = False) -> dict[str, Array]:
        """See :meth:`nnunet_fed.exchange.communicator.Collectives.mean`; among threads it is exact anyway."""
        given = {name: np.array(array) for name, array in tensors.items()} if check_weight(weight) > 0 else None
        collected = self._federation.exchange(key, self.site, (given, weight))
        payloads = [tensors for tensors, _ in collected.values() if tensors is not None]
        weights = [weight for _, weight in collected.values() if weight > 0]
        if not payloads:
            raise NoContributionError(f"No site contributed to '{key}'.")
        if any(schema_of(layout_of(payload)) != schema_of(layout_of(payloads[0])) for payload in payloads):
            raise RefusedError(f"The sites' tensors for '{key}' differ in names, shapes or dtypes.")
        if any(not np.issubdtype(array.dtype, np.floating) for array in payloads[0].values()):
            raise RefusedError("A mean takes floating-point tensors only.")
        return {name: weighted_mean([given[name] for given in payloads], weights) for name in payloads[0]}

    def sum(self, key: str, array: Array) -> Array:
        """See :meth:`nnunet_fed.exchange.communicator.Collectives.sum`."""
        return exact_sum(list(self._federation.exchange(key, self.site, np.array(array)).values()))

    def gather(self, key: str, value: Any) -> dict[str, Any]:
        """See :meth:`nnunet_fed.exchange.communicator.Collectives.gather`."""
        collected = self._federation.exchange(key, self.site, json.dumps(value, allow_nan=False))
        return {site: json.loads(text) for site, text in collected.items()}
