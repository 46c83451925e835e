"""Read what a checkpoint holds without running anything that stands in it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch


def read_checkpoint(path: Path) -> Any:
    """What ``torch.save`` wrote of tensors, plain values and NumPy's numbers and arrays, memory-mapped, on the CPU.

    These are all that nnU-Net's checkpoints hold, and ours. nnU-Net itself runs whatever else a file asks for.

    Raises:
        OSError, RuntimeError: the file cannot be read, or is damaged; torch tells of that by further kinds of errors.
        pickle.UnpicklingError: it holds something else.
    """
    with torch.serialization.safe_globals(_numpy()):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _numpy() -> list[Any]:
    """What NumPy's numbers and arrays in nnU-Net's log are made of, by the names of NumPy 1 and 2."""
    makers = [np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]]
    named = [
        (maker, f"numpy.{core}.multiarray.{maker.__name__}")
        for maker, core in itertools.product(makers, ("core", "_core"))
    ]
    dtypes = {type(np.dtype(code)) for code in np.typecodes["All"]}
    return [*named, np.ndarray, np.dtype, *dtypes]
