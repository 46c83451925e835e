"""The coordinator's tensors: read and written as safetensors itself does, refused when damaged, averaged exactly."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nnunet_fed import payload
from nnunet_fed.errors import RefusedError
from nnunet_fed.payload import (
    BFLOAT16,
    CHUNK,
    DTYPES,
    Array,
    chunks,
    decode,
    encode,
    exact_sum,
    mean_payload,
    measure,
    open_payload,
    read_layout,
    weighted_mean,
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


# ------------------------------------------------------------------------------------------------------------ reduction

WHOLE_WEIGHTS = st.lists(st.integers(1, 2**29 - 1).map(float), min_size=1, max_size=7)
SPECIAL = [0.0, -0.0, np.inf, -np.inf]


def mean(arrays: Sequence[Array], weights: Sequence[float]) -> Array:
    blocks = list(weighted_mean(arrays, weights))
    return np.concatenate(blocks) if blocks else arrays[0].reshape(-1)


def floats(dtype: str) -> st.SearchStrategy[Array]:
    """All values of a dtype but NaN: denormal, largest, infinite and negative zero among them."""
    if dtype == "bfloat16":  # the upper half of a float32, which hypothesis can draw
        return floats("float32").map(lambda array: array.astype(BFLOAT16))
    limits = np.finfo(dtype)
    special = [*SPECIAL, limits.smallest_subnormal, -limits.smallest_subnormal, limits.max, limits.tiny]
    elements = hnp.from_dtype(np.dtype(dtype), allow_nan=False) | st.sampled_from(np.array(special, dtype).tolist())
    return hnp.arrays(dtype, st.integers(1, 30), elements=elements)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@given(data=st.data(), weights=WHOLE_WEIGHTS)
def test_the_mean_of_equal_tensors_is_that_tensor_bit_for_bit(
    dtype: str, data: st.DataObject, weights: list[float]
) -> None:
    array = data.draw(floats(dtype))
    result = mean([array] * len(weights), weights)
    assert result.dtype == array.dtype
    assert result.tobytes() == array.tobytes()


@given(
    st.integers(1, 6).flatmap(
        lambda sites: st.tuples(
            hnp.arrays("float32", (sites, 8), elements=st.floats(-1e6, 1e6, width=32)),
            st.lists(st.floats(1e-3, 1e6), min_size=sites, max_size=sites),
        )
    )
)
def test_the_mean_is_that_of_float64(drawn: tuple[npt.NDArray[np.float32], list[float]]) -> None:
    stacked, weights = drawn
    exact = [math.fsum(float(v) * w for v, w in zip(column, weights, strict=True)) for column in stacked.T]
    reference = np.array(exact) / math.fsum(weights)
    largest = np.abs(stacked).max(axis=0)
    half_a_unit = np.spacing(largest).astype(np.float64) / 2
    error = np.abs(mean(list(stacked), weights) - reference)
    assert (error <= half_a_unit + 1e-12 * largest.astype(np.float64)).all(), "rounded to float32 once, at the end"


def test_a_small_weight_is_not_lost() -> None:
    # in float32, 2**24 + 1 is 2**24
    arrays = [np.float32([2**24]), np.float32([1]), np.float32([1])]
    assert mean(arrays, [1, 1, 1]) == np.float32((2**24 + 2) / 3)


@pytest.mark.parametrize("size", [0, 1, 5, 64, 65, 1000])
def test_the_mean_does_not_depend_on_the_size_of_blocks(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    rng = np.random.default_rng(size)
    arrays, weights = [rng.normal(size=size).astype(np.float32) for _ in range(5)], list(rng.uniform(0.1, 9, 5))
    results = []
    for block in (1, 7, 64, 1 << 16):
        monkeypatch.setattr(payload, "BLOCK", block)
        results.append(mean(arrays, weights).tobytes())
    assert len(set(results)) == 1


def test_the_mean_streamed_to_a_file_is_the_one_in_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {"large": (3, payload.BLOCK), "scalar": (), "empty": (0, 4), "odd": (payload.BLOCK + 1,)}
    sites = [{name: np.asarray(rng.normal(size=shape), np.float32) for name, shape in shapes.items()} for _ in range(3)]
    sites.append({name: array.astype(np.float32).T.copy().T for name, array in sites[0].items()})
    weights = [3.0, 1.0, 2.5, 4.0]
    paths = [tmp_path / str(number) for number in range(4)]
    for path, tensors in zip(paths, sites, strict=True):
        path.write_bytes(b"".join(encode(tensors)))
    with (tmp_path / "mean").open("wb") as out:
        digest, size = mean_payload([open_payload(path) for path in paths], weights, out)
    streamed = (tmp_path / "mean").read_bytes()
    assert (digest, size) == measure([streamed])
    expected = {name: mean([tensors[name] for tensors in sites], weights).reshape(shapes[name]) for name in shapes}
    assert_same(read_by_the_real_library(streamed), expected)
    buffer = io.BytesIO()
    assert mean_payload(sites, weights, buffer) == (digest, size)
    assert buffer.getvalue() == streamed


@given(
    st.integers(1, 5).flatmap(
        lambda sites: hnp.arrays("int64", (sites, 3), elements=st.integers(-(2**63) // sites, (2**63 - 1) // sites))
    )
)
def test_whole_numbers_are_summed_exactly(stacked: npt.NDArray[np.int64]) -> None:
    result = exact_sum(list(stacked))
    assert result.dtype == np.int64
    assert result.tolist() == [sum(column) for column in stacked.T.tolist()]


@pytest.mark.parametrize("shape", [(), (1,), (2, 2)])
@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("int64", (2**63 - 1, 1)),
        ("int64", (-(2**63), -1)),
        ("int64", (2**63 - 1, 2**63 - 1, 2)),
        ("uint64", (2**63,)),
        ("uint64", (2**64 - 1, 2**64 - 1)),
    ],
)
def test_a_sum_that_does_not_fit_is_refused(shape: tuple[int, ...], dtype: str, values: tuple[int, ...]) -> None:
    with pytest.raises(RefusedError, match="does not fit into 64 bits"):
        exact_sum([np.full(shape, value, dtype) for value in values])


def test_small_integers_do_not_wrap_around() -> None:
    result = exact_sum([np.array([200, 127], np.uint8)] * 3)
    assert result.dtype == np.int64
    assert result.tolist() == [600, 381]


def test_floating_point_numbers_are_summed_in_float64() -> None:
    result = exact_sum([np.float32([2**24, 0.5]), np.float32([1, 0.25]), np.float32([1, 0.125])])
    assert result.dtype == np.float64
    assert result.tolist() == [2**24 + 2, 0.875]


def test_a_sum_of_other_shapes_is_refused_and_not_broadcast() -> None:
    for dtype in (np.int64, np.float64):
        with pytest.raises(RefusedError, match="shape"):
            exact_sum([np.ones(3, dtype), np.ones(1, dtype)])
