"""FedAvg: federated averaging. Options and facts; docs/methods.md explains them."""

from __future__ import annotations

from typing import Literal

from nnunet_fed.study.method_table import FineTuned


class FedAvg(FineTuned):
    """Federated averaging (McMahan et al. 2017, Algorithm 1): the mean of the sites' weights after local training."""

    TITLE = "FedAvg"
    name: Literal["fedavg"]
