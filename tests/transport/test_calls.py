"""Calls that would keep others from theirs: over real gRPC with mutual TLS."""

from __future__ import annotations

import gzip
import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hostile_callers import Certified, Held
from serving import Served, make_study, together

from nnunet_fed.exchange.payload import encode, measure
from nnunet_fed.transport.channel import calls as calls_module
from nnunet_fed.transport.channel import options as options_module
from nnunet_fed.transport.channel.calls import SHARE
from nnunet_fed.transport.channel.tls import KeyFiles
from nnunet_fed.transport.proto import federation_pb2 as pb

Serve = Callable[..., Served]
COORDINATOR = "/nnunet_fed.v1.Coordinator"
METHODS = [f"{COORDINATOR}/{method.name}" for method in pb.DESCRIPTOR.services_by_name["Coordinator"].methods]
TENSORS = {"w": np.ones(2_000_000, np.float32)}


@pytest.fixture
def certified(tmp_path: Path) -> Certified:
    return Certified(tmp_path)


@pytest.fixture
def served(serve: Serve, certified: Certified) -> Served:
    folder = certified.coordinator
    keys = KeyFiles(folder / "certificate.pem", folder / "key.pem", folder / "ca.pem")
    return serve(make_study(["a", "b", "member"], min_sites=2), keys=keys, revoked=certified.deny_list)


