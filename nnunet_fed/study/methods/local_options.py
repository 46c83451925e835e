"""Local: training alone. Options and facts; docs/methods.md explains them."""

from __future__ import annotations

from typing import Literal

from nnunet_fed.study.method_table import FineTuned


class Local(FineTuned):
    """Every site trains alone, by the harmonised plans and from the common start: the control of all methods."""

    TITLE = "Local"
    EXCHANGES = False
    name: Literal["local"]
