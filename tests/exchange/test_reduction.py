"""The coordinator's arithmetic: means and sums are exact where they can be, and the same in memory and from files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nnunet_fed.errors import RefusedError
from nnunet_fed.exchange import payload
from nnunet_fed.exchange.payload import BFLOAT16, Array, decode, encode, measure, open_payload
from nnunet_fed.exchange.reduction import exact_sum, mean_payload, weighted_mean

WHOLE_WEIGHTS = st.lists(st.integers(1, 2**29 - 1).map(float), min_size=1, max_size=7)
SPECIAL = [0.0, -0.0, np.inf, -np.inf]


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
    result = weighted_mean([array] * len(weights), weights)
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
    error = np.abs(weighted_mean(list(stacked), weights) - reference)
    assert (error <= half_a_unit + 1e-12 * largest.astype(np.float64)).all(), "rounded to float32 once, at the end"


def test_a_small_weight_is_not_lost() -> None:
    # in float32, 2**24 + 1 is 2**24
    arrays = [np.float32([2**24]), np.float32([1]), np.float32([1])]
    assert weighted_mean(arrays, [1, 1, 1]) == np.float32((2**24 + 2) / 3)


@pytest.mark.parametrize("size", [0, 1, 5, 64, 65, 1000])
def test_the_mean_does_not_depend_on_the_size_of_blocks(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    rng = np.random.default_rng(size)
    arrays, weights = [rng.normal(size=size).astype(np.float32) for _ in range(5)], list(rng.uniform(0.1, 9, 5))
    results = []
    for block in (1, 7, 64, 1 << 16):
        monkeypatch.setattr(payload, "BLOCK", block)
        results.append(weighted_mean(arrays, weights).tobytes())
    assert len(set(results)) == 1


def test_the_mean_streamed_to_a_file_is_the_one_in_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {"large": (20, payload.BLOCK), "scalar": (), "empty": (0, 4), "odd": (payload.BLOCK + 1,)}
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
    expected = {name: weighted_mean([tensors[name] for tensors in sites], weights) for name in shapes}
    found = decode(streamed)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, shapes[name])
        assert found[name].tobytes() == array.tobytes()
    with (tmp_path / "from memory").open("wb") as out:
        assert mean_payload(sites, weights, out) == (digest, size)
    assert (tmp_path / "from memory").read_bytes() == streamed


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