@pytest.fixture
def held() -> Iterator[Held]:
    held = Held()
    yield held
    held.let_go()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller may keep silent for half a second."""
    monkeypatch.setattr(calls_module, "FIRST_SECONDS", 0.5)
    monkeypatch.setattr(calls_module, "MESSAGE_SECONDS", 0.5)
    monkeypatch.setattr(calls_module, "GLANCE_SECONDS", 0.1)


def honest_round(served: Served, certified: Certified, key: str = "start/model") -> None:
    """What sites a, b and member contribute becomes a mean."""
    seats = [served.seat(name, files=certified.of[name]) for name in ("a", "b", "member")]
    tensors = {"w": np.ones(10, np.float32)}
    means = together(*(lambda seat=seat: seat.mean(key, tensors, 1.0)["w"].tolist() for seat in seats))
    assert means == [[1.0] * 10] * 3


def code_of(call: Any) -> tuple[grpc.StatusCode, str]:
    try:
        call.result(20)
    except grpc.RpcError as error:
        return error.code(), str(error.details())
    return grpc.StatusCode.OK, ""


def until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


@pytest.mark.parametrize("who", ["revoked", "foreign"])
def test_who_does_not_belong_is_refused_before_a_message_comes(
    served: Served, certified: Certified, held: Held, caplog: pytest.LogCaptureFixture, who: str
) -> None:
    """Each call held a thread for good: the first sixteen kept all sites out, without a line in the log."""
    with ExitStack() as stack:
        for _ in range(5):
            channel = stack.enter_context(certified.channel(served.server.address, who))
            for method in METHODS:
                held.begin(channel, method)
        outcomes = [code_of(call) for call in held.calls]
        assert {code for code, _ in outcomes} == {grpc.StatusCode.PERMISSION_DENIED}
        honest_round(served, certified)
    sentence = "has been revoked" if who == "revoked" else "is not a site of the study"
    assert sentence in caplog.text
    assert len([record for record in caplog.records if sentence in record.message]) <= 21, "nobody fills the log"


@pytest.mark.usefixtures("patient")
def test_a_member_who_keeps_silent_has_its_share_and_only_for_a_while(
    served: Served, certified: Certified, held: Held, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls_module, "FIRST_SECONDS", 5.0)
    with ExitStack() as stack:
        for _ in range(6):
            channel = stack.enter_context(certified.channel(served.server.address, "member"))
            for _ in range(10):
                held.begin(channel, f"{COORDINATOR}/Upload")
        full = until(lambda: [call for call in held.calls if call.done()][59 - SHARE :])
        assert {call.code() for call in full} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert "'member' has 8 calls under way" in full[0].details()
        for name in "ab":
            assert served.seat(name, files=certified.of[name]).status()["attempt"] == 1
        outcomes = [code_of(call)[0] for call in held.calls]
        assert outcomes.count(grpc.StatusCode.CANCELLED) == SHARE
        assert outcomes.count(grpc.StatusCode.RESOURCE_EXHAUSTED) == 60 - SHARE
    assert "ended a call of 'member'" in caplog.text
    assert "nothing has moved for 5 s" in caplog.text
    honest_round(served, certified)


def an_upload(served: Served, certified: Certified, name: str) -> tuple[bytes, bytes]:
    """The first message of an upload, and the payload."""
    payload = b"".join(encode(TENSORS))
    digest, size = measure([payload])
    run = served.seat(name, files=certified.of[name]).run
    offer = pb.OfferRequest(run=run, key="start/model", site=name, verb="mean", weight=1, digest=digest, size=size)
    return pb.UploadChunk(offer=offer).SerializeToString(), payload


@pytest.mark.usefixtures("patient")
def test_an_upload_that_stops_is_ended_and_goes_on_later(
    served: Served, certified: Certified, held: Held, caplog: pytest.LogCaptureFixture
) -> None:
    first, payload = an_upload(served, certified, "member")
    with certified.channel(served.server.address, "member") as channel:
        data = pb.UploadChunk(data=payload[:300_000]).SerializeToString()
        assert code_of(held.begin(channel, f"{COORDINATOR}/Upload", first, data))[0] == grpc.StatusCode.CANCELLED
    assert "ended a call of 'member'" in caplog.text
    offer = pb.UploadChunk.FromString(first).offer
    from nnunet_fed.exchange.uploads import Upload

    there = Upload(offer.run, offer.key, "member", offer.digest, offer.size)
    assert until(lambda: served.coordinator._spool.position(there)) == 300_000


@pytest.mark.usefixtures("patient")
def test_who_does_not_take_a_result_is_not_waited_for(
    served: Served, certified: Certified, caplog: pytest.LogCaptureFixture
) -> None:
    seats = [served.seat(name, files=certified.of[name]) for name in ("a", "b", "member")]
    large = {"w": np.ones(12_000_000, np.float32)}  # more than HTTP/2's windows grow to
    together(*(lambda seat=seat: seat.mean("start/model", large, 1.0) for seat in seats))
    request = pb.ResultRequest(run=seats[0].run, key="start/model", site="member")
    with certified.channel(served.server.address, "member") as channel:
        replies = channel.unary_stream(f"{COORDINATOR}/Result")(request.SerializeToString())
        next(replies)
        until(lambda: "ended a call of 'member'" in caplog.text)
        with pytest.raises(grpc.RpcError) as ended:
            list(replies)
        assert ended.value.code() == grpc.StatusCode.CANCELLED
    assert served.seat("member", files=certified.of["member"]).fetch("start/model")["w"][0] == 1


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_certificate_that_is_revoked_while_a_transfer_runs(
    served: Served, certified: Certified, held: Held, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, direction: str,
) -> None:  # fmt: skip
    """Only who began a call was looked up: the rest of a model went to a site that had been revoked."""
    monkeypatch.setattr(calls_module, "GLANCE_SECONDS", 0.1)
    with certified.channel(served.server.address, "member") as channel:
        if direction == "up":
            first, _ = an_upload(served, certified, "member")
            call = held.begin(channel, f"{COORDINATOR}/Upload", first)
            until(lambda: served.coordinator._spool._receivers)
            certified.authority.revoke("member")
            assert code_of(call)[0] == grpc.StatusCode.CANCELLED
        else:
            seats = [served.seat(name, files=certified.of[name]) for name in ("a", "b", "member")]
            together(*(lambda seat=seat: seat.mean("start/model", TENSORS, 1.0) for seat in seats))
            request = pb.ResultRequest(run=seats[0].run, key="start/model", site="member")
            replies = channel.unary_stream(f"{COORDINATOR}/Result")(request.SerializeToString())
            next(replies)
            certified.authority.revoke("member")
            until(lambda: "has been revoked" in caplog.text)
            with pytest.raises(grpc.RpcError):
                list(replies)
    assert "has been revoked" in caplog.text


def test_a_message_is_not_decompressed(served: Served, certified: Certified, caplog: pytest.LogCaptureFixture) -> None:
    for who in ("revoked", "member"):
        with certified.channel(served.server.address, who) as channel:
            call = channel.unary_unary(f"{COORDINATOR}/Status")
            with pytest.raises(grpc.RpcError) as refused:
                call(bytes(2_000_000), compression=grpc.Compression.Gzip, timeout=20)
            expected = {grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.PERMISSION_DENIED}
            assert refused.value.code() in expected
    until(lambda: "no message of 'member'" in caplog.text)
    assert gzip.compress(bytes(2_000_000)).__sizeof__() < 5_000


def test_random_bytes_and_unknown_methods_are_refused_with_a_line(
    served: Served, certified: Certified, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with certified.channel(served.server.address, "member") as channel:
        for method in METHODS:
            call = channel.stream_unary(method) if method.endswith("Upload") else channel.unary_unary(method)
            message = b"\xff\xff\xff"
            with pytest.raises(grpc.RpcError) as refused:
                call(iter([message]) if method.endswith("Upload") else message, timeout=20)
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT, method
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/nnunet_fed.v1.Coordinator/\x1b[2J")(b"", timeout=20)
        assert refused.value.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INTERNAL)
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/nnunet_fed.v1.Coordinator/Nothing")(b"", timeout=20)
        assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert "This is no message of the protocol" in caplog.text
    assert "there is no method /nnunet_fed.v1.Coordinator/Nothing here" in caplog.text
    assert "Traceback" not in caplog.text


def test_connections_that_never_show_a_certificate_are_closed(
    serve: Serve, certified: Certified, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options_module, "HANDSHAKE_SECONDS", 1)
    folder = certified.coordinator
    keys = KeyFiles(folder / "certificate.pem", folder / "key.pem", folder / "ca.pem")
    served = serve(make_study(["a", "b", "member"]), keys=keys)
    host, _, port = served.server.address.rpartition(":")
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection((host, int(port)), 20)) for _ in range(200)]
        assert served.seat("a", files=certified.of["a"]).status()["attempt"] == 1
        for connection in silent:
            connection.settimeout(20)
            assert connection.recv(1) == b""
