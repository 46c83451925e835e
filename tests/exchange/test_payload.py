"""The coordinator's tensors: read and written as safetensors itself does, refused when damaged, averaged exactly."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nnunet_fed.errors import RefusedError
from nnunet_fed.exchange import payload
from nnunet_fed.exchange.payload import (
    BFLOAT16,
    CHUNK,
    DTYPES,
    Array,
    chunks,
    decode,
    encode,
    measure,
    open_payload,
    read_layout,
)

SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
NAMES = st.text(st.characters(exclude_categories=("Cs",)), max_size=12).filter(lambda name: name != "__metadata__")


@st.composite
def arrays_of_any_layout(draw: st.DrawFn) -> Array:
    """Any dtype, shape, byte order and memory layout; all bits are drawn, NaN included."""
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = draw(SHAPES)
    if dtype == np.bool_:
        array: Array = draw(hnp.arrays(dtype, shape))
    else:
        size = math.prod(shape) * dtype.itemsize
        array = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype).reshape(shape)
    match draw(st.sampled_from(["contiguous", "transposed", "strided", "reversed", "big-endian"])):
        case "transposed":
            return array.T
        case "strided":
            return np.repeat(array, 2, axis=-1)[..., ::2] if array.ndim else array
        case "reversed":
            return array[::-1] if array.ndim else array
        case "big-endian":
            return array.astype(dtype.newbyteorder(">"))
    return array


def read_by_the_real_library(written: bytes) -> dict[str, Array]:
    """By its own parser; its numpy side has no bfloat16."""
    return {
        name: np.frombuffer(found["data"], DTYPES[found["dtype"]]).reshape(found["shape"])
        for name, found in safetensors.deserialize(written)
    }


def same(one: Array, other: Array) -> bool:
    """Equal dtype, shape and bits."""
    little = [array.astype(array.dtype.newbyteorder("<")) for array in (one, other)]
    return (
        little[0].dtype == little[1].dtype and one.shape == other.shape and little[0].tobytes() == little[1].tobytes()
    )


def assert_same(one: dict[str, Array], other: dict[str, Array]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert same(one[name], other[name]), name


@given(st.dictionaries(NAMES, arrays_of_any_layout(), max_size=5))
def test_the_real_library_reads_what_we_write(tensors: dict[str, Array]) -> None:
    written = b"".join(encode(tensors))
    assert_same(read_by_the_real_library(written), tensors)
    assert_same(decode(written), tensors)


@given(st.dictionaries(NAMES, arrays_of_any_layout(), max_size=5), st.none() | st.just({"format": "np"}))
def test_we_read_what_the_real_library_writes(tensors: dict[str, Array], metadata: dict[str, str] | None) -> None:
    # its numpy side ignores strides and byte order, and has no bfloat16
    tensors = {name: array for name, array in tensors.items() if array.dtype.newbyteorder("=") != BFLOAT16}
    plain = {name: array.astype(array.dtype.newbyteorder("<"), order="C") for name, array in tensors.items()}
    assert_same(decode(safetensors.numpy.save(plain, metadata)), tensors)


@given(st.dictionaries(NAMES, arrays_of_any_layout(), max_size=5), st.randoms())
def test_equal_tensors_give_equal_bytes_in_whatever_order(tensors: dict[str, Array], shuffle: Any) -> None:
    items = list(tensors.items())
    shuffle.shuffle(items)
    assert b"".join(encode(dict(items))) == b"".join(encode(tensors))


def test_every_tensor_is_aligned() -> None:
    tensors = {name: np.zeros(3, dtype) for name, dtype in DTYPES.items()}
    written = b"".join(encode(tensors))
    layout, begin = read_layout(written)
    assert all((begin + entry.start) % entry.dtype.itemsize == 0 for entry in layout.values())


def test_a_contiguous_tensor_is_not_copied() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    _, data = encode({"w": array})
    assert np.shares_memory(np.frombuffer(data, np.uint8), array)


@pytest.mark.parametrize("dtype", ["complex64", "U3", "O", "M8[s]", "S2"])
def test_dtypes_without_a_name_are_no_payload(dtype: str) -> None:
    with pytest.raises(TypeError, match="tensor 'w' has the dtype"):
        list(encode({"w": np.zeros(2, dtype)}))


def test_messages_are_short_and_complete() -> None:
    tensors = {"large": np.arange(CHUNK // 4 + 1, dtype=np.int32), "small": np.zeros((), np.uint8)}
    messages = [bytes(message) for message in chunks(encode(tensors))]
    assert max(map(len, messages)) == CHUNK
    assert b"".join(messages) == b"".join(encode(tensors))
    assert measure(encode(tensors)) == measure(messages)


# ---------------------------------------------------------------------------------------------------- damaged payloads


def with_header(table: Any, data: bytes = b"") -> bytes:
    header = table if isinstance(table, bytes) else json.dumps(table).encode()
    return len(header).to_bytes(8, "little") + header + data


def entry(start: Any = 0, stop: Any = 4, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [start, stop]}


def refused(damaged: bytes) -> None:
    with pytest.raises(RefusedError, match="no valid safetensors file"):
        decode(damaged)


def test_every_truncation_is_refused() -> None:
    whole = b"".join(encode({"w": np.arange(5, dtype=np.float32), "n": np.int64(3) * np.ones((), np.int64)}))
    for length in range(len(whole)):
        refused(whole[:length])
    refused(whole + b"\0")
    decode(whole)


@pytest.mark.parametrize(
    "table",
    [
        {"w": entry(4, 8)},
        {"v": entry(0, 4), "w": entry(2, 6)},
        {"v": entry(0, 4), "w": entry(0, 4)},
        {"v": entry(0, 4), "w": entry(8, 12)},
        {"w": entry(0, 4, (2,))},
        {"w": entry(0, 4, (1,), "F64")},
        {"w": entry(4, 0)},
        {"w": entry(0, 4, (-1, -1))},
        {"w": entry(-4, 0)},
        {"w": entry(0, 4.0)},
        {"w": entry(False, 4)},
        {"w": entry(0, 4, (True,))},
        {"w": entry(0, 4, ("1",))},
        {"w": entry(0, 4, 1)},
        {"w": entry(0, 4, None)},
        {"w": entry(0, 4, (1,), "F31")},
        {"w": entry(0, 4, (1,), ["F32"])},
        {"w": entry(0, 0, (0, 10**30))},
        {"w": entry(0, 0, (0, 2**63 - 1, 8))},
        {"w": entry(0, 4, (1,) * 100)},
        {"w": {"dtype": "F32", "shape": [1]}},
        {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2, 4]}},
        {"w": {"dtype": "F32", "shape": [1], "data_offsets": 4}},
        {"w": None},
        {"w": "F32"},
        {"\ud800": entry()},
        [],
        "w",
        3,
        None,
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"w": ' + b"9" * 10_000 + b"}",
    ],
    ids=lambda table: str(table)[:50],
)
def test_headers_that_lie_are_refused(table: Any) -> None:
    for data in (b"", bytes(4), bytes(8), bytes(12)):
        refused(with_header(table, data))


@pytest.mark.parametrize("length", [1, 9, payload.LONGEST_HEADER + 1, 2**62, 2**64 - 1])
def test_a_header_longer_than_the_payload_or_the_limit_is_refused(length: int) -> None:
    refused(length.to_bytes(8, "little") + b"{}")
    assert decode(with_header(b"{}")) == {}


def test_a_header_above_the_limit_is_refused_though_it_is_there() -> None:
    refused(with_header(b"{}" + b" " * payload.LONGEST_HEADER))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(RefusedError, match="empty"):
        open_payload(tmp_path / "empty")


def never_another_error(data: bytes) -> None:
    try:
        tensors = decode(data)
        b"".join(encode(tensors))
    except RefusedError:
        pass


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_and_nothing_worse(data: bytes) -> None:
    never_another_error(data)
    never_another_error(with_header(data))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 20) | st.floats() | st.sampled_from([*DTYPES, "w", "\udc80"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["v", "w", "\udc80"]), inner),
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES]) | JSON,
        "shape": st.lists(st.integers(-1, 3) | st.integers(), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 9), min_size=2, max_size=2) | JSON,
    }
)


@given(JSON | st.dictionaries(st.text(max_size=3), ENTRIES, max_size=3), st.integers(0, 12))
@settings(max_examples=500)
def test_random_headers_are_refused_and_nothing_worse(table: Any, size: int) -> None:
    never_another_error(with_header(table, bytes(size)))


@given(st.data())
def test_a_flipped_byte_of_the_header_is_refused_and_nothing_worse(data: st.DataObject) -> None:
    whole = bytearray(b"".join(encode({"w": np.arange(3, dtype=np.float32), "b": np.zeros((2, 2), np.float16)})))
    position = data.draw(st.integers(0, len(whole) - 21))
    whole[position] = data.draw(st.integers(0, 255))
    never_another_error(bytes(whole))
