"""What a federated checkpoint holds besides nnU-Net's own, and how it comes safely to disk."""

from __future__ import annotations

import os
import random
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_fed.files import no_room, replacing

FEDERATION = "federation"
"""Key of a checkpoint under which our state stands; stock nnU-Net ignores it."""
_READ_WHOLE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
"""PyTorch's own variable for who does not say what to read."""


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
def written_with(additions: Mapping[str, Any], filename: Path) -> Iterator[Path]:
    """Let the checkpoint that nnU-Net writes within have further entries, and replace ``filename`` once it is whole.

    nnU-Net hands its dictionary to ``torch.save`` at once, so the entries join it there: a second write of the file,
    with everything in it, would cost as much as the first.

    Args:
        additions: entries of the checkpoint, which take the place of nnU-Net's own of the same name.
        filename: the checkpoint; there may be none yet.

    Yields:
        The file to hand to nnU-Net.
    """
    save, thread = torch.save, threading.get_ident()

    def save_with_additions(content: Any, *arguments: Any, **options: Any) -> None:
        if threading.get_ident() == thread:
            content = {**content, **additions}
        save(content, *arguments, **options)

    with replacing(filename) as part:
        torch.save = save_with_additions  # type: ignore[assignment]
        try:
            yield part
        except RuntimeError as error:
            if "inline_container" in str(error):  # PyTorch's writer does not say why it could not write
                raise no_room(filename) from error
            raise
        finally:
            torch.save = save


@contextmanager
def read_whole() -> Iterator[None]:
    """Let ``torch.load`` read a checkpoint that this site has written: nnU-Net's warm-up trainers, Primus among them,
    ask for weights only, and in nnU-Net's own checkpoints, too, is more."""
    given = os.environ.get(_READ_WHOLE)
    os.environ[_READ_WHOLE] = "1"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=f".*{_READ_WHOLE}")  # PyTorch warns of it
            yield
    finally:
        if given is None:
            del os.environ[_READ_WHOLE]
        else:
            os.environ[_READ_WHOLE] = given


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
