"""A peer's model while it trains beside the site's own, and how nnU-Net's step runs on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from nnunet_fed.exchange.payload import Array
from nnunet_fed.gossip.schedule import Version
from nnunet_fed.methods.gcml import Outputs, Plan
from nnunet_fed.trainers.parts.branch import Branch


@dataclass(eq=False, repr=False)
class PeerModel(Branch):
    """A model that has arrived; nothing of it outlives its mutual phase."""

    version: Version
    initial: str
    """Digest of the weights that its site started from."""
    size: int
    """Bytes that came."""
    plan: Plan
    began: int
    """Epoch in which the phase began."""
    epochs_left: int
    before: dict[str, Array] | None
    """The site's own tensors when the phase began, if the method may go back to them."""
    steps: int = 0

    def state(self) -> dict[str, Any]:
        """For a checkpoint: plain values and tensors."""
        facts = {name: getattr(self, name) for name in _PLAIN}
        return {"version": asdict(self.version), **facts, **super().state()}


_PLAIN = ("initial", "size", "plan", "began", "epochs_left", "before", "steps")


def plain_values(state: dict[str, Any]) -> dict[str, Any]:
    """What of :meth:`PeerModel.state` the construction takes."""
    return {"version": Version(**state["version"]), **{name: state[name] for name in _PLAIN}}


class Computed:
    """A network whose outputs for a batch are there already, for nnU-Net's step."""

    def __init__(self, network: Any, outputs: Outputs):
        self._network = network
        self._outputs = outputs

    def __call__(self, data: torch.Tensor) -> Outputs:
        """The outputs, with the graph that made them."""
        return self._outputs

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Of the network."""
        return iter(self._network.parameters())


def with_non_finite_replaced(teacher: Outputs, student: Outputs) -> Outputs:
    """What a teacher says, and where that is not finite what the student says itself, from which it learns nothing.

    So an incoming model that diverges does not take the site's own with it. Nothing here waits for the device.
    """
    if isinstance(teacher, torch.Tensor):
        assert isinstance(student, torch.Tensor)
        return torch.where(teacher.isfinite(), teacher, student.detach())
    return [torch.where(t.isfinite(), t, s.detach()) for t, s in zip(teacher, student, strict=False)]
