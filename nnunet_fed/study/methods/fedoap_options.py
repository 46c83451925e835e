"""FedOAP: a shared trunk and private parts, across organs. Options and facts; docs/methods.md explains them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nnunet_fed.study.method_table import FineTuned


class FedOAP(FineTuned):
    """A shared trunk, private parts and fine-tuning, across organs; see :mod:`nnunet_fed.methods.fedoap`."""

    TITLE = "FedOAP"
    LAST_MODEL = "federated"
    own_channels_option = "private_stem"
    name: Literal["fedoap"]
    finetune_epochs: int = Field(default=2, ge=0)
    """As for :class:`FineTuned`; 2 is the public code's."""
    heads: int = Field(default=1, ge=1)
    """Heads of the attention; the public code's has one."""
    query_branch: Literal["copy", "light"] = "copy"
    """The private branch that gives the queries: as the encoder's last stage, or one convolution block."""
    adapter: Literal["res3", "none"] = "res3"
    """The private spatial adapter before the output."""
    private_stem: bool = False
    """The first convolution is private too: each site has input channels of its own, see docs/planning.md."""
    tau: float = Field(default=0.75, ge=0, le=1)
    """Fine-tuning: logits are perturbed where the error exceeds it; at 1 nowhere."""
    sigma: float = Field(default=0.1, ge=0)
    """Fine-tuning: standard deviation of the perturbation."""
    perturbation_weight: float = Field(default=0.1, ge=0, le=1)
    """Fine-tuning: weight of the perturbed loss, the source's lambda; 0: plain fine-tuning."""
