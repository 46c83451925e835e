"""Payloads: tensors as safetensors bytes on numpy.

The format is safetensors' own (https://github.com/huggingface/safetensors#format), written here because its library
cannot stream: a payload goes from memory to the socket and from the socket to a file without a copy of the whole.
Tensors stand in order of falling item size, then of name, so that equal tensors give equal bytes and each is aligned.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import xxhash

from nnunet_fed.errors import NotFiniteError, RefusedError

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": BFLOAT16,
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}

CHUNK = 1 << 20
"""Largest message on the wire, in bytes."""
LONGEST_HEADER = 1 << 20
"""Bytes, which may take fifty times as many once they are decoded; a stock network's header has 10 kB."""
BLOCK = 1 << 17
"""Elements worked on at a time: few enough that they stay in the processor's cache, and so many that threads do not
wait for each other."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor stands in the data part of a payload."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int


Layout = dict[str, Entry]
Schema = dict[str, tuple[str, tuple[int, ...]]]
"""Names, dtypes and shapes: what must be equal at all sites."""


def layout_of(tensors: Tensors) -> Layout:
    """Plan the payload of these tensors; raises :class:`TypeError` for a dtype that safetensors does not have."""
    layout: Layout = {}
    position = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
        array = tensors[name]
        dtype = array.dtype.newbyteorder("<")
        if dtype not in NAMES:
            raise TypeError(f"tensor {name!r} has the dtype {array.dtype}, which a payload cannot hold")
        layout[name] = Entry(dtype, array.shape, position, position + array.nbytes)
        position += array.nbytes
    return layout


def schema_of(layout: Layout) -> Schema:
    """The layout without positions."""
    return {name: (NAMES[entry.dtype], entry.shape) for name, entry in layout.items()}


def header_of(layout: Layout) -> bytes:
    """The safetensors header: its length as 8 little-endian bytes, then JSON padded to a multiple of 8."""
    table = {
        name: {"dtype": NAMES[e.dtype], "shape": list(e.shape), "data_offsets": [e.start, e.stop]}
        for name, e in layout.items()
    }
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def encode(tensors: Tensors) -> Iterator[bytes | memoryview]:
    """The payload of these tensors, piece by piece; the tensors' own memory is passed on where it is contiguous."""
    layout = layout_of(tensors)
    yield header_of(layout)
    for name, entry in layout.items():
        contiguous = np.ascontiguousarray(tensors[name], dtype=entry.dtype)
        if contiguous.nbytes:
            yield bytes_of(contiguous)


def bytes_of(contiguous: Array) -> memoryview:
    """A contiguous array's own memory. NumPy exports no buffer of a bfloat16 array as such."""
    return contiguous.reshape(-1).view(np.uint8).data


def chunks(pieces: Iterable[bytes | memoryview], size: int = CHUNK) -> Iterator[bytes | memoryview]:
    """Cut pieces into messages of at most ``size`` bytes."""
    for piece in pieces:
        view = memoryview(piece)
        for start in range(0, len(view), size):
            yield view[start : start + size]


def measure(pieces: Iterable[bytes | memoryview]) -> tuple[str, int]:
    """XXH3-128 (hexadecimal) and length in bytes.

    The digest tells damage and equality; against forgery there is TLS. It takes a tenth of SHA-256's time, or less.
    """
    digest, size = xxhash.xxh3_128(), 0
    for piece in pieces:
        digest.update(piece)
        size += len(piece)
    return digest.hexdigest(), size


def digest_of_file(path: Path) -> str | None:
    """The digest of a file's content, ``None`` if there is no such file."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        return measure(iter(lambda: file.read(1 << 24), b""))[0]


def read_layout(payload: memoryview | mmap.mmap | bytes) -> tuple[Layout, int]:
    """Check a payload's header; returns its layout and where the data part begins.

    Raises:
        RefusedError: the bytes are no safetensors payload, or not a gapless one.
    """
    try:
        length = int.from_bytes(payload[:8], "little")
        if len(payload) < 8 or length > min(LONGEST_HEADER, len(payload) - 8):
            raise ValueError(f"its header claims {length} bytes")
        table = json.loads(bytes(payload[8 : 8 + length]))
        table.pop("__metadata__", None)
        layout = {name: _entry(described) for name, described in table.items()}
        "".join(layout).encode()  # JSON may hold half a pair of surrogates, which the mean's header could not
        position = 0
        for name, entry in sorted(layout.items(), key=lambda item: (item[1].start, item[1].stop)):
            if entry.start != position or entry.stop - entry.start != math.prod(entry.shape) * entry.dtype.itemsize:
                raise ValueError(f"the tensor {name!r} does not stand where it must")
            position = entry.stop
        if 8 + length + position != len(payload):
            raise ValueError(f"it has {len(payload)} bytes instead of {8 + length + position}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RefusedError(f"A payload is no valid safetensors file: {error}.") from None
    return layout, 8 + length


def _entry(described: dict[str, Any]) -> Entry:
    shape = tuple(described["shape"])
    start, stop = described["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError("shapes and offsets must be whole numbers")
    return Entry(DTYPES[described["dtype"]], shape, start, stop)


def decode(payload: memoryview | mmap.mmap | bytes) -> dict[str, Array]:
    """Views of a payload's tensors, by name; they keep the payload's memory alive. Raises :class:`RefusedError`."""
    layout, begin = read_layout(payload)
    try:
        return {
            name: np.frombuffer(payload, entry.dtype, math.prod(entry.shape), begin + entry.start).reshape(entry.shape)
            for name, entry in layout.items()
        }
    except (ValueError, OverflowError) as error:  # too many dimensions, or too long ones in an empty tensor
        raise RefusedError(f"A payload is no valid safetensors file: {error}.") from None


def open_payload(path: Path) -> dict[str, Array]:
    """The tensors of a payload file as memory-mapped views. Raises :class:`RefusedError`."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            raise RefusedError("A payload is no valid safetensors file: it is empty.")
        return decode(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def is_floating(array: Array) -> bool:
    """Whether it holds floating-point numbers; NumPy does not count bfloat16 among them."""
    return bool(np.issubdtype(array.dtype, np.floating)) or array.dtype == BFLOAT16


def blocks(array: Array) -> Iterator[Array]:
    """Its elements in turn, :data:`BLOCK` at a time."""
    flat = array.reshape(-1)
    return (flat[start : start + BLOCK] for start in range(0, flat.size, BLOCK))


def check_finite(tensors: Tensors) -> None:
    """Raise :class:`NotFiniteError` with the name of a tensor that holds an infinity or what is no number."""
    for name, array in tensors.items():
        if is_floating(array) and not all(np.isfinite(block).all() for block in blocks(array)):
            raise NotFiniteError(f"The tensor '{name}' holds a number that is not finite: a diverged training?")
