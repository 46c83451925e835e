"""FedProx: federated averaging with a proximal term. Options and facts; docs/methods.md explains them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nnunet_fed.study.method_table import FineTuned


class FedProx(FineTuned):
    """Federated averaging with a proximal term; see :mod:`nnunet_fed.methods.proximal`."""

    TITLE = "FedProx"
    DEVICE_FLOATS = 1  # the weights of the round's start
    name: Literal["fedprox"]
    mu: float = Field(default=0.01, ge=0)
    """The source's mu; 0: federated averaging, bit for bit. The source has no default for all data: tune it."""
