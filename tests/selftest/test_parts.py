from __future__ import annotations

from pathlib import Path

import pytest

from nnunet_fed.errors import ConfigurationError, FederationError
from nnunet_fed.selftest.measured_training import Measured
from nnunet_fed.selftest.outcome import PLAIN
from nnunet_fed.selftest.parts import KILLED, PLANNING, TRIED, SelfTest, require_methods
from nnunet_fed.study.methods import METHODS


@pytest.fixture
def test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SelfTest:
    """Nothing is run: FedSM fails, and so does what comes after all methods."""
    measured = [Measured(True, False, [9.0, 9.0, 0.25, 0.5, 0.75], 1000), Measured(True, True, [9.0], 3000)]

    def train(_: SelfTest, method: str) -> list[Measured]:
        if method == "fedsm":
            raise FederationError("its words\n(log: train.log)")
        return measured

    def kill(_: SelfTest) -> list[Measured]:
        raise KeyError("unforeseen")

    monkeypatch.setattr(SelfTest, "_plan", lambda _: [])
    monkeypatch.setattr(SelfTest, "_train_plain", lambda _: measured)
    monkeypatch.setattr(SelfTest, "_train", train)
    monkeypatch.setattr(SelfTest, "_kill_and_continue", kill)
    return SelfTest(tmp_path, "cpu", ("fedsm", "fedavg"))


def test_one_that_fails_does_not_end_the_others(test: SelfTest) -> None:
    begun: list[str] = []
    rows = list(test.rows(begun.append))
    assert [row.part for row in rows] == begun == test.names == [PLANNING, PLAIN, "fedsm", "fedavg", KILLED]
    assert [row.outcome for row in rows] == ["passed", "passed", "failed", "passed", "failed"]
    assert rows[2].failure == "its words\n(log: train.log)"
    assert rows[4].failure == "KeyError: 'unforeseen'"
    fedavg = rows[3]
    assert (fedavg.step_seconds, fedavg.peak_memory) == (0.5, 3000), "without the first two steps; of the larger site"
    assert (fedavg.compiled, fedavg.mixed_precision) == (True, False), "only what both sites had"


def test_without_plans_there_is_nothing_else(test: SelfTest, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(_: SelfTest) -> list[Measured]:
        raise FederationError("no plans")

    monkeypatch.setattr(SelfTest, "_plan", plan)
    assert [row.part for row in test.rows(lambda _: None)] == [PLANNING]


def test_methods(tmp_path: Path) -> None:
    assert {*TRIED, "custom"} == set(METHODS), "every method of ours"
    for method in TRIED:
        assert SelfTest(tmp_path, "cuda")._study("x", method).method.name == method
    with pytest.raises(ConfigurationError, match="there is no 'fedprocks'; known: ditto"):
        require_methods(["fedavg", "fedprocks"])
