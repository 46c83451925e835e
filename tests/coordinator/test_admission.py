"""What is decoded for a site is bounded before it is decoded."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunet_fed.coordinator.admission import DEEPEST, LARGEST, check_content
from nnunet_fed.errors import RefusedError
from nnunet_fed.exchange.payload import LONGEST_HEADER
from nnunet_fed.exchange.reduction import exact_sum

LIMIT = 200e6
"""Bytes."""


def peak_of_check(path: Path, verb: Any = "gather") -> tuple[float, str]:
    """The most memory that a check takes, and what it refuses."""
    tracemalloc.start()
    try:
        check_content(verb, path)
        refusal = ""
    except RefusedError as error:
        refusal = str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return peak, refusal


@pytest.mark.parametrize("unit", [b"[],", b'{"a":[]},', b"1,", b'"a",', b'{"":', b"["])
@pytest.mark.parametrize("size", [LARGEST["gather"], 1 << 20])
def test_a_gathered_value_takes_little_memory_whatever_it_is(tmp_path: Path, unit: bytes, size: int) -> None:
    """64 MiB were allowed, which took 2 GB and 13 s."""
    path = tmp_path / "value"
    middle = unit * (size // len(unit) - 2)
    path.write_bytes(b"[" + middle + b"0]")
    peak, refusal = peak_of_check(path)
    assert peak < LIMIT
    assert refusal or len(middle.split(b",")) < 2 * size


def test_the_geometry_of_forty_thousand_cases_is_gathered(tmp_path: Path) -> None:
    path = tmp_path / "value"
    case = {"spacing": [0.9765625, 0.9765625, 2.4999990463256836], "shape": [256, 256, 128]}
    path.write_bytes(json.dumps([case] * 40_000).encode())
    assert path.stat().st_size < LARGEST["gather"]
    assert peak_of_check(path)[1] == ""


@pytest.mark.parametrize("depth", [DEEPEST, DEEPEST + 1])
def test_a_gathered_value_is_not_deep(tmp_path: Path, depth: int) -> None:
    path = tmp_path / "value"
    path.write_bytes(b"[" * depth + b"]" * depth)
    assert bool(peak_of_check(path)[1]) == (depth > DEEPEST)


def test_the_header_of_tensors_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "value"
    for length in (LONGEST_HEADER, 1 << 24):
        text = b"[" + b"[]," * (length // 3 - 1) + b"0]"
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        peak, refusal = peak_of_check(path, "mean")
        assert refusal
        assert peak < LIMIT


def test_a_sum_of_whole_numbers_takes_little_memory() -> None:
    arrays = [np.full(700_000, 2**62 - number, np.int64) for number in range(2)]
    tracemalloc.start()
    total = exact_sum(arrays)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total.tolist()[::350_000] == [2**63 - 1] * 2
    assert peak < 45e6
    with pytest.raises(RefusedError, match="does not fit into 64 bits"):
        exact_sum([*arrays, np.ones(700_000, np.int64)])
    assert exact_sum([np.array(3), np.array(4)]).tolist() == 7
