"""The precision in which the tensors of a mean travel (``wire_dtype`` of the study). Source: ours.

Sites round on the way out and widen on the way in; the coordinator reduces what it gets, in float64, and answers in
the dtype that came. Only float32 tensors are rounded, only in a ``mean``, and not where the method says ``exact``.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from nnunet_fed.errors import RefusedError
from nnunet_fed.exchange.payload import BFLOAT16, Array, Tensors

WireDtype = Literal["float32", "bfloat16", "float16"]

_DTYPES = {"bfloat16": BFLOAT16, "float16": np.dtype(np.float16)}


def narrow(tensors: Tensors, wire_dtype: WireDtype) -> dict[str, Array]:
    """Round float32 tensors to the dtype of the wire, to nearest; others, and all with ``float32``, stay as they are.

    Raises:
        RefusedError: a finite value is too large for the dtype.
    """
    if wire_dtype == "float32":
        return dict(tensors)
    return {
        name: _rounded(name, array, wire_dtype) if array.dtype == np.float32 else array
        for name, array in tensors.items()
    }


def _rounded(name: str, array: Array, wire_dtype: WireDtype) -> Array:
    with np.errstate(over="ignore"):
        rounded = array.astype(_DTYPES[wire_dtype])
    if np.count_nonzero(np.isinf(rounded)) > np.count_nonzero(np.isinf(array)):
        raise RefusedError(
            f"The tensor '{name}' holds values up to {np.nanmax(np.abs(array)):.3g}, which {wire_dtype} cannot hold. "
            'Let the study send float32 (wire_dtype = "float32"), which is a new study.'
        )
    return rounded


def widen(tensors: Tensors) -> dict[str, Array]:
    """Tensors of 16 bits as float32, which holds all their values; others stay as they are."""
    narrow_dtypes = set(_DTYPES.values())
    return {
        name: array.astype(np.float32) if array.dtype in narrow_dtypes else array for name, array in tensors.items()
    }
