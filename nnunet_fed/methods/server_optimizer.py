"""Server optimizers without a server: every site does the same step on the same mean.

Sources: FedAvgM (Hsu, Qi, Brown 2019, arXiv 1909.06335) and FedAdam (Reddi et al., ICLR 2021, arXiv 2003.00295,
Algorithm 2). docs/methods.md says what of them was read. With x the global model, w_k the model that site k trained
from it, and d the weighted mean of w_k - x (the negative pseudo-gradient):

    FedAvgM   v <- momentum * v + d                              x <- x + server_lr * v
    FedAdam   m <- beta_1 * m + (1 - beta_1) * d
              v <- beta_2 * v + (1 - beta_2) * d^2               x <- x + server_lr * m / (sqrt(v) + tau)

Ours: NumPy does one correctly rounded operation at a time, so that the same numbers come out at every site.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from nnunet_fed.exchange.payload import Array, Tensors

FIRST, SECOND = "first.", "second."
"""Prefixes of the moments' names in a state."""


def difference(one: Tensors, other: Tensors) -> dict[str, Array]:
    """``one - other``, for the tensors that both have."""
    return {name: array - other[name] for name, array in one.items() if name in other}


def with_momentum(
    start: Tensors, trained: Tensors, last_step: Tensors, server_lr: float, momentum: float
) -> dict[str, Array]:
    """What a site uploads so that the plain weighted mean of the uploads is FedAvgM's next model.

    FedAvgM is linear in w_k, and server_lr * momentum * v is momentum times the last step x_t - x_{t-1}. Hence the step
    can be done before the mean instead of after it (ours), on

        w_k + (server_lr - 1) (w_k - x_t) + momentum (x_t - x_{t-1}).

    Args:
        start: x_t; tensors that it lacks, such as buffers, are uploaded as they are.
        trained: w_k.
        last_step: x_t - x_{t-1}; empty in the first round.
        server_lr: above 0.
        momentum: the source's beta.

    Returns:
        With ``server_lr`` 1 and ``momentum`` 0 the trained tensors themselves.
    """
    uploaded = dict(trained)
    for name, origin in start.items():
        if server_lr != 1:
            uploaded[name] = uploaded[name] + origin.dtype.type(server_lr - 1) * (trained[name] - origin)
        if momentum and last_step:
            uploaded[name] = uploaded[name] + origin.dtype.type(momentum) * last_step[name]
    return uploaded


@dataclass
class AdamMoments:
    """FedAdam's m and v, the same at every site. Without the bias correction of Adam, as in the source.

    ``number`` is the round after which they are so; -1 before the first.
    """

    beta_1: float
    beta_2: float
    tau: float
    """From v = tau^2 the source starts, and its square root's floor."""
    number: int = -1
    first: dict[str, Array] = field(default_factory=dict)
    second: dict[str, Array] = field(default_factory=dict)

    def begin(self, tensors: Tensors, names: Iterable[str]) -> None:
        """Before the first round: m = 0 and v = tau^2, for some of the tensors."""
        self.number = -1
        self.first = {name: np.zeros_like(tensors[name]) for name in names}
        self.second = {name: np.full_like(tensors[name], self.tau**2) for name in names}

    def step(self, start: Tensors, update: Tensors, server_lr: float, number: int) -> dict[str, Array]:
        """Take a round's d, and return the next model.

        Args:
            start: x, by name.
            update: d; tensors without moments, such as buffers, move by it and nothing else.
            server_lr: the source's eta.
            number: of the round.
        """
        self.number = number
        model = {}
        for name, origin in start.items():
            d = update[name]
            if name not in self.first:
                model[name] = origin + d
                continue
            number_of = origin.dtype.type
            m = number_of(self.beta_1) * self.first[name] + number_of(1 - self.beta_1) * d
            v = number_of(self.beta_2) * self.second[name] + number_of(1 - self.beta_2) * (d * d)
            model[name] = origin + number_of(server_lr) * (m / (np.sqrt(v) + number_of(self.tau)))
            self.first[name], self.second[name] = m, v
        return model

    def tensors(self) -> dict[str, Array]:
        """Both moments, for a payload."""
        first = {FIRST + name: array for name, array in self.first.items()}
        return {**first, **{SECOND + name: array for name, array in self.second.items()}}

    def take(self, tensors: Tensors, number: int) -> None:
        """Go on from :meth:`tensors`, as they are after a round."""
        self.number = number
        for prefix, moments in ((FIRST, self.first), (SECOND, self.second)):
            for name in moments:
                moments[name] = tensors[prefix + name]
