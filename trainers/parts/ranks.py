"""One communicator for all ranks of a distributed training: rank 0 talks to the others, all ranks hear the answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import distributed as dist

from nnunet_fed.errors import FederationError
from nnunet_fed.exchange.communicator import Collectives
from nnunet_fed.exchange.payload import Array, Tensors

T = TypeVar("T")

PATIENCE_MINUTES = 60.0
"""For which one rank may be behind another, or rank 0 be silent."""
BEAT_SECONDS = 60.0
"""After which rank 0 tells those who wait that it is still busy."""


class TrainingCommunicator(Collectives, Protocol):
    """The collectives, and what a trainer needs besides to find its way back after an absence."""

    def newest(self, name: str) -> str | None:
        """Key of the newest closed mean called ``SCOPE/name``; ``None``: there is none."""
        ...

    def fetch(self, key: str) -> dict[str, Array]:
        """The stored result of a closed mean."""
        ...


def is_distributed() -> bool:
    """Whether this process is one rank of several."""
    return dist.is_available() and dist.is_initialized()


def from_rank_zero(function: Callable[[], T], group: Any = None) -> T:
    """Call ``function`` on rank 0; every rank returns its value or raises its error.

    Without ``torch.distributed`` it is just called. Values travel by pickle between the processes of one training: for
    tensors there is :func:`tensors_from_rank_zero`.

    Args:
        function: called on rank 0.
        group: a :func:`patient_group`, on which it may take as long as it likes; ``None``: the default group, whose
            timeout counts.
    """
    if not is_distributed():
        return function()
    outcome: list[Any] = [None, None, False]
    if dist.get_rank() == 0:
        with _busy(group):
            try:
                outcome[0] = function()
            except FederationError as error:
                outcome[1] = error
            except Exception as error:  # the others must not wait for an answer that will not come
                outcome[1] = RuntimeError(f"rank 0: {type(error).__name__}: {error}")
        outcome[2] = True
        dist.broadcast_object_list(outcome, src=0, group=group)
    while not outcome[2]:
        dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    value: T = outcome[0]
    return value


def of_all_ranks(value: T) -> list[T]:
    """What each rank gives, in their order; every rank calls this, with a value that travels by pickle."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def _busy(group: Any) -> Iterator[None]:
    """Meanwhile tell the other ranks, which wait on a patient group, that there is no answer yet."""
    over = threading.Event()

    def beat() -> None:
        while group is not None and not over.wait(BEAT_SECONDS):
            try:
                dist.broadcast_object_list([None, None, False], src=0, group=group)
            except RuntimeError:  # a rank has gone: the answer will meet the same error
                return

    thread = threading.Thread(target=beat, name="ranks", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def tensors_from_rank_zero(function: Callable[[], dict[str, Array]], group: Any = None) -> dict[str, Array]:
    """As :func:`from_rank_zero`, for arrays by name: they travel as they are, one by one, and no model is pickled."""
    if not is_distributed():
        return function()
    arrays: dict[str, Array] = {}

    def described() -> list[tuple[str, Any, tuple[int, ...]]]:
        arrays.update(function())
        return [(name, array.dtype, array.shape) for name, array in arrays.items()]

    for name, dtype, shape in from_rank_zero(described, group):
        if name not in arrays:
            arrays[name] = np.empty(shape, dtype)
        if arrays[name].nbytes:
            # rank 0's may be a view of a file, or of something else that torch must not write to
            sent = np.require(arrays[name], requirements=["C", "W"])
            dist.broadcast(torch.from_numpy(sent.reshape(-1).view(np.uint8)), src=0, group=group)
    return arrays


def wait_for_all() -> None:
    """Return once every rank has come here, for example to read what rank 0 wrote before."""
    if is_distributed():
        dist.barrier()


def patient_group(minutes: float = PATIENCE_MINUTES) -> Any:
    """A gloo group on which ranks wait for rank 0 as long as it lives; ``None`` without ``torch.distributed``.

    NCCL's own timeout is shorter than a round may take, and its kernels would spin on the GPU meanwhile. No timeout
    follows a deadline that is changed while a round waits: rank 0 tells every :data:`BEAT_SECONDS` that it is busy.

    Args:
        minutes: for which a rank may be silent.
    """
    if not is_distributed():
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(minutes=minutes))


class RankZeroCommunicator:
    """A :class:`TrainingCommunicator` that every rank calls alike; only rank 0 has the real one."""

    def __init__(self, communicator: TrainingCommunicator | None, site: str, sites: tuple[str, ...], group: Any = None):
        self._communicator = communicator
        self._group = group
        self.site = site
        self.sites = sites

    def _ask(self, question: Callable[[TrainingCommunicator], T]) -> T:
        return from_rank_zero(lambda: question(self._at_rank_zero()), self._group)

    def _ask_for_tensors(self, question: Callable[[TrainingCommunicator], dict[str, Array]]) -> dict[str, Array]:
        return tensors_from_rank_zero(lambda: question(self._at_rank_zero()), self._group)

    def _at_rank_zero(self) -> TrainingCommunicator:
        if self._communicator is None:
            raise RuntimeError("rank 0 has no communicator")
        return self._communicator

    def mean(self, key: str, tensors: Tensors, weight: float, exact: bool = False) -> dict[str, Array]:
        """See :meth:`nnunet_fed.exchange.communicator.Collectives.mean`."""
        return self._ask_for_tensors(lambda communicator: communicator.mean(key, tensors, weight, exact))

    def sum(self, key: str, array: Array) -> Array:
        """See :meth:`nnunet_fed.exchange.communicator.Collectives.sum`."""
        return self._ask(lambda communicator: communicator.sum(key, array))

    def gather(self, key: str, value: Any) -> dict[str, Any]:
        """See :meth:`nnunet_fed.exchange.communicator.Collectives.gather`."""
        return self._ask(lambda communicator: communicator.gather(key, value))

    def newest(self, name: str) -> str | None:
        """See :meth:`TrainingCommunicator.newest`."""
        return self._ask(lambda communicator: communicator.newest(name))

    def fetch(self, key: str) -> dict[str, Array]:
        """See :meth:`TrainingCommunicator.fetch`."""
        return self._ask_for_tensors(lambda communicator: communicator.fetch(key))
