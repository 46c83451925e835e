"""A site that corrects what it has told while planning, over the real network: the others begin anew by themselves."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from serving import Serve, Served, lines, make_study, together

from nnunet_fed.coordinator.verdict import Offer
from nnunet_fed.errors import RefusedError, WithdrawnError
from nnunet_fed.exchange.outgoing_log import OutgoingLog
from nnunet_fed.exchange.payload import measure
from nnunet_fed.planners.beginning_anew import plan_with_corrections
from nnunet_fed.transport.coordinator import server
from nnunet_fed.transport.proto import federation_pb2 as pb
from nnunet_fed.transport.proto.federation_pb2_grpc import CoordinatorStub
from nnunet_fed.transport.site.client import GrpcCommunicator

DATASET, COUNTS = "planning/dataset", "planning/counts"
STUDY = make_study("abc")


def plan(seat: GrpcCommunicator, value: int) -> Any:
    """A small planning: two collectives, as often as it takes."""

    def once(_: object) -> tuple[dict[str, int], list[int]]:
        return seat.gather(DATASET, value), seat.sum(COUNTS, np.array([value, 1])).tolist()

    return plan_with_corrections(seat, STUDY, once)


def waits(served: Served, key: str, *missing: str) -> None:
    """Until a collective of the newest planning waits for these sites only."""
    while not any((c["key"], tuple(c["missing"])) == (key, missing) for c in served.coordinator.status()["open"]):
        time.sleep(0.01)


class Going:
    """Sites that plan in threads."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self._threads: list[threading.Thread] = []

    def start(self, seat: GrpcCommunicator, value: int) -> None:
        def run() -> None:
            self.answers[seat.site] = plan(seat, value)

        self._threads.append(threading.Thread(target=run, daemon=True))
        self._threads[-1].start()

    def end(self) -> None:
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()


