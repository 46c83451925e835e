"""Federated averaging.

Source: McMahan et al., *Communication-Efficient Learning of Deep Networks from Decentralized Data*, AISTATS 2017
(arXiv 1602.05629), Algorithm 1: after local training, w <- sum_k (n_k / n) w_k. The sum is the verb ``mean``; what a
site's weight n_k is, is all that is left to say.
"""

from __future__ import annotations

from typing import Literal


def site_weight(weighting: Literal["cases", "uniform"], training_cases: int) -> float:
    """Weight of a site in a mean: its number of training cases (the source's n_k), or 1 (ours)."""
    return float(training_cases) if weighting == "cases" else 1.0
