"""How rounds sit in epochs: the common start, and a log that fits where a site goes on."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Any

from nnunet_fed.exchange.communicator import Collectives
from nnunet_fed.exchange.keys import key_of, start_scope
from nnunet_fed.exchange.payload import Array, Tensors
from nnunet_fed.trainers.parts.base_trainer import BASE_TRAINER, SAME_TRAINER
from nnunet_fed.trainers.parts.publishing import from_next_source, publish, require_equal

NO_START = "No site contributed initial weights."


def common_start(communicator: Collectives, name: str, tensors: Callable[[], Tensors]) -> tuple[str, dict[str, Array]]:
    """The initial weights of the first site that takes part, in the order of the names, for all.

    Args:
        communicator: this site's.
        name: name of the mean.
        tensors: gives this site's own initial weights.

    Returns:
        The scope in which the sites agreed, and the tensors.
    """

    def from_source(numbered: tuple[int, str]) -> tuple[str, dict[str, Array]]:
        number, source = numbered
        scope = start_scope(number)
        # as every later model: what the wire's dtype cannot hold, no site has from the start
        return scope, publish(communicator, key_of(scope, name), source, tensors, exact=False)

    return from_next_source(enumerate(communicator.sites), from_source, NO_START)


PRETRAINED = "pretrained weights"
"""What the sites compare that start from a file; where none does, nobody tells of it."""
_REMEDIES = {
    PRETRAINED: "Start all sites with the same file, -pretrained_weights FILE ('nnunet_fed digest FILE' prints its "
    "digest), or all without one, once the coordinator has opened a new attempt (nnunet_fed new-attempt STATE).",
    BASE_TRAINER: SAME_TRAINER,
}
_REMEDY = (
    "Run 'nnunet_fed plan_and_preprocess' at all sites again, with the same versions of nnunet_fed, nnunetv2 and torch."
)


def require_agreement(communicator: Collectives, scope: str, digests: dict[str, str]) -> None:
    """Compare what must be equal at all sites before training.

    Raises:
        DisagreementError: names what differs, and which site has what.
    """
    gathered = communicator.gather(key_of(scope, "agreement"), digests)
    for what in dict.fromkeys(name for told in gathered.values() for name in told):
        told = {site: values.get(what) for site, values in gathered.items()}
        require_equal(told, f"The sites differ in their {what}", _REMEDIES.get(what, _REMEDY))


def fit_log(log: dict[str, list[Any]], epochs: int) -> None:
    """Give each list of nnU-Net's log ``epochs`` entries, since it takes exactly one an epoch.

    Later ones go. Where some are missing, the last one is repeated; where there is none yet, the Dice is 0, the time is
    now, and a loss is not a number.
    """
    for name, values in log.items():
        del values[epochs:]
        filler: Any = math.nan
        if name.endswith("timestamps"):
            filler = time.time()
        elif "dice" in name:
            filler = [0.0] if name == "dice_per_class_or_region" else 0.0
        while len(values) < epochs:
            values.append(copy.copy(values[-1]) if values else filler)
