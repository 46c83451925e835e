"""What a site has answered while planning, of each question so many different answers at most. Source: ours.

A search for quantiles asks for counts, and each further step depends on what the coordinator says. One that lies, and
lets a study be planned again and again, would learn another value of the site each time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.exchange.communicator import Collectives
from nnunet_fed.exchange.payload import Array, Tensors, encode, measure
from nnunet_fed.files import write_json

FILE = "answered.json"
MOST = 16
"""Different arrays that a site gives to the sum of one key: a study may be planned a few times."""


class AnsweredCollectives:
    """The collectives of a site that is planning; it gives no more than :data:`MOST` different arrays to a sum.

    Args:
        communicator: this site's.
        path: where the digests of what it has given stand, by key.
    """

    def __init__(self, communicator: Collectives, path: Path):
        self._communicator = communicator
        self._path = path
        self.site, self.sites = communicator.site, communicator.sites
        try:
            self._given: dict[str, list[str]] = json.loads(path.read_bytes())
        except FileNotFoundError:
            self._given = {}
        except ValueError:
            raise ConfigurationError(f"{path} is damaged. Delete it, and plan again.") from None

    def mean(self, key: str, tensors: Tensors, weight: float, exact: bool = False) -> dict[str, Array]:
        """See :meth:`nnunet_fed.exchange.communicator.Collectives.mean`."""
        return self._communicator.mean(key, tensors, weight, exact)

    def sum(self, key: str, array: Array) -> Array:
        """See :meth:`nnunet_fed.exchange.communicator.Collectives.sum`.

        Raises:
            ConfigurationError: too many different arrays were given to this key before.
        """
        digest, given = measure(encode({"value": array}))[0], self._given.setdefault(key, [])
        if digest not in given:
            if len(given) >= MOST:
                raise ConfigurationError(
                    f"Site '{self.site}' has answered '{key}' in {MOST} different ways: each planning tells a little "
                    "more of its cases, and a coordinator could ask for that. If the study was planned so often with "
                    f"good reason, delete {self._path} and plan again."
                )
            given.append(digest)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, self._given)
        return self._communicator.sum(key, array)

    def gather(self, key: str, value: Any) -> dict[str, Any]:
        """See :meth:`nnunet_fed.exchange.communicator.Collectives.gather`."""
        return self._communicator.gather(key, value)
