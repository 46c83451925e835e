from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from serving import Serve, make_study, tensors_of, together

from nnunet_fed.errors import (
    ConfigurationError,
    DeadlineError,
    NoContributionError,
    RefusedError,
    RoundClosedError,
    UnreachableError,
)
from nnunet_fed.exchange.communicator import Array, LocalFederation
from nnunet_fed.study.site import Site
from nnunet_fed.transport.channel.retry import first_reply
from nnunet_fed.transport.coordinator.server import CoordinatorServer
from nnunet_fed.transport.proto import federation_pb2 as pb
from nnunet_fed.transport.proto.federation_pb2_grpc import CoordinatorStub
from nnunet_fed.transport.site import client
from nnunet_fed.transport.site.client import GrpcCommunicator


def test_every_verb_over_grpc_gives_the_bits_of_the_local_federation(serve: Serve) -> None:
    weights = {"a": 3.0, "b": 7.0, "c": 0.0}

    def all_verbs(seat: GrpcCommunicator) -> tuple[dict[str, Array], Array, dict[str, object]]:
        return (
            seat.mean("round-0001/model", tensors_of(seat.site), weights[seat.site]),
            seat.sum("round-0001/counts", np.arange(3) * ord(seat.site)),
            seat.gather("round-0001/digests", {"digest": seat.site}),
        )

    served = serve(make_study("abc"))
    seats = [served.seat(site) for site in "abc"]
    remote = dict(zip("abc", together(*(lambda seat=seat: all_verbs(seat) for seat in seats)), strict=True))
    local = LocalFederation("abc").run(all_verbs)  # type: ignore[arg-type]
    for site in "abc":
        for name, array in local[site][0].items():
            assert remote[site][0][name].dtype == array.dtype  # type: ignore[index]
            assert remote[site][0][name].tobytes() == array.tobytes()  # type: ignore[index]
        np.testing.assert_array_equal(remote[site][1], local[site][1])  # type: ignore[index]
        assert list(remote[site][2]) == ["a", "b", "c"]  # type: ignore[index]
    payload = sum(array.nbytes for array in tensors_of("a").values())
    assert payload < seats[0].bytes_sent < payload + 1000
    assert seats[2].bytes_sent < 1000, "a site of weight 0 sends no tensors"
    assert seats[2].bytes_received > payload


def test_a_repeated_contribution_is_harmless_and_another_one_gets_the_stored_result(serve: Serve) -> None:
    served = serve(make_study("ab"))
    a, b = served.seat("a"), served.seat("b")
    one, three = {"w": np.float32([1])}, {"w": np.float32([3])}
    together(lambda: a.mean("r/m", one, 1), lambda: b.mean("r/m", three, 1))
    sent = a.bytes_sent
    assert a.mean("r/m", one, 1)["w"] == 2
    assert a.bytes_sent == sent, "the same bytes are not sent again"
    assert a.mean("r/m", {"w": np.float32([100])}, 1)["w"] == 2


def test_changed_values_during_planning_are_refused(serve: Serve) -> None:
    served = serve(make_study("ab"))
    a, b = served.seat("a", "planning"), served.seat("b", "planning")
    together(lambda: a.gather("planning/dataset", 1), lambda: b.gather("planning/dataset", 2))
    assert a.gather("planning/dataset", 1) == {"a": 1, "b": 2}
    told = "Site 'a' has already contributed other values.*the same command with --correct.*agreed.*new-attempt"
    with pytest.raises(RefusedError, match=told):
        a.gather("planning/dataset", 5)


def test_a_round_closes_at_its_deadline_and_the_late_site_learns_what_it_missed(serve: Serve) -> None:
    served = serve(make_study("abc", min_sites=2, deadline_minutes=1 / 60))
    a, b, c = (served.seat(site) for site in "abc")
    tensor = {"w": np.float32([1, 2])}
    together(lambda: a.mean("round-0000/model", tensor, 1), lambda: b.mean("round-0000/model", tensor, 2))
    assert a.weights == {"a": 1, "b": 2}
    started = time.monotonic()
    together(lambda: a.gather("round-0000/digests", 1), lambda: b.gather("round-0000/digests", 1))
    assert time.monotonic() - started < 0.9, "later collectives of a round do not wait for those who are not in it"
    with pytest.raises(RoundClosedError):
        c.mean("round-0000/model", tensor, 1)
    with pytest.raises(RoundClosedError):
        c.gather("round-0000/digests", 1)
    assert c.newest("model") == "round-0000/model"
    np.testing.assert_array_equal(c.fetch("round-0000/model")["w"], tensor["w"])
    together(*(lambda seat=seat: seat.mean("round-0001/model", tensor, 1) for seat in (a, b, c)))
    assert list(a.weights) == ["a", "b", "c"], "who came back is waited for again"
    texts = [event["text"] for event in served.coordinator.status(record=True)["events"] if event["site"] == "c"]
    assert texts[1:] == ["absent from round-0000/model", "came back"]


