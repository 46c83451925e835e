"""One seat for all ranks of a distributed training, in real processes."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing

from nnunet_fed import errors
from nnunet_fed.errors import FederationError, RefusedError
from nnunet_fed.exchange.communicator import Array, LocalFederation
from nnunet_fed.exchange.payload import Tensors
from nnunet_fed.trainers.parts import ranks
from nnunet_fed.trainers.parts.pretrained_weights import read_weights, take_weights
from nnunet_fed.trainers.parts.ranks import (
    RankZeroCommunicator,
    from_rank_zero,
    is_distributed,
    patient_group,
    tensors_from_rank_zero,
)
from nnunet_fed.trainers.parts.study_trainer import StudyTrainer

Body = Callable[[], Any]
Answers = tuple[dict[str, Any], list[tuple[str, str]], dict[str, bytes], list[Any], tuple[str, str]]
ERRORS = [getattr(errors, name) for name in sorted(vars(errors)) if name.endswith("Error")]


class OneSite:
    """A seat in a federation of one site, which also remembers its means, as the coordinator does."""

    def __init__(self) -> None:
        self._seat = LocalFederation(["a"]).communicator("a")
        self.site, self.sites = self._seat.site, self._seat.sites
        self._means: dict[str, dict[str, Array]] = {}

    def mean(self, key: str, tensors: Tensors, weight: float, exact: bool = False) -> dict[str, Array]:
        self._means[key] = self._seat.mean(key, tensors, weight)
        return self._means[key]

    def sum(self, key: str, array: Array) -> Array:
        return self._seat.sum(key, array)

    def gather(self, key: str, value: Any) -> dict[str, Any]:
        return self._seat.gather(key, value)

    def newest(self, name: str) -> str | None:
        return next((key for key in reversed(self._means) if key.endswith(f"/{name}")), None)

    def fetch(self, key: str) -> dict[str, Array]:
        return self._means[key]


def on_two_ranks(body: Body, folder: Path, default_timeout: float) -> list[Any]:
    """Answers of both ranks, each a process of one gloo group."""
    multiprocessing.spawn(_rank, (body, folder, default_timeout), nprocs=2)
    return [pickle.loads((folder / f"answer{rank}").read_bytes()) for rank in range(2)]


def _rank(rank: int, body: Body, folder: Path, default_timeout: float) -> None:
    # both are there before a short timeout begins to count
    (folder / f"ready{rank}").touch()
    while not (folder / f"ready{1 - rank}").exists():
        time.sleep(0.05)
    dist.init_process_group(
        "gloo", f"file://{folder}/meeting", timedelta(seconds=default_timeout), world_size=2, rank=rank
    )
    assert is_distributed()
    leaving = patient_group(1)
    (folder / f"answer{rank}").write_bytes(pickle.dumps(body()))
    dist.barrier(leaving)  # a rank that still talks to one that has ended is aborted
    dist.destroy_process_group()


def _every_verb() -> dict[str, Any]:
    rank = dist.get_rank()
    seat = RankZeroCommunicator(OneSite() if rank == 0 else None, "a", ("a",), patient_group(1))
    # each rank asks with values of its own; those of rank 0 count
    answers = {
        "nothing yet": seat.newest("model"),
        "mean": seat.mean("round-0000/model", {"w": np.float32([[rank + 1, -0.0]]), "s": np.array(rank + 0.5)}, 2.0),
        "sum": seat.sum("round-0000/counts", np.array([rank, 2**62])),
        "gather": seat.gather("round-0000/digests", {"rank": rank}),
        "newest": seat.newest("model"),
        "fetch": seat.fetch("round-0000/model"),
    }
    return {**answers, "site": seat.site, "sites": seat.sites}


def test_every_rank_gets_the_answers_of_rank_0(answers: list[Answers]) -> None:
    for answer, *_ in answers:
        assert answer["nothing yet"] is None
        assert answer["newest"] == "round-0000/model"
        assert answer["gather"] == {"a": {"rank": 0}}
        assert (answer["sum"].dtype, answer["sum"].tolist()) == (np.int64, [0, 2**62])
        assert (answer["site"], answer["sites"]) == ("a", ("a",))
        for name in ("mean", "fetch"):
            assert answer[name]["w"].dtype == np.float32
            assert answer[name]["w"].tobytes() == np.float32([[1, -0.0]]).tobytes()
            assert (answer[name]["s"].shape, float(answer[name]["s"])) == ((), 0.5)


def _odd_tensors() -> dict[str, Array]:
    """What a broadcast could bend: no dimension, no element, other bytes than numbers, a view, read-only memory."""
    random = np.random.default_rng(0)
    tensors = {
        "z first": random.normal(size=(3, 5)).astype(np.float32),
        "bfloat16": random.normal(size=7).astype(ml_dtypes.bfloat16),
        "scalar": np.array(-0.0),
        "empty": np.empty((0, 3), np.float16),
        "view": random.normal(size=(4, 6)).astype(np.float32)[:, ::2],
        "not numbers": np.array([0x7FC00001, 0xFF800000, 0x80000000], np.uint32).view(np.float32),
        "read-only": np.frombuffer(random.bytes(64), np.float64),
        "whole": np.arange(4, dtype=np.int64),
    }
    assert not tensors["read-only"].flags.writeable
    return tensors


def _tensors_and_errors() -> list[Any]:
    rank, group = dist.get_rank(), patient_group(1)
    odd = tensors_from_rank_zero(_odd_tensors if rank == 0 else _never, group)
    caught = None
    try:
        tensors_from_rank_zero(_refused if rank == 0 else _never, group)
    except RefusedError as error:
        caught = str(error)
    again = tensors_from_rank_zero(_odd_tensors if rank == 0 else _never, group)  # and the ranks are still in step
    return [caught, *(list(arrays.items()) for arrays in (odd, again))]


def _refused() -> dict[str, Array]:
    raise RefusedError("This one not.")


def test_tensors_of_rank_0_come_to_every_rank_bit_for_bit(answers: list[Answers]) -> None:
    expected = [(name, array.dtype, array.shape, array.tobytes()) for name, array in _odd_tensors().items()]
    for *_, (caught, *received), _ in answers:
        assert caught == "This one not."
        for tensors in received:
            assert [(name, array.dtype, array.shape, array.tobytes()) for name, array in tensors] == expected


class Failing(OneSite):
    """Every verb fails with the error that its key names."""

    def gather(self, key: str, value: Any) -> dict[str, Any]:
        raise getattr(errors, key)(f"{key} at rank 0: 'name it'")


def _every_error() -> list[tuple[str, str]]:
    seat = RankZeroCommunicator(Failing() if dist.get_rank() == 0 else None, "a", ("a",), patient_group(1))
    caught = []
    for kind in ERRORS:
        try:
            seat.gather(kind.__name__, None)
        except FederationError as error:
            caught.append((type(error).__name__, str(error)))
    # and the ranks are still in step
    seat.mean("r/m", {"w": np.zeros(1)}, 1)
    return caught


def test_an_error_of_rank_0_is_raised_on_every_rank(answers: list[Answers]) -> None:
    zero, one = (errors_raised for _, errors_raised, *_ in answers)
    assert zero == one == [(kind.__name__, f"{kind.__name__} at rank 0: 'name it'") for kind in ERRORS]


def _slow() -> str:
    time.sleep(4)
    return "patience"


def _wait_with_and_without_patience() -> tuple[str, str]:
    group, ranks.BEAT_SECONDS = patient_group(1.5 / 60), 0.3
    patient = from_rank_zero(_slow if dist.get_rank() == 0 else _never, group)
    arrays = tensors_from_rank_zero(_slow_tensors if dist.get_rank() == 0 else _never, group)
    assert arrays["w"].tolist() == [1, 2], "and the ranks are still in step"
    impatient = "gave up"
    with suppress(RuntimeError):
        impatient = from_rank_zero(_slow if dist.get_rank() == 0 else _never)
    return patient, impatient


def _slow_tensors() -> dict[str, Array]:
    time.sleep(2)
    return {"w": np.float32([1, 2])}


def _never() -> Any:
    raise AssertionError("only rank 0 is asked")


def test_ranks_wait_for_rank_0_as_long_as_it_is_busy(answers: list[Answers]) -> None:
    """Longer than any timeout, since a deadline may be changed while they wait (``_slow`` takes longer than both)."""
    _, (*_, one) = answers
    assert one == ("patience", "gave up"), "the second shows that the default group's timeout was at work"


def _pretrained() -> dict[str, bytes]:
    """A distributed network that has taken the weights of a file, in one rank's eyes, after a step."""
    torch.manual_seed(dist.get_rank())
    network = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    with NamedTemporaryFile(suffix=".pth") as file:
        torch.save({"network_weights": {"module.weight": torch.ones(2, 2), "module.bias": torch.ones(2)}}, file.name)
        take_weights(StudyTrainer.bare(network), read_weights(Path(file.name)))
    before = network.module.weight.detach().numpy().tobytes()
    network(torch.full((1, 2), float(dist.get_rank()))).sum().backward()
    optimizer.step()
    return {"before": before, "after": network.module.weight.detach().numpy().tobytes()}


