"""The record of a long study, which no message could take."""

from __future__ import annotations

import json
from collections.abc import Callable

import grpc
import numpy as np
import pytest
from serving import Served, make_study, together

from nnunet_fed.coordinator import history
from nnunet_fed.coordinator.coordinator import Coordinator
from nnunet_fed.errors import RefusedError
from nnunet_fed.transport.channel import tls
from nnunet_fed.transport.proto import federation_pb2 as pb

Serve = Callable[..., Served]
ROUNDS = 12


@pytest.fixture
def served(serve: Serve) -> Served:
    made = serve(make_study("ab"))
    seats = [made.seat(site) for site in "ab"]
    for number in range(ROUNDS):
        key = f"round-{number:04d}/model"
        together(*(lambda seat=seat, key=key: seat.mean(key, {"w": np.ones(3)}, 1) for seat in seats))
    together(*(lambda seat=seat: seat.gather("planning/dataset", 1) for seat in map(made.seat, "ab", 2 * ["planning"])))
    return made


def test_pages_make_up_the_record(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "ENTRIES", 6)
    pages: list[str] = []
    record_page = Coordinator.record_page

    def counted(coordinator: Coordinator, page: str, protocol: int) -> object:
        pages.append(page)
        return record_page(coordinator, page, protocol)

    monkeypatch.setattr(Coordinator, "record_page", counted)
    together_told = served.seat("a").status(record=True)
    whole = json.loads(json.dumps(served.coordinator.status(record=True)))
    assert len(pages) == (ROUNDS + 1) // 3 + 1
    assert {**together_told, "now": 0} == {**whole, "now": 0}


def test_a_record_that_no_message_takes(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "ENTRIES", 6)
    monkeypatch.setattr(tls, "CHANNEL_OPTIONS", (*tls.CHANNEL_OPTIONS[:-1], ("grpc.max_receive_message_length", 5_000)))
    assert tls.CHANNEL_OPTIONS[-1][0] != tls.CHANNEL_OPTIONS[0][0]
    a = served.seat("a")
    record = a.status(record=True)
    assert sum(len(run["collectives"]) for run in record["runs"].values()) == ROUNDS + 1
    with pytest.raises(grpc.RpcError) as one_message:  # as version 0.1 asks for it
        a._stub.Status(pb.StatusRequest(record=True), timeout=10)
    assert one_message.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_whoever_asks_for_no_page_gets_all(served: Served) -> None:
    reply = served.seat("a")._stub.Status(pb.StatusRequest(record=True), timeout=10)
    assert reply.next == ""
    assert sum(len(run["collectives"]) for run in json.loads(reply.status)["runs"].values()) == ROUNDS + 1


@pytest.mark.parametrize("page", ["x", "1", "1-", "-1-0", "1-1-1", "9" * 30 + "-0"])
def test_no_page(served: Served, page: str) -> None:
    with pytest.raises(RefusedError, match="is no page of the record"):
        served.coordinator.record_page(page)