def test_the_others_begin_anew_by_themselves(serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    served, going = serve(STUDY), Going()
    a, b, c = (served.seat(site, "planning", tls={"connect_minutes": 1}) for site in "abc")
    going.start(a, 1)
    together(lambda: b.gather(DATASET, 2), lambda: c.gather(DATASET, 7))  # both commands end here
    waits(served, COUNTS, "b", "c")
    log = tmp_path / "outgoing.jsonl"
    corrected = served.seat("c", "planning", OutgoingLog(log), corrects=True)
    going.start(corrected, 3)
    waits(served, DATASET, "b")
    going.start(served.seat("b", "planning"), 2)  # the same command again
    going.end()
    assert going.answers == dict.fromkeys("abc", ({"a": 1, "b": 2, "c": 3}, [6, 3]))
    assert "Site 'c' has withdrawn what it told while planning" in caplog.text
    assert "This command does so now" in caplog.text
    assert served.coordinator.planning_run() == a.run == corrected.run
    assert (a.generation, corrected.generation) == (1, 1)
    assert [entry.get("correct") for entry in lines(log, "offer")] == [True, None, None], "it withdraws once"


def test_a_site_that_is_killed_corrects_again(serve: Serve) -> None:
    served, going = serve(STUDY), Going()
    a, b, c = (served.seat(site, "planning") for site in "abc")
    together(lambda: a.gather(DATASET, 1), lambda: b.gather(DATASET, 2), lambda: c.gather(DATASET, 7))
    corrected = served.seat("c", "planning", corrects=True)
    with pytest.raises(WithdrawnError):
        corrected.gather(DATASET, 3)
    for seat, value in ((served.seat("a", "planning"), 1), (served.seat("b", "planning"), 2)):
        going.start(seat, value)
    going.start(served.seat("c", "planning", corrects=True), 3)
    going.end()
    assert plan(served.seat("c", "planning", corrects=True), 3) == going.answers["a"], "and may plan once more"
    assert sum("withdrew" in event["text"] for event in served.coordinator.status(record=True)["events"]) == 1


def test_a_coordinator_that_restarts_meanwhile(serve: Serve, tmp_path: Path) -> None:
    state, going = tmp_path / "state", Going()
    served = serve(STUDY, state)
    a, b, c = (served.seat(site, "planning", tls={"connect_minutes": 1}) for site in "abc")
    for seat, value in ((a, 1), (b, 2)):
        going.start(seat, value)
    c.gather(DATASET, 7)
    waits(served, COUNTS, "c")
    corrected = served.seat("c", "planning", corrects=True, tls={"connect_minutes": 1})
    served.stop()
    served = serve(STUDY, state, address=served.server.address)
    with pytest.raises(WithdrawnError):
        corrected.gather(DATASET, 3)
    served.stop()
    served = serve(STUDY, state, address=served.server.address)
    corrected.join("planning")
    going.start(corrected, 3)
    going.end()
    assert going.answers == dict.fromkeys("abc", ({"a": 1, "b": 2, "c": 3}, [6, 3]))


def test_a_result_that_is_withdrawn_while_it_is_asked_for(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve(STUDY)
    a, b, c = (served.seat(site, "planning") for site in "abc")
    together(lambda: a.gather(DATASET, 1), lambda: b.gather(DATASET, 2), lambda: c.gather(DATASET, 7))
    corrected, found = served.seat("c", "planning", corrects=True), served.coordinator.result_file

    def too_late(collective: Any) -> Path:
        with pytest.raises(WithdrawnError):
            corrected.gather(DATASET, 3)
        return found(collective)

    monkeypatch.setattr(served.coordinator, "result_file", too_late)
    with pytest.raises(WithdrawnError, match="Site 'c' has withdrawn"):
        a.gather(DATASET, 1)


def test_version_0_1_is_told_in_its_own_words(serve: Serve) -> None:
    """It reads the status and the text, and may plan again."""
    served = serve(STUDY)
    c = served.seat("c", "planning")
    with grpc.insecure_channel(served.server.address) as channel:
        stub = CoordinatorStub(channel)
        old = stub.Join(pb.JoinRequest(protocol=2, site="a", purpose="planning"))
        served.coordinator.take(Offer(c.run, DATASET, "c", "gather", 1.0, *measure([b"7"])), 0, [b"7"])
        with pytest.raises(WithdrawnError):
            served.seat("c", "planning", corrects=True).gather(DATASET, 3)
        facts = {"key": DATASET, "site": "a", "verb": "gather", "weight": 1, "digest": "0" * 32, "size": 3}
        request = pb.OfferRequest(run=old.run, **facts)
        for call in (
            lambda: stub.Offer(request),
            lambda: list(stub.Result(pb.ResultRequest(run=old.run, key=DATASET, site="a"))),
        ):
            with pytest.raises(grpc.RpcError) as error:
                call()
            assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
            assert "Where 'nnunet_fed plan_and_preprocess' has ended, run it again." in error.value.details()
        again = stub.Join(pb.JoinRequest(protocol=2, site="a", purpose="planning"))
        assert again.run == f"{old.run}.1"
        request.run = again.run
        assert stub.Offer(request).verdict == "send"


@pytest.mark.parametrize("corrects", [False, True])
def test_a_coordinator_that_does_not_know_corrections(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, corrects: bool
) -> None:
    """Version 0.1 speaks version 2 of the protocol, and does not see what an offer says of it."""
    monkeypatch.setattr(server, "spoken_protocol", lambda oldest, newest: 2)
    offer_of = server._offer_of

    def unknowing(request: pb.OfferRequest, context: Any) -> Any:
        request.correct = False
        return offer_of(request, context)

    monkeypatch.setattr(server, "_offer_of", unknowing)
    served = serve(make_study("a"))
    seat = served.seat("a", "planning", corrects=corrects)
    seat.gather(DATASET, 1)
    told = r"already contributed other values.*Undo that, or let the coordinator open a new attempt \(nnunet_fed new-"
    with pytest.raises(RefusedError, match=told) as error:
        seat.gather(DATASET, 2)
    assert ("--correct" in str(error.value)) is corrects
    assert ("does not know --correct" in str(error.value)) is corrects
