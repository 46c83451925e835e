"""What a federated checkpoint holds besides nnU-Net's own, and how it comes safely to disk."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_fed.files import no_room, replacing

FEDERATION = "federation"
"""Key of a checkpoint under which our state stands; stock nnU-Net ignores it."""


def random_states() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's global random generators."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Set the generators to :func:`random_states`."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global random generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Let everything within draw from generators of its own: the global ones are as before afterwards."""
    before = random_states()
    seed_everything(seed)
    try:
        yield
    finally:
        restore_random_states(before)


@contextmanager
def needs_room(stock: Path) -> Iterator[None]:
    """Let nnU-Net write the checkpoint ``stock`` within; half of one is removed.

    Raises:
        BusyError: there is no room for it, which PyTorch does not say.
    """
    try:
        yield
    except BaseException as error:
        stock.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and "inline_container" in str(error):  # PyTorch's writer
            raise no_room(stock) from error
        raise


def amend(stock: Path, filename: Path, additions: Mapping[str, Any]) -> None:
    """Add entries to the checkpoint ``stock`` and move it to ``filename``, which never is half a file.

    The tensors are memory-mapped, not read: the cost is one more write of the file.
    """
    checkpoint = torch.load(stock, map_location="cpu", weights_only=False, mmap=True)
    try:
        with replacing(filename) as amended, amended.open("wb") as file:
            torch.save({**checkpoint, **additions}, file)
    finally:
        stock.unlink()


def network_weights(filename: Path) -> dict[str, torch.Tensor]:
    """The network's ``state_dict`` in a checkpoint that this site has written, memory-mapped."""
    checkpoint = torch.load(filename, map_location="cpu", weights_only=False, mmap=True)
    weights: dict[str, torch.Tensor] = checkpoint["network_weights"]
    return weights


def federation_state(filename: Path) -> dict[str, Any] | None:
    """Our state in a checkpoint; ``None`` in one that a federated trainer did not write."""
    checkpoint = torch.load(filename, map_location="cpu", weights_only=False, mmap=True)
    state: dict[str, Any] | None = checkpoint.get(FEDERATION)
    return state
