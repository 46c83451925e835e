"""What administrators and their machines do to a federation that runs, over gRPC: clocks, names, weights."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from serving import Serve, Served, make_study, together

from nnunet_fed.coordinator import coordinator, members, round_closer, status, store
from nnunet_fed.coordinator.verdict import Offer
from nnunet_fed.errors import DeadlineError, DisagreementError, RefusedError, RoundClosedError
from nnunet_fed.exchange.payload import Tensors, encode, measure
from nnunet_fed.trainers.parts.publishing import publish_computed
from nnunet_fed.transport.proto import federation_pb2 as pb
from nnunet_fed.transport.proto.federation_pb2_grpc import CoordinatorStub
from nnunet_fed.transport.site import client
from nnunet_fed.transport.site.client import GrpcCommunicator

HOUR = 3600
R0, R1, R2 = (f"round-000{number}/model" for number in range(3))


class WallClock:
    """Stands for the module ``time`` at the coordinator: somebody sets the wall clock, and nothing else changes."""

    monotonic, sleep = staticmethod(time.monotonic), staticmethod(time.sleep)

    def __init__(self) -> None:
        self.shift = 0.0

    def time(self) -> float:
        return time.time() + self.shift


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> WallClock:
    clock = WallClock()
    for module in (coordinator, members, round_closer, status, store):
        monkeypatch.setattr(module, "time", clock)
    return clock


def number(value: float) -> Tensors:
    return {"w": np.float32([value])}


def mean(key: str, values: dict[GrpcCommunicator, float]) -> list[float]:
    """Of all these sites at once; returns what each has got."""
    calls = [lambda seat=seat, value=value: seat.mean(key, number(value), 1) for seat, value in values.items()]  # type: ignore[misc]
    return [float(result["w"][0]) for result in together(*calls)]  # type: ignore[index]


def restarted(serve: Serve, before: Served, sites: str, **settings: Any) -> Served:
    """The coordinator, stopped and started again with these names, at the same address."""
    before.stop()
    return serve(make_study(sites, **settings), address=before.server.address)


def until(happened: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def gives(pool: ThreadPoolExecutor, served: Served, seat: GrpcCommunicator, key: str, value: float) -> Future[Any]:
    """A site that has contributed, and waits."""
    waiting = pool.submit(seat.mean, key, number(value), 1)
    until(lambda: seat.site in given_to(served, key))
    return waiting


def given_to(served: Served, key: str) -> set[str]:
    (run,) = served.coordinator.status(record=True)["runs"].values()
    return {site for collective in run["collectives"] if collective["key"] == key for site in collective["sites"]}


# -------------------------------------------------------------------------------------------------------------- clocks


def test_after_a_step_back_the_newest_model_is_the_newest(serve: Serve, wall: WallClock) -> None:
    served = serve(make_study("ab", keep_rounds=2))
    a, b = (served.seat(site) for site in "ab")
    for count in range(3):
        mean(f"round-{count:04d}/model", {a: count, b: count})
    wall.shift = -HOUR
    for count in range(3, 6):
        key = f"round-{count:04d}/model"
        assert mean(key, {a: count, b: count}) == [count, count]
        assert a.newest("model") == key
        assert b.fetch(key)["w"] == count
    with pytest.raises(RoundClosedError, match="no longer kept"):
        a.fetch(R0)


def test_after_a_step_forward_who_was_there_is_in(
    serve: Serve, wall: WallClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "LONG_POLL", 0.05)  # the first one asks whether the round is over
    served = serve(make_study("ab", min_sites=1))
    a, b = (served.seat(site) for site in "ab")
    with ThreadPoolExecutor(1) as pool:
        waiting = gives(pool, served, a, R0, 1)
        wall.shift = 24 * HOUR
        time.sleep(0.3)
        assert mean(R0, {b: 3}) == [2]
        assert waiting.result(30)["w"] == 2
    assert served.coordinator.status()["sites"]["b"]["standing"] == "active"


def test_a_coordinator_that_restarts_often_closes_its_rounds(serve: Serve) -> None:
    served = serve(make_study("ab", min_sites=1, deadline_minutes=2 / 60))
    a, _ = (served.seat(site) for site in "ab")
    with ThreadPoolExecutor(1) as pool:
        waiting = gives(pool, served, a, R0, 7)
        restarts = 0
        while restarts < 12 and not waiting.done():
            time.sleep(0.5)
            served = restarted(serve, served, "ab", min_sites=1, deadline_minutes=2 / 60)
            restarts += 1
        assert 2 <= restarts < 12
        assert waiting.result(30)["w"] == 7


# --------------------------------------------------------------------------------------------------------------- names


def test_nobody_waits_for_a_name_that_was_added_and_a_site_comes_later(serve: Serve) -> None:
    served = serve(make_study("ab"))
    a, b = (served.seat(site) for site in "ab")
    mean(R0, {a: 1, b: 3})
    served = restarted(serve, served, "abc")
    assert mean(R1, {a: 2, b: 4}) == [3, 3]
    c = served.seat("c", fresh=True)
    newest = c.newest("model")
    assert newest == R1
    assert c.fetch(newest)["w"] == 3
    with pytest.raises(RoundClosedError):
        c.mean(R1, number(100), 1)
    assert mean(R2, {a: 1, b: 2, c: 6}) == [3, 3, 3]


def test_a_name_that_was_removed_is_in_no_mean(serve: Serve) -> None:
    served = serve(make_study("abc"))
    a, b, c = (served.seat(site) for site in "abc")
    mean(R0, {a: 1, b: 1, c: 1})
    with ThreadPoolExecutor(2) as pool:
        waiting = gives(pool, served, a, R1, 1)
        gives(pool, served, c, R1, 100)
        served = restarted(serve, served, "ab")
        assert mean(R1, {b: 3}) == [2]
        assert waiting.result(30)["w"] == 2
    assert a.weights == {"a": 1, "b": 1}
    with pytest.raises(RefusedError, match="Site 'c' is not in the study"):
        c.mean(R2, number(100), 1)
    with pytest.raises(RefusedError, match="Site 'c' is not in the study"):
        served.seat("c")
    assert mean(R2, {a: 1, b: 2}) == [1.5, 1.5]
    told = [event["text"] for event in served.coordinator.status(record=True)["events"] if event["site"] == "c"]
    gone = "is not in the study any more"
    assert told[1:] == [gone, f"{gone}: what it gave to {R1} is withdrawn"]


def test_nobody_waits_for_a_name_that_comes_back_until_it_is_heard_of(serve: Serve) -> None:
    served = serve(make_study("abc", min_sites=2))
    a, b, c = (served.seat(site) for site in "abc")
    mean(R0, {a: 1, b: 1, c: 1})
    served = restarted(serve, served, "ab", min_sites=2)
    served = restarted(serve, served, "abc", min_sites=2)
    assert mean(R1, {a: 2, b: 4}) == [3, 3]
    with pytest.raises(RoundClosedError):
        c.mean(R1, number(100), 1)
    assert mean(R2, {a: 1, b: 2, c: 6}) == [3, 3, 3]
    told = [event["text"] for event in served.coordinator.status(record=True)["events"] if event["site"] == "c"]
    assert told[1:] == ["is not in the study any more", "is in the study now", "came back"]


def test_nothing_is_left_of_what_a_removed_site_was_sending(serve: Serve) -> None:
    served = serve(make_study("abc"))
    c = served.seat("c")
    payload = b"".join(encode({"w": np.zeros(1000, np.float32)}))
    offer = Offer(c.run, R0, "c", "mean", 1.0, *measure([payload]))
    assert served.coordinator.take(offer, 0, [payload[:500]]) is None, "the connection broke"
    spool = served.coordinator._store.spool
    assert served.coordinator.position(offer) == 500
    assert list(spool.iterdir())
    restarted(serve, served, "ab")
    assert not list(spool.iterdir())


def test_a_site_with_another_name_counts_once(serve: Serve) -> None:
    served = serve(make_study("ab"))
    a, b = (served.seat(site) for site in "ab")
    mean(R0, {a: 1, b: 1})
    with ThreadPoolExecutor(1) as pool:
        gives(pool, served, b, R1, 7)
        served = restarted(serve, served, "az")
        assert mean(R1, {a: 1, served.seat("z"): 7}) == [4, 4]
        b.close()
    assert a.weights == {"a": 1, "z": 1}


# ------------------------------------------------------------------------------------------------ weights and numbers


@pytest.mark.parametrize("weight", [1e308, 1.7e308, math.inf, math.nan, -1.0])
def test_a_weight_out_of_bounds_is_refused_whatever_the_site_thinks_of_it(serve: Serve, weight: float) -> None:
    served = serve(make_study("ab"))
    a, b = (served.seat(site) for site in "ab")
    digest, size = measure(encode(number(1)))
    offer = pb.OfferRequest(run=a.run, key=R0, site="a", verb="mean", weight=weight, digest=digest, size=size)
    with grpc.insecure_channel(served.server.address) as channel, pytest.raises(grpc.RpcError) as refused:
        CoordinatorStub(channel).Offer(offer, timeout=10)
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "must be 0, or a number from 1e-09 to 1e+09" in refused.value.details()
    with pytest.raises(RefusedError, match="must be 0, or a number from"):
        a.mean(R0, number(1), weight)
    assert mean(R0, {a: 1, b: 3}) == [2, 2], "and every later call is answered"


def test_a_mean_that_is_not_finite_closes_nothing(serve: Serve) -> None:
    served = serve(make_study("ab"))
    seats = [served.seat(site) for site in "ab"]
    told = []

    def give(seat: GrpcCommunicator) -> None:
        with pytest.raises(DeadlineError) as error:
            seat.mean(R0, {"w": np.array([1.7e308])}, 1e9)
        told.append(str(error.value))

    together(*(lambda seat=seat: give(seat) for seat in seats))  # type: ignore[misc]
    assert all("mean of the sites' tensors is not finite" in sentence for sentence in told)
    assert seats[0].newest("model") is None


def test_no_site_loads_what_is_not_finite(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even from a coordinator that does not look, such as that of version 0.1."""

    def careless(verb: str, files: Any, weights: Any, out: Path) -> tuple[str, int]:
        payload = b"".join(encode(number(math.inf)))
        out.write_bytes(payload)
        return measure([payload])

    monkeypatch.setattr(round_closer, "write_result", careless)
    served = serve(make_study("a"))
    seat = served.seat("a")
    with pytest.raises(RefusedError, match="'w'"):
        seat.mean(R0, number(1), 1)
    with pytest.raises(RefusedError, match="'w'"):
        seat.fetch(R0)