def test_a_site_whose_wait_has_no_hope_is_told_at_once(serve: Serve) -> None:
    served = serve(make_study("abc", min_sites=2))
    a, b, c = (served.seat(site) for site in "abc")

    def leave_one_after_another() -> None:
        while not served.coordinator.status()["open"]:
            time.sleep(0.05)
        b.leave("maintenance")
        c.leave("maintenance")

    def wait_in_vain() -> None:
        with pytest.raises(DeadlineError, match="cannot be closed any more: it needs 2 of 3 sites, and only a can"):
            a.mean("round-0000/model", {"w": np.float32([1])}, 1)

    started = time.monotonic()
    together(wait_in_vain, leave_one_after_another)
    assert time.monotonic() - started < 10, "and not at the deadline, in 12 hours"
    (failed,) = served.coordinator.status()["failed"]
    assert failed["key"] == "round-0000/model"


def test_a_site_whose_tensors_differ_is_told_and_holds_nobody_up(serve: Serve) -> None:
    served = serve(make_study("abc", min_sites=2))
    a, b, c = (served.seat(site) for site in "abc")
    key, odd, even = "round-0000/model", {"w": np.float32([1, 2])}, {"w": np.float32([1])}

    def be_odd() -> None:
        with pytest.raises(DeadlineError, match="The tensors of site 'c' for 'round-0000/model' differ in names"):
            c.mean(key, odd, 1)

    def follow(seat: GrpcCommunicator) -> None:
        while not served.coordinator.status()["open"]:
            time.sleep(0.05)
        assert seat.mean(key, even, 1)["w"] == 1

    together(be_odd, lambda: follow(a), lambda: follow(b))


def test_an_absent_site_is_not_waited_for_twice(serve: Serve) -> None:
    served = serve(make_study("abc", min_sites=2, deadline_minutes=1 / 60))
    a, b = served.seat("a"), served.seat("b")
    together(lambda: a.gather("r0/x", 1), lambda: b.gather("r0/x", 1))
    started = time.monotonic()
    together(lambda: a.gather("r1/x", 1), lambda: b.gather("r1/x", 1))
    assert time.monotonic() - started < 0.9


def test_below_quorum_the_deadline_fails_and_a_later_try_goes_on(serve: Serve) -> None:
    served = serve(make_study("ab", deadline_minutes=1 / 60))
    a, b = served.seat("a"), served.seat("b")
    with pytest.raises(DeadlineError, match=r"reached its deadline without b; it needs 2 of 2 sites.*--c"):
        a.gather("r/x", 1)
    assert together(lambda: a.gather("r/x", 1), lambda: b.gather("r/x", 2)) == [{"a": 1, "b": 2}] * 2


def test_planning_never_closes_short(serve: Serve) -> None:
    served = serve(make_study("abc", min_sites=1, planning_deadline_minutes=1 / 60))
    a, b, c = (served.seat(site, "planning") for site in "abc")

    def fails(seat: GrpcCommunicator) -> None:
        with pytest.raises(DeadlineError, match=r"without c; it needs 3 of 3 sites.*the same command"):
            seat.gather("planning/x", 1)

    together(lambda: fails(a), lambda: fails(b))
    assert together(*(lambda seat=seat: seat.gather("planning/x", 1) for seat in (a, b, c))) == 3 * [
        {"a": 1, "b": 1, "c": 1}
    ]


@pytest.mark.parametrize("purpose", ["planning", "training"])
def test_a_site_that_comes_into_the_study_does_not_hold_up_what_is_under_way(serve: Serve, purpose: str) -> None:
    first = serve(make_study("ab"))
    a, b = (first.seat(site, purpose) for site in "ab")
    together(lambda: a.gather("planning/x", 1), lambda: b.gather("planning/x", 2))
    first.stop()
    second = serve(make_study("abc"))
    a, b, c = (second.seat(site, purpose) for site in "abc")
    assert c.gathered("planning/x") == {"a": 1, "b": 2}
    assert c.gathered("planning/y") is None
    assert together(lambda: a.gather("planning/y", 1), lambda: b.gather("planning/y", 2)) == [{"a": 1, "b": 2}] * 2
    with pytest.raises(RoundClosedError):
        c.gather("planning/y", 3)
    assert c.gathered("planning/y") == {"a": 1, "b": 2}


