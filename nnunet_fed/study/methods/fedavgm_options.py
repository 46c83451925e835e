"""FedAvgM: federated averaging with server momentum. Options and facts; docs/methods.md explains them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nnunet_fed.study.method_table import FineTuned


class FedAvgM(FineTuned):
    """Federated averaging with momentum of the global model; see :mod:`nnunet_fed.methods.server_optimizer`."""

    TITLE = "FedAvgM"
    HOST_FLOATS = 2  # the round's start, and the last step
    name: Literal["fedavgm"]
    server_lr: float = Field(default=1.0, gt=0)
    server_momentum: float = Field(default=0.9, ge=0, lt=1)
    """The source's beta; with 0, and ``server_lr`` 1, federated averaging, bit for bit."""
