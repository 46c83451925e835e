"""FedAdam: Adam on the sites' updates. Options and facts; docs/methods.md explains them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nnunet_fed.study.method_table import FineTuned


class FedAdam(FineTuned):
    """Adam on the mean of the sites' updates; see :mod:`nnunet_fed.methods.server_optimizer`."""

    TITLE = "FedAdam"
    HOST_FLOATS = 3  # the round's start, and two moments
    name: Literal["fedadam"]
    server_lr: float = Field(default=0.01, gt=0)
    """The source's eta, which it tunes for each task; this value is ours."""
    beta_1: float = Field(default=0.9, ge=0, lt=1)
    beta_2: float = Field(default=0.99, ge=0, lt=1)
    tau: float = Field(default=1e-3, gt=0)
    """The source's degree of adaptivity: what is added to the root of the second moment."""
