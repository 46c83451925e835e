"""What a method's author reuses: one site publishes, the next one steps in, and what was published is checked."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process import InProcess, RememberingCommunicator
from serving import Serve, make_study, together

from nnunet_fed.errors import DisagreementError, NoContributionError
from nnunet_fed.exchange.communicator import Array, LocalCommunicator, LocalFederation
from nnunet_fed.exchange.payload import Tensors
from nnunet_fed.trainers.nnUNetTrainerFedAdam import nnUNetTrainerFedAdam
from nnunet_fed.trainers.nnUNetTrainerFedSM import nnUNetTrainerFedSM
from nnunet_fed.trainers.parts.publishing import from_next_source, publish, publish_computed, require_equal
from nnunet_fed.trainers.parts.sentences import DEBUG_VARIABLE


def state(value: float) -> dict[str, Array]:
    return {"w": np.full(3, value, np.float32)}


def test_one_site_publishes_and_the_others_do_not_even_gather() -> None:
    asked: list[str] = []

    def run(seat: LocalCommunicator) -> dict[str, Array]:
        def own() -> Tensors:
            asked.append(seat.site)
            return state(ord(seat.site))

        return publish(seat, "r/state", "b", own)

    for arrays in LocalFederation("abc").run(run).values():
        assert arrays["w"].tolist() == [ord("b")] * 3
    assert asked == ["b"]


def test_the_next_source_is_asked_until_one_answers() -> None:
    asked: list[str] = []

    def ask(source: str) -> str:
        asked.append(source)
        if source < "c":
            raise NoContributionError(source)
        return source

    assert from_next_source("abcd", ask, "Nobody.") == "c"
    assert asked == ["a", "b", "c"]
    with pytest.raises(NoContributionError, match=r"Nobody\."):
        from_next_source("ab", ask, "Nobody.")


def test_all_have_told_the_same() -> None:
    require_equal({"a": "1", "b": "1"}, "They differ")
    with pytest.raises(DisagreementError, match=r"They differ \(a: 1, b: none\)\. Install the same versions"):
        require_equal({"a": "1", "b": None}, "They differ")


def computed(values: dict[str, float]) -> dict[str, str]:
    """What each site is told that has computed a state of this value; site a publishes."""

    def run(seat: LocalCommunicator) -> str:
        try:
            published = publish_computed(seat, "round-0003/state", ["a"], state(values[seat.site]))
        except DisagreementError as error:
            return str(error)
        assert published["w"].tobytes() == state(values["a"])["w"].tobytes()
        return ""

    return LocalFederation(list(values)).run(run)


def test_what_was_published_is_compared_with_what_was_computed_bit_for_bit() -> None:
    assert computed({"a": 0.1, "b": 0.1, "c": 0.1}) == {"a": "", "b": "", "c": ""}
    assert computed({"a": -0.0, "b": -0.0})["b"] == ""
    for other in (np.nextafter(np.float32(0.1), np.float32(1)), -0.1):
        told = computed({"a": 0.1, "b": 0.1, "c": float(other)})
        assert told["a"] == told["b"] == ""
        assert "Site 'a' has published a state as 'round-0003/state'" in told["c"]
        assert "site 'c' has computed itself" in told["c"]
        assert "Install the same versions" in told["c"]
    assert computed({"a": 0.0, "b": -0.0})["b"] != "", "bits, not numbers"


def test_no_wire_rounds_what_is_compared(serve: Serve) -> None:
    served = serve(make_study("ab", wire_dtype="float16"))
    own = {"w": np.random.default_rng(0).normal(size=100).astype(np.float32)}
    seats = [served.seat(name) for name in "ab"]
    for arrays in together(*(partial(publish_computed, seat, "round-0000/state", ["a"], own) for seat in seats)):
        assert arrays["w"].tobytes() == own["w"].tobytes()  # type: ignore[index]


# ------------------------------------------------------------------------------------------------------ whole trainings


@pytest.mark.parametrize(
    ("trainer", "method", "key"),
    [
        (nnUNetTrainerFedAdam, {"name": "fedadam"}, "model"),
        (nnUNetTrainerFedSM, {"name": "fedsm", "familiarity_gate": False}, "state"),
    ],
)
def test_a_site_that_publishes_something_else_ends_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: type[Any], method: dict[str, Any], key: str
) -> None:
    class Forging(RememberingCommunicator):
        def mean(self, key_: str, tensors: Tensors, weight: float, exact: bool = False) -> dict[str, Array]:
            if tensors and key_ == f"round-0000/{key}":
                tensors = {name: np.full_like(array, 666) for name, array in tensors.items()}
            return super().mean(key_, tensors, weight, exact)

    monkeypatch.setattr("in_process.RememberingCommunicator", Forging)
    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    sites = InProcess(tmp_path, monkeypatch)
    with pytest.raises(DisagreementError, match=rf"Site 'a' has published a state as 'round-0000/{key}' that is not"):
        sites.train(trainer, sites.study(method=method))