# ------------------------------------------------------------------------------------------------ who is in, and what


def test_who_comes_while_a_deadlines_mean_is_computed_is_told_that_it_is_late(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    computing, late = threading.Event(), threading.Event()
    reduce = round_closer.write_result

    def slow(*arguments: Any) -> Any:
        computing.set()
        late.wait(20)
        return reduce(*arguments)

    monkeypatch.setattr(round_closer, "write_result", slow)
    served = serve(make_study("ab", min_sites=1, deadline_minutes=1 / 60))
    a, b = (served.seat(site) for site in "ab")
    with ThreadPoolExecutor(2) as pool:
        waiting = gives(pool, served, a, R0, 1)
        assert computing.wait(20)
        asking = pool.submit(b.mean, R0, number(100), 1)
        time.sleep(0.3)
        late.set()
        with pytest.raises(RoundClosedError):
            asking.result(30)
        assert waiting.result(30)["w"] == 1
    assert a.weights == {"a": 1}, "who is told to be in it is in it"
    assert b.fetch(R0)["w"] == 1
    assert mean(R1, {a: 1, b: 3}) == [2, 2]


def test_a_site_does_not_load_a_state_that_it_has_computed_otherwise(serve: Serve) -> None:
    served = serve(make_study("abc"))
    computed = {"a": 666.0, "b": 1.0, "c": 1.0}

    def publish(seat: GrpcCommunicator) -> str:
        try:
            publish_computed(seat, R0, ["a", "b"], number(computed[seat.site]))
        except DisagreementError as error:
            return str(error)
        return ""

    seats = [served.seat(site) for site in "abc"]
    told = together(*(lambda seat=seat: publish(seat) for seat in seats))  # type: ignore[misc]
    assert told[0] == "", "the one that is alone cannot know"
    assert all("Site 'a' has published a state as 'round-0000/model'" in str(sentence) for sentence in told[1:])


def test_the_next_source_publishes_for_one_that_was_removed(serve: Serve) -> None:
    served = serve(make_study("abc"))
    a, b, c = (served.seat(site) for site in "abc")
    together(*(lambda seat=seat: seat.gather("round-0000/moments", 1) for seat in (a, b, c)))  # type: ignore[misc]
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(publish_computed, seat, R0, ["a", "b"], number(5)) for seat in (b, c)]
        until(lambda: given_to(served, R0) == {"b", "c"})
        served = restarted(serve, served, "bc")
        assert [future.result(30)["w"] for future in waiting] == [5, 5]
    newest = served.seat("b").newest("model")
    assert newest == f"{R0}/1"
    assert c.fetch(newest)["w"] == 5
