"""How long a site insists on an answer: patience begins with the first failure, not with the call."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import grpc
import pytest

from nnunet_fed.errors import UnreachableError
from nnunet_fed.transport.channel import retry
from nnunet_fed.transport.channel.retry import call_with_retries


class Reset(grpc.RpcError):
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "Connection reset by peer"


class Clock:
    """Time that passes only where a call or a pause takes it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def call(self, seconds: float, failures: int) -> Callable[[], str]:
        """A call that takes so long, and whose first ``failures`` tries end with a lost connection."""
        left = failures

        def function() -> str:
            nonlocal left
            self.now += seconds
            left -= 1
            if left >= 0:
                raise Reset
            return "answer"

        return function


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(retry, "time", clock)
    return clock


def test_a_call_that_took_longer_than_the_patience_is_tried_again(clock: Clock) -> None:
    # a long upload, a wait in a process that was suspended: its connection is lost, the coordinator is there
    assert call_with_retries(clock.call(seconds=300, failures=1), 15, "hospital:1", random.Random(0)) == "answer"


def test_nobody_answers_for_as_long_as_the_patience(clock: Clock) -> None:
    began = clock.now
    with pytest.raises(UnreachableError, match="hospital:1 does not answer .* gave up after 0.25 minutes"):
        call_with_retries(clock.call(seconds=0, failures=1000), 15, "hospital:1", random.Random(0))
    assert clock.now - began == pytest.approx(15)


def test_a_transfer_that_comes_further_is_not_given_up(clock: Clock) -> None:
    sent = 0

    def some_more() -> str:
        nonlocal sent
        clock.sleep(10)
        sent += 1
        if sent < 20:
            raise Reset
        return "whole"

    assert call_with_retries(some_more, 15, "hospital:1", random.Random(0), reached=lambda: sent) == "whole"


@pytest.mark.parametrize("positions", [[7], [7, 3, 5]], ids=["stands", "comes and goes"])
def test_a_transfer_that_comes_no_further_is_given_up(clock: Clock, positions: list[int]) -> None:
    # what is handed to a network that swallows it is not always the same
    again = itertools.cycle(positions)
    with pytest.raises(UnreachableError):
        call_with_retries(clock.call(10, failures=20), 15, "hospital:1", random.Random(0), reached=lambda: next(again))
