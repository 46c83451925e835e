"""The proximal term of FedProx and of Ditto: strength / 2 * ||w - w_t||^2, which holds a model near another one.

Sources: FedProx (Li et al., MLSys 2020, arXiv 1812.06127), the source's mu; Ditto (Li et al., ICML 2021, arXiv
2012.04221), the source's lambda. docs/methods.md says what of them was read. As in FedProx's official code, the term
is a part of the optimizer's step: strength * (w - w_t) is added to the gradient, as weight decay is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


class Proximal:
    """Adds the gradient of the proximal term before each step of an optimizer.

    The hook runs within the real step: after unscaling and clipping, which see the gradient of the loss only, and not
    at all when ``GradScaler`` skips the step. So the pull, like torch's own weight decay, is never clipped, and it
    enters the optimizer's momentum. Parameters without a gradient, which the optimizer leaves alone, are left alone.

    Args:
        optimizer: whose steps are held.
        parameters: of the optimizer, by name, each once.
        strength: the sources' mu or lambda; at 0 nothing is kept and no bit differs.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor], strength: float):
        self.strength = strength
        self._parameters = dict(parameters)
        self._anchor: dict[str, torch.Tensor] = {}
        self._stepped = False
        optimizer.register_step_pre_hook(lambda *_: self._before_step())

    @torch.no_grad()
    def hold_to(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy w_t, by the names of the parameters; further tensors are ignored."""
        self._stepped = False
        if self.strength == 0:
            return
        for name, parameter in self._parameters.items():
            if name not in self._anchor:
                self._anchor[name] = torch.empty_like(parameter)
            self._anchor[name].copy_(tensors[name])

    def release(self) -> None:
        """From here on nothing is held."""
        self.strength = 0.0
        self._anchor.clear()

    @torch.no_grad()
    def _before_step(self) -> None:
        if self.strength == 0:
            return
        self._stepped = True
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                parameter.grad.add_(parameter - self._anchor[name], alpha=self.strength)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """w_t, if a step was made since; without one the caller still has it."""
        return dict(self._anchor) if self._stepped else {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from a :meth:`state_dict` that is not empty."""
        self.hold_to(state)
        self._stepped = True
