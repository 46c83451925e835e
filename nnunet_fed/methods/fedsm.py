"""FedSM: SoftPull for the personalized models, and the super model's rule.

Source: Xu et al., *Closing the Generalization Gap of Cross-silo Federated Medical Image Segmentation*, CVPR 2022 (arXiv
2203.10144). Its full text was not available to us: what is here follows the authors' group's published code (NVFlare,
``research/fed-sm``), and agreement with the paper's equations is unconfirmed. Each docstring says what is *ours*.

Symbols: ``w_k`` a site's personalized weights after its local training, ``v_k`` after the pull, K the number of sites
of the round, lambda (``softpull_self_weight``) the weight of a site's own model, gamma the selector's threshold.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from nnunet_fed.errors import ConfigurationError, DisagreementError
from nnunet_fed.exchange.communicator import Collectives
from nnunet_fed.exchange.keys import key_of
from nnunet_fed.exchange.payload import Tensors
from nnunet_fed.methods.tensors import to_arrays

PullSchedule = Literal["constant", "lr_coupled"]
Reason = Literal["personal", "below_gamma", "gate", "unfamiliar", "forced", "best_model_gate", "not_shared"]

GLOBAL = "global"
"""The global model, wherever a site's name says a personalized one."""


# ------------------------------------------------------------------------------------------------------------- SoftPull


def contraction(self_weight: float, sites: int) -> float:
    """The factor rho by which SoftPull shrinks every model's deviation from the mean.

    The published ``v_k = lambda w_k + (1 - lambda)/(K - 1) sum_{j != k} w_j`` is ``v_k = rho w_k + (1 - rho) mean(w)``
    with ``rho = (lambda K - 1)/(K - 1)``: so a site needs the uniform mean only. Source: the rule is the published
    code's, this form of it ours.

    Args:
        self_weight: lambda, within 1/K (all models equal: rho 0) and 1 (no pull: rho 1).
        sites: K; a single site has nobody to be pulled to, and rho is 1.

    Raises:
        ConfigurationError: lambda is outside; below 1/K the pull would throw each model past the mean.
    """
    if sites < 1:
        raise ConfigurationError(f"A pull needs at least one site, not {sites}.")
    if not 1 / sites <= self_weight <= 1 and not (sites == 1 and 0 <= self_weight <= 1):
        raise ConfigurationError(
            f"softpull_self_weight is {self_weight:g}, but with {sites} sites in the round it must lie between "
            f"1/{sites} = {1 / sites:.4g} (all personalized models equal) and 1 (no pull)."
        )
    return 1.0 if sites == 1 else min(1.0, max(0.0, (self_weight * sites - 1) / (sites - 1)))


@dataclass(frozen=True)
class Pull:
    """How strongly one round pulls."""

    rho: float
    self_weight: float
    """lambda of this round: ``(1 + (K - 1) rho)/K``."""


def scheduled_pull(schedule: PullSchedule, self_weight: float, sites: int, lr_ratio: float) -> Pull:
    """The pull of a round.

    ``constant`` is the published code's. ``lr_coupled`` (ours) keeps ``(1 - rho)/(rho eta)`` as at the start: where
    local steps with the learning rate eta balance the pull, the deviation of the models from their mean is about
    proportional to ``eta rho/(1 - rho)``, so that under a constant pull a decaying learning rate makes them all equal.

    Args:
        schedule: see above.
        self_weight: lambda at the initial learning rate.
        sites: K, the sites of this round.
        lr_ratio: this round's learning rate relative to the initial one.

    Raises:
        ConfigurationError: as :func:`contraction`; or the ratio is negative or not finite.
    """
    if not (math.isfinite(lr_ratio) and lr_ratio >= 0):
        raise ConfigurationError(f"The ratio of learning rates must be finite and at least 0, not {lr_ratio}.")
    rho = contraction(self_weight, sites)
    if schedule == "lr_coupled" and rho > 0:
        rho /= rho + (1 - rho) * lr_ratio
    return Pull(rho, (1 + (sites - 1) * rho) / sites)


@torch.no_grad()
def softpull(own: Mapping[str, torch.Tensor], mean: Tensors, rho: float) -> None:
    """``own <- rho own + (1 - rho) mean``, in place.

    Takes weights, never differences of weights: pulled differences leave the models where local training alone would.
    With rho 1 nothing is touched; tensors that equal the mean stay as they are, bit for bit.

    Args:
        own: this site's tensors by name; those that are not floating-point stay its own.
        mean: the uniform mean over the sites, of the same floating-point tensors.
        rho: of :func:`scheduled_pull`.

    Raises:
        DisagreementError: names or shapes differ.
    """
    pulled = _floating(own)
    if pulled.keys() != mean.keys():
        differing = ", ".join(sorted(pulled.keys() ^ mean.keys())[:5])
        raise DisagreementError(f"The mean has other tensors than this site's personalized model: {differing}.")
    for name, tensor in pulled.items():
        if tuple(tensor.shape) != mean[name].shape:
            raise DisagreementError(
                f"The mean's tensor '{name}' has the shape {mean[name].shape}, this site's {tuple(tensor.shape)}."
            )
    if rho == 1:  # even a signed zero survives
        return
    for name, tensor in pulled.items():
        tensor.lerp_(torch.from_numpy(np.array(mean[name])).to(tensor), 1 - rho)