def test_a_note_is_in_the_coordinators_log(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "nnunet_fed")
    serve(make_study("a")).seat("a", "planning").note("The sites' data sets differ")
    assert "site a: The sites' data sets differ" in caplog.text


def test_a_site_that_leaves_in_order_is_not_waited_for(serve: Serve) -> None:
    served = serve(make_study("ab", min_sites=1))
    a, b = served.seat("a"), served.seat("b")
    waiting = threading.Thread(target=a.gather, args=("r/x", 1))
    waiting.start()
    b.leave("maintenance")
    waiting.join(5)
    assert not waiting.is_alive()


def test_a_mean_without_any_weight(serve: Serve) -> None:
    seat = serve(make_study("a")).seat("a")
    with pytest.raises(NoContributionError):
        seat.mean("r/m", {"w": np.float32([1])}, 0)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_bad_weights_are_refused(serve: Serve, weight: float) -> None:
    seat = serve(make_study("a")).seat("a")
    with pytest.raises(RefusedError, match="weight"):
        seat.mean("r/m", {"w": np.float32([1])}, weight)
    offer = pb.OfferRequest(run=seat.run, key="r/m", site="a", verb="mean", weight=weight)
    with pytest.raises(grpc.RpcError) as refused:
        seat._stub.Offer(offer)
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION


def test_other_schemas_verbs_and_dtypes_are_refused(serve: Serve) -> None:
    served = serve(make_study("ab"))
    a, b = served.seat("a"), served.seat("b")
    waiting = threading.Thread(target=a.mean, args=("r/m", {"w": np.float32([1])}, 1))
    waiting.start()
    while not served.coordinator.status()["open"]:
        time.sleep(0.01)
    with pytest.raises(RefusedError, match="tensors of site 'b'.*differ"):
        b.mean("r/m", {"w": np.float32([1, 2])}, 1)
    with pytest.raises(RefusedError, match="is a mean at the other sites"):
        b.sum("r/m", np.array([1]))
    with pytest.raises(RefusedError, match="floating-point"):
        b.mean("r/other", {"w": np.array([1])}, 1)
    b.mean("r/m", {"w": np.float32([2])}, 1)
    waiting.join(5)


def test_a_damaged_upload_changes_nothing(serve: Serve) -> None:
    served = serve(make_study("a"))
    seat = served.seat("a")
    offer = pb.OfferRequest(run=seat.run, key="r/x", site="a", verb="gather", weight=1, digest="0" * 32, size=3)
    for data in (b"[1]", b"[1", b"[1, 2]"):
        with pytest.raises(grpc.RpcError) as refused:
            seat._stub.Upload(iter([pb.UploadChunk(offer=offer), pb.UploadChunk(data=data)]))
        assert refused.value.code() == grpc.StatusCode.DATA_LOSS
    assert not served.coordinator.status()["open"]
    assert not list(served.coordinator._store.spool.iterdir())


def test_start_without_c_after_a_contribution_is_refused_with_the_remedy(serve: Serve) -> None:
    served = serve(make_study("a"))
    served.seat("a", fresh=True).gather("start/x", 1)
    with pytest.raises(RefusedError, match=r"Site 'a' has already contributed.*--c.*new-attempt"):
        served.seat("a", fresh=True)
    served.seat("a", fresh=False)
    served.seat("a", fresh=True, configuration="2d")


@pytest.mark.parametrize(
    ("site", "join", "sentence"),
    [
        ("x", {}, "Site 'x' is not in the study 'study' .sites: a, b."),
        ("a", {"digest": "0"}, "plans at site 'a' belong to another study"),
    ],
)
def test_who_does_not_belong_is_refused(serve: Serve, site: str, join: dict[str, str], sentence: str) -> None:
    with pytest.raises(RefusedError, match=sentence):
        serve(make_study("ab")).seat(site, **join)


def test_no_coordinator_ends_in_a_sentence_within_the_patience() -> None:
    seat = GrpcCommunicator(Site(name="a", coordinator="127.0.0.1:9", insecure=True, connect_minutes=0.01))
    with pytest.raises(UnreachableError, match=r"coordinator at 127.0.0.1:9 does not answer.*0.01 minutes"):
        seat.join("planning")


