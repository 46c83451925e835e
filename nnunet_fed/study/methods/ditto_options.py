"""Ditto: a personalized model beside the global one. Options and facts; docs/methods.md explains them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nnunet_fed.study.method_table import MethodTable


class Ditto(MethodTable):
    """Federated averaging, and a personalized model beside it; see :mod:`nnunet_fed.methods.proximal`."""

    TITLE = "Ditto"
    MODELS = 2
    DEVICE_FLOATS = 1  # the global model, to which the personalized one is pulled
    name: Literal["ditto"]
    pull_strength: float = Field(default=1.0, ge=0)
    """The source's lambda: how strongly the personalized model is pulled to the global one; 0: it trains alone."""