def deviation(communicator: Collectives, key: str, own: Mapping[str, torch.Tensor], mean: Tensors) -> float:
    """How far the personalized models are apart: ``sqrt(sum_k |v_k - mean|^2 / sum_k |mean|^2)``, out of one sum.

    0 means that all are the same model, and personalization is gone. Source: ours.

    Args:
        communicator: this site's.
        key: of the sum.
        own: this site's personalized tensors after the pull.
        mean: their uniform mean, which the pull does not change.
    """
    squares = np.zeros(2)
    for name, array in to_arrays(_floating(own)).items():
        centre = mean[name].astype(np.float64)
        squares += [np.sum(np.square(array - centre)), np.sum(np.square(centre))]
    apart, size = communicator.sum(key, squares)
    return math.sqrt(apart / size) if size > 0 else 0.0


@dataclass(frozen=True)
class Pulled:
    """What one round's pull did."""

    rho: float
    self_weight: float
    sites: int
    """K: the sites of this round."""
    deviation: float
    """After the pull, see :func:`deviation`."""


def pull_round(
    communicator: Collectives,
    scope: str,
    own: Mapping[str, torch.Tensor],
    schedule: PullSchedule,
    self_weight: float,
    lr_ratio: float,
) -> Pulled:
    """One round's SoftPull at this site, in place: a sum, a mean and a sum, whatever the number of sites.

    Only the sites of the round count: lambda is checked against their number, and the models of absent sites stay as
    they are.

    Args:
        communicator: this site's.
        scope: first part of the round's keys.
        own: this site's personalized tensors, weights and not differences.
        schedule: see :func:`scheduled_pull`, as for the arguments that follow.
        self_weight: lambda at the initial learning rate.
        lr_ratio: this round's learning rate relative to the initial one.

    Raises:
        ConfigurationError: lambda does not suit the number of sites of this round; the same at every site, and before
            any model is sent.
    """
    sites = int(communicator.sum(key_of(scope, "personal-sites"), np.array(1)))
    pull = scheduled_pull(schedule, self_weight, sites, lr_ratio)
    mean = communicator.mean(key_of(scope, "personal"), to_arrays(_floating(own)), 1.0)
    softpull(own, mean, pull.rho)
    apart = deviation(communicator, key_of(scope, "personal-deviation"), own, mean)
    return Pulled(pull.rho, pull.self_weight, sites, apart)


def _floating(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


# ---------------------------------------------------------------------------------------------------------- super model


@dataclass(frozen=True)
class Route:
    """Which model predicts a case, and why."""

    choice: str
    """A site, or :data:`GLOBAL`."""
    reason: Reason
    unfamiliarity: float | None = None
    """See :meth:`nnunet_fed.methods.familiarity.Familiarity.unfamiliarity`; ``None``: not measured."""


def check_gamma(gamma: float) -> float:
    """The threshold; raises :class:`ConfigurationError` for one outside 0 and 1."""
    if not 0 <= gamma <= 1:
        raise ConfigurationError(f"gamma is {gamma:g}; it must lie between 0 (always a site's model) and 1 (never).")
    return gamma


def route(
    probabilities: Mapping[str, float],
    gamma: float,
    *,
    trusted: bool = True,
    unfamiliarity: float | None = None,
    global_instead: Collection[str] = (),
    available: Collection[str] | None = None,
) -> Route:
    """The super model's choice: the most probable site's model if its probability is above gamma, else the global one.

    Strictly above, as in the published code, and compared with probabilities: so gamma 1 always gives the global
    model, gamma 0 always a site's. All conditions but gamma are ours.

    Args:
        probabilities: of the sites, by name.
        gamma: within 0 and 1.
        trusted: whether the selector passed its gate; if not, every case goes to the global model.
        unfamiliarity: of the image; a case that is not at most 1 goes to the global model. ``None``: not measured.
        global_instead: sites whose cases the global model serves, see :func:`best_model_gate`.
        available: sites whose personalized model is at hand; ``None``: all.
    """
    likeliest = max(probabilities, key=lambda site: probabilities[site])
    choice, reason = GLOBAL, _reason_for_global(probabilities[likeliest] > check_gamma(gamma), trusted, unfamiliarity)
    if reason is None and likeliest in global_instead:
        reason = "best_model_gate"
    elif reason is None and available is not None and likeliest not in available:
        reason = "not_shared"
    elif reason is None:
        choice, reason = likeliest, "personal"
    return Route(choice, reason, unfamiliarity)


def _reason_for_global(is_sure: bool, trusted: bool, unfamiliarity: float | None) -> Reason | None:
    """Why no site's model may predict a case, whichever it is."""
    if not trusted:
        return "gate"
    if unfamiliarity is not None and not unfamiliarity <= 1:  # not a number is not familiar either
        return "unfamiliar"
    return None if is_sure else "below_gamma"


def best_model_gate(personal: Mapping[str, float], common: Mapping[str, float]) -> frozenset[str]:
    """Sites whose personalized model is not better than the global one on the site's own validation cases.

    Cases that the selector gives to such a site are served by the global model. Source: ours.

    Args:
        personal: mean validation Dice of each site's personalized model at that site.
        common: the same of the global model.

    Raises:
        DisagreementError: the two do not name the same sites.
    """
    if personal.keys() != common.keys():
        raise DisagreementError(
            "The validation Dice of the personalized and of the global model are not of the same sites: "
            f"{', '.join(sorted(personal))} and {', '.join(sorted(common))}."
        )
    return frozenset(site for site, dice in personal.items() if not dice > common[site])