def test_addresses_beyond_this_machine_need_tls(serve: Serve) -> None:
    served = serve(make_study("a"))
    with pytest.raises(ConfigurationError, match="not on this machine"):
        CoordinatorServer(served.coordinator, "0.0.0.0:0", insecure=True)
    with pytest.raises(ConfigurationError, match="--insecure"):
        CoordinatorServer(served.coordinator, "127.0.0.1:0")
    with pytest.raises(ConfigurationError, match="not on this machine"):
        GrpcCommunicator(Site(name="a", coordinator="192.0.2.1:80", insecure=True))
    with pytest.raises(ConfigurationError, match="give certificate, key and ca .* or 'insecure = true'"):
        GrpcCommunicator(Site(name="a", coordinator="127.0.0.1:80"))


def test_a_port_in_use(serve: Serve) -> None:
    served = serve(make_study("a"))
    with pytest.raises(ConfigurationError, match="port is in use"):
        CoordinatorServer(served.coordinator, served.server.address, insecure=True)


def test_another_protocol_version_is_refused(serve: Serve) -> None:
    served = serve(make_study("a"))
    with grpc.insecure_channel(served.server.address) as channel, pytest.raises(grpc.RpcError) as refused:
        CoordinatorStub(channel).Join(pb.JoinRequest(protocol=99, site="a", purpose="planning"))
    assert "same version of nnunet_fed" in refused.value.details()


def test_a_site_survives_a_restart_of_the_coordinator(serve: Serve) -> None:
    study = make_study("ab")
    first = serve(study)
    a, b = first.seat("a"), first.seat("b")
    answers: list[object] = []
    waiting = threading.Thread(target=lambda: answers.append(a.gather("r/x", 1)))
    waiting.start()
    while not first.coordinator.status()["open"]:
        time.sleep(0.01)
    first.stop()
    serve(study, address=first.server.address)
    assert b.gather("r/x", 2) == {"a": 1, "b": 2}
    waiting.join(60)
    assert answers == [{"a": 1, "b": 2}]


def test_a_connection_that_nobody_serves_is_given_up(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers pings, as a proxy does, or a coordinator that is about to end."""
    served = serve(make_study("a"))
    seat, wait, held = served.seat("a"), served.coordinator.wait, threading.Event()
    monkeypatch.setattr(client, "LONG_POLL", 0.1)
    monkeypatch.setattr(client, "OVERDUE", 0.3)

    def lost_once(*arguments: Any) -> Any:
        monkeypatch.setattr(served.coordinator, "wait", wait)
        held.wait(30)
        return wait(*arguments)

    monkeypatch.setattr(served.coordinator, "wait", lost_once)
    try:
        assert seat.gather("r/x", 1) == {"a": 1}
    finally:
        held.set()


def test_a_call_that_neither_ends_nor_can_be_cancelled_is_given_up() -> None:
    """gRPC was seen to lose one, when its server stopped."""
    cancelled, never = [], threading.Event()

    class Lost:
        def __next__(self) -> Any:
            never.wait(30)

        def cancel(self) -> None:
            cancelled.append(True)

    try:
        with pytest.raises(grpc.RpcError) as given_up:
            first_reply(Lost(), 0.05)
    finally:
        never.set()
    assert given_up.value.code() == grpc.StatusCode.UNAVAILABLE, "so that another try follows"
    assert cancelled == [True]
    assert first_reply(iter([1, 2]), 5) == 1


class Guarded:
    """A journal that only who holds the lock may touch: closed while another thread reads it, it ends the process."""

    def __init__(self, journal: Any, held: Callable[[], bool]):
        self._journal, self._held = journal, held

    def __getattr__(self, name: str) -> Any:
        assert self._held(), f"{name} without the lock"
        return getattr(self._journal, name)

    def __enter__(self) -> None:
        assert self._held(), "a transaction without the lock"
        self._journal.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._journal.__exit__(*error)


def test_nobody_touches_the_journal_without_the_lock(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(client, "LONG_POLL", 0.02)
    served = serve(make_study("ab"))
    store, lock = served.coordinator._store, served.coordinator._changed
    store._journal = Guarded(store._journal, lock._is_owned)  # type: ignore[assignment, attr-defined]
    a, b = served.seat("a"), served.seat("b")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(a.mean, "r/model", {"w": np.ones(3, np.float32)}, 1)
        while not served.coordinator.status()["open"]:
            time.sleep(0.01)
        time.sleep(0.3)  # the first is told for whom it waits
        b.mean("r/model", {"w": np.ones(3, np.float32)}, 1)
        waiting.result(30)
    assert b.newest("model") == "r/model"
    b.fetch("r/model")
    b.note("all is well")
    b.leave("done")
    b.status(record=True)
    served.stop()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