def test_every_rank_starts_from_pretrained_weights(answers: list[Answers]) -> None:
    for *_, found, _, _ in answers:
        assert found["before"] == np.ones((2, 2), np.float32).tobytes()
        assert found["after"] == np.full((2, 2), 0.95, np.float32).tobytes(), "a step on the mean of the gradients"


def _everything() -> Answers:
    # the last leaves the default group broken
    return _every_verb(), _every_error(), _pretrained(), _tensors_and_errors(), _wait_with_and_without_patience()


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[Answers]:
    """Of both ranks, each of which would import PyTorch for every test."""
    return on_two_ranks(_everything, tmp_path_factory.mktemp("ranks"), default_timeout=2)


def test_without_distribution_the_communicator_is_just_asked() -> None:
    assert not is_distributed()
    assert patient_group(1) is None
    assert from_rank_zero(lambda: 3) == 3
    seat = RankZeroCommunicator(OneSite(), "a", ("a",))
    assert seat.mean("r/model", {"w": np.float32([4])}, 1)["w"] == 4
    assert seat.newest("model") == "r/model"
    with pytest.raises(RefusedError, match="weight"):
        seat.mean("r/other", {"w": np.float32([4])}, -1)
    with pytest.raises(RuntimeError, match="no communicator"):
        RankZeroCommunicator(None, "a", ("a",)).gather("r/g", 1)
