"""The precision in which models travel."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from serving import Served, make_study, together

from nnunet_fed.errors import RefusedError
from nnunet_fed.exchange.payload import BFLOAT16
from nnunet_fed.exchange.precision import WireDtype, narrow, widen
from nnunet_fed.transport.site.client import GrpcCommunicator

NARROW: list[WireDtype] = ["bfloat16", "float16"]
FLOATS = hnp.arrays("float32", st.integers(0, 20), elements=st.floats(width=32, allow_nan=False))


@given(FLOATS)
def test_bfloat16_is_rounded_as_torch_does(array: np.ndarray) -> None:  # type: ignore[type-arg]
    rounded = torch.from_numpy(array).bfloat16()
    try:
        ours = narrow({"w": array}, "bfloat16")["w"]
    except RefusedError:
        assert torch.isinf(rounded).sum() > np.isinf(array).sum()
        return
    assert ours.dtype == BFLOAT16
    assert ours.view(np.int16).tolist() == rounded.view(torch.int16).tolist()
    np.testing.assert_array_equal(widen({"w": ours})["w"], rounded.float().numpy())


@pytest.mark.parametrize("wire_dtype", NARROW)
def test_what_is_wide_comes_back_and_rounding_twice_changes_nothing(wire_dtype: WireDtype) -> None:
    rng = np.random.default_rng(0)
    once = widen(narrow({"w": rng.normal(size=1000).astype(np.float32)}, wire_dtype))["w"]
    assert once.dtype == np.float32
    assert widen(narrow({"w": once}, wire_dtype))["w"].tobytes() == once.tobytes()


@pytest.mark.parametrize("wire_dtype", [*NARROW, "float32"])
def test_only_float32_is_rounded(wire_dtype: WireDtype) -> None:
    tensors = {"d": np.array([1 / 3]), "n": np.array([1])}
    assert all(sent is tensors[name] for name, sent in narrow(tensors, wire_dtype).items())


def test_float32_is_not_touched() -> None:
    tensors = {"w": np.float32([1 / 3])}
    assert narrow(tensors, "float32")["w"] is tensors["w"]


def test_a_value_that_overflows_is_refused_with_its_tensor() -> None:
    with pytest.raises(RefusedError, match=r"tensor 'large' holds values up to 7e\+04, which float16 cannot hold"):
        narrow({"small": np.float32([1]), "large": np.float32([-7e4, 1])}, "float16")
    narrow({"large": np.float32([6e4])}, "float16")


@pytest.mark.parametrize("wire_dtype", NARROW)
def test_a_study_rounds_models_and_nothing_else(serve: Callable[..., Served], wire_dtype: WireDtype) -> None:
    values = {site: np.random.default_rng(ord(site)).normal(size=50_000).astype(np.float32) for site in "ab"}

    def talk(seat: GrpcCommunicator) -> tuple[bytes, ...]:
        mine = values[seat.site]
        alone = float(seat.site == "a")
        seat.mean("round-0000/model", {"w": mine}, 3.0 if alone else 1.0)
        sent = seat.bytes_sent
        results = (
            seat.fetch("round-0000/model")["w"],
            seat.mean("round-0000/state", {"w": mine} if alone else {}, alone, exact=True)["w"],
            seat.fetch("round-0000/state")["w"],
            seat.sum("round-0000/sum", mine[:3]),
            seat.mean("round-0001/model", {"w": values["a"]}, 3.0 if alone else 1.0)["w"],
        )
        assert sent < 2 * 50_000 + 200
        assert all(result.dtype == np.float32 for result in results[:3])
        return tuple(result.tobytes() for result in results)

    served = serve(make_study("ab", wire_dtype=wire_dtype))
    seats = [served.seat(site) for site in "ab"]
    a, b = together(*(lambda seat=seat: talk(seat) for seat in seats))
    assert a == b
    rounded = {site: widen(narrow({"w": value}, wire_dtype))["w"] for site, value in values.items()}
    exact = (3 * rounded["a"].astype(float) + rounded["b"]) / 4
    mean, state, fetched, total, equal = a  # type: ignore[misc]
    half_a_unit = np.abs(exact) * (2.0**-8 if wire_dtype == "bfloat16" else 2.0**-11) + 1e-7
    assert (np.abs(np.frombuffer(mean, np.float32) - exact) <= half_a_unit).all()
    assert state == fetched == values["a"].tobytes()
    assert total == (values["a"][:3].astype(float) + values["b"][:3]).tobytes()
    assert equal == rounded["a"].tobytes(), "the mean of equal tensors is that tensor"


def test_the_wire_dtype_is_a_choice_of_three() -> None:
    with pytest.raises(ValueError, match="float32"):
        make_study("ab", wire_dtype="float64")
