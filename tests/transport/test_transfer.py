"""Uploads and downloads that break, what bounds them, and what is not let in."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import Served, make_study, together

from nnunet_fed.coordinator import round_closer
from nnunet_fed.coordinator.coordinator import Coordinator
from nnunet_fed.coordinator.store import Store
from nnunet_fed.errors import ConfigurationError, DeadlineError, NotFiniteError, RefusedError, UnreachableError
from nnunet_fed.exchange.payload import BLOCK, CHUNK, Tensors, encode, measure
from nnunet_fed.exchange.uploads import OLDEST, InterruptedUploadError, Upload
from nnunet_fed.files import PARTIAL
from nnunet_fed.transport.channel.options import SMALLEST_MESSAGE, UNDER_WAY, message_bytes
from nnunet_fed.transport.channel.transfer import Outbound
from nnunet_fed.transport.channel.zero_copy_streams import reader, write
from nnunet_fed.transport.proto import federation_pb2 as pb
from nnunet_fed.transport.site import client
from nnunet_fed.transport.site.client import GrpcCommunicator

Serve = Callable[..., Served]

LARGE = {"w": np.random.default_rng(0).normal(size=3 * CHUNK // 4).astype(np.float32)}
ZERO = {"w": np.zeros_like(LARGE["w"])}


def offer_of(seat: GrpcCommunicator, tensors: Tensors, key: str = "r/model") -> tuple[pb.OfferRequest, Outbound]:
    outbound = Outbound(encode(tensors))
    offer = pb.OfferRequest(
        run=seat.run, key=key, site=seat.site, verb="mean", weight=1, digest=outbound.digest, size=outbound.size
    )
    return offer, outbound


def broken_upload(seat: GrpcCommunicator, tensors: Tensors, messages: int, key: str = "r/model") -> None:
    """Send so many messages of data, wait for their arrival, and drop the connection."""
    offer, outbound = offer_of(seat, tensors, key)

    def some() -> Iterator[Any]:
        stream, sent = outbound.messages(offer), 0
        yield next(stream)
        for _ in range(messages):
            data = next(stream)
            assert isinstance(data, memoryview)
            sent += len(data)
            yield data
        end = time.monotonic() + 10
        while seat._stub.Offer(offer).position < sent and time.monotonic() < end:
            time.sleep(0.01)
        raise ConnectionError

    with pytest.raises(grpc.RpcError):
        seat._stub.Upload(some())


def spooled(served: Served) -> list[Path]:
    return sorted(served.coordinator._spool.folder.iterdir())


def state_of(served: Served) -> Any:
    record = served.coordinator.status(record=True)
    return [run["collectives"] for run in record["runs"].values()], record["events"]


# ------------------------------------------------------------------------------------------------------------- messages


@given(st.integers(1, 200))
def test_messages_of_all_sites_together_do_not_grow_with_the_sites(sites: int) -> None:
    size = message_bytes(sites)
    assert SMALLEST_MESSAGE <= size <= CHUNK
    assert sites * size <= UNDER_WAY or size == SMALLEST_MESSAGE


def test_uploads_and_downloads_keep_to_a_site_s_share(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    names = "abcdefgh"
    served = serve(make_study(names, min_sites=1, deadline_minutes=0.001))
    seat, sent = served.seat("a"), list[int]()
    upload = seat._stub.Upload

    def seen(messages: Iterator[Any]) -> Iterator[Any]:
        for message in messages:
            if isinstance(message, memoryview):
                sent.append(len(message))
            yield message

    monkeypatch.setattr(seat._stub, "Upload", lambda messages, timeout: upload(seen(messages), timeout=timeout))
    assert seat.mean("r/model", LARGE, 1)["w"].tobytes() == LARGE["w"].tobytes()
    request = pb.ResultRequest(run=seat.run, key="r/model", site="a", wait_seconds=5)
    came = [len(message) for message in seat._stub.Result(request) if isinstance(message, memoryview)]
    assert max(sent) == max(came) == message_bytes(len(names)) == CHUNK // 4
    assert sum(sent) == sum(came) > 2 * CHUNK


# --------------------------------------------------------------------------------------------------------------- resume


def test_an_upload_goes_on_where_it_broke(serve: Serve) -> None:
    served, entries = serve(make_study("a")), list[Any]()
    seat = served.seat("a", outgoing=lambda entry: entries.append(dict(entry)))
    broken_upload(seat, LARGE, 3)
    offer, _ = offer_of(seat, LARGE)
    (partial,) = spooled(served)
    there = partial.stat().st_size
    assert 2 * CHUNK < there < offer.size
    assert seat._stub.Offer(offer).position == there
    assert seat.mean("r/model", LARGE, 1)["w"].tobytes() == LARGE["w"].tobytes()
    assert seat.bytes_sent == offer.size - there
    assert [entry["from_byte"] for entry in entries if entry["what"] == "upload"] == [there]


def test_an_upload_goes_on_after_a_restart_of_the_coordinator(serve: Serve) -> None:
    first = serve(make_study("a"))
    broken_upload(first.seat("a"), LARGE, 2)
    first.stop()
    second = serve(make_study("a"))
    seat = second.seat("a")
    offer, _ = offer_of(seat, LARGE)
    assert seat._stub.Offer(offer).position > CHUNK
    assert seat.mean("r/model", LARGE, 1)["w"].tobytes() == LARGE["w"].tobytes()
    assert seat.bytes_sent < offer.size - CHUNK


def test_a_partial_upload_that_was_damaged_starts_anew(serve: Serve) -> None:
    served = serve(make_study("a"))
    seat = served.seat("a")
    broken_upload(seat, LARGE, 2)
    (partial,) = spooled(served)
    with partial.open("r+b") as file:
        file.seek(500)
        file.write(b"damaged")
    assert seat.mean("r/model", LARGE, 1)["w"].tobytes() == LARGE["w"].tobytes()
    assert seat.bytes_sent > offer_of(seat, LARGE)[0].size, "once from where it broke, once from the start"


def test_another_payload_takes_the_place_of_a_partial_one(serve: Serve) -> None:
    served = serve(make_study("ab"))
    seat = served.seat("a")
    broken_upload(seat, LARGE, 2)
    other = {"w": LARGE["w"] + 1}
    assert seat._stub.Offer(offer_of(seat, other)[0]).position == 0
    broken_upload(seat, other, 1)
    (partial,) = spooled(served)
    assert partial.stat().st_size < 2 * CHUNK


def test_a_newer_connection_takes_over(serve: Serve) -> None:
    served = serve(make_study("a"))
    seat = served.seat("a")
    offer, _ = offer_of(seat, LARGE)
    first = served.coordinator._spool.receive(upload_of(offer), 0)
    with first as receiver:
        receiver.write(bytes(100))
        assert seat.mean("r/model", LARGE, 1)["w"].tobytes() == LARGE["w"].tobytes()
        with pytest.raises(InterruptedUploadError):
            receiver.write(b"late")


def upload_of(offer: pb.OfferRequest) -> Upload:
    return Upload(offer.run, offer.key, offer.site, offer.digest, offer.size)


def test_partial_uploads_go_with_their_collective_their_site_and_their_age(serve: Serve) -> None:
    served = serve(make_study("abc", min_sites=1, deadline_minutes=1 / 60))
    a, b, c = (served.seat(site) for site in "abc")
    broken_upload(b, LARGE, 1)
    broken_upload(c, LARGE, 1)
    broken_upload(c, LARGE, 1, key="r2/model")
    assert len(spooled(served)) == 3
    c.leave("maintenance")
    assert len(spooled(served)) == 1
    a.mean("r/model", LARGE, 1)
    served.stop()  # waits for what goes on in the background
    assert spooled(served) == []

    served = serve(make_study("abc", min_sites=1, deadline_minutes=1 / 60))
    broken_upload(served.seat("a"), LARGE, 1, key="r3/model")
    broken_upload(served.seat("b"), LARGE, 1, key="r3/model")
    served.stop()
    old, young = spooled(served)
    os.utime(old, (time.time() - OLDEST - 1,) * 2)
    served = serve(make_study("abc", min_sites=1, deadline_minutes=1 / 60))
    assert spooled(served) == [young]
    assert young.suffix == PARTIAL


def test_a_download_goes_on_where_it_broke(serve: Serve) -> None:
    served = serve(make_study("a"))
    seat = served.seat("a")
    seat.mean("r/model", LARGE, 1)
    before, result = seat.bytes_received, seat._stub.Result
    broken = 0

    def breaking(request: pb.ResultRequest, timeout: float) -> Iterator[Any]:
        nonlocal broken
        for number, reply in enumerate(result(request, timeout=timeout)):
            yield reply
            if number == 2 and broken < 2:
                broken += 1
                raise OSError_as_rpc()

    seat._stub.Result = breaking
    assert seat.fetch("r/model")["w"].tobytes() == LARGE["w"].tobytes()
    assert broken == 1 or broken == 2
    assert seat.bytes_received - before == offer_of(seat, LARGE)[0].size, "no byte came twice"


def OSError_as_rpc() -> grpc.RpcError:  # noqa: N802
    class BrokenError(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.UNAVAILABLE

        def details(self) -> str:
            return "broken by the test"

    return BrokenError()


# ---------------------------------------------------------------------------------------------------------- on the wire


@given(st.binary(max_size=300))
def test_data_is_what_protobuf_would_write_and_read(data: bytes) -> None:
    read = reader(pb.UploadChunk)
    ours = write(memoryview(data))
    assert ours == pb.UploadChunk(data=data).SerializeToString()
    assert bytes(read(ours)) == data  # type: ignore[arg-type]
    message = pb.UploadChunk(offer=pb.OfferRequest(key="k", size=len(data)))
    assert read(write(message)) == message
    try:
        found = read(data)
    except DecodeError:
        with pytest.raises(DecodeError):
            pb.UploadChunk.FromString(data)
    else:
        assert (found if isinstance(found, memoryview) else found.data) == pb.UploadChunk.FromString(data).data


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16383, 16384, CHUNK])
def test_lengths_of_all_sizes(size: int) -> None:
    assert write(memoryview(bytes(size))) == pb.UploadChunk(data=bytes(size)).SerializeToString()
    assert len(reader(pb.UploadChunk)(write(memoryview(bytes(size))))) == size  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------------- bounds


def test_a_full_spool_is_told_and_the_sites_go_on_once_there_is_room(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    served = serve(make_study("ab", deadline_minutes=0.5), spool_quota=10 * CHUNK)
    a, b = served.seat("a"), served.seat("b")
    ballast = served.coordinator._spool.folder / "ballast"
    ballast.write_bytes(bytes(9 * CHUNK))

    def make_room() -> None:
        while "takes nothing more at present: The coordinator's spool holds 0.009 GB" not in caplog.text:
            time.sleep(0.01)
        ballast.unlink()

    together(lambda: a.mean("r/model", LARGE, 1), lambda: b.mean("r/model", LARGE, 3), make_room)
    assert a.weights == {"a": 1, "b": 3}


def test_a_site_gives_up_on_a_full_spool_at_its_deadline(serve: Serve) -> None:
    served = serve(make_study("a", deadline_minutes=1 / 60), spool_quota=10 * CHUNK)
    (served.coordinator._spool.folder / "ballast").write_bytes(bytes(9 * CHUNK))
    with pytest.raises(UnreachableError, match=r"takes nothing more at present.*--spool-quota-gb"):
        served.seat("a").mean("r/model", LARGE, 1)


def test_a_payload_above_a_sites_share_or_above_the_first_ones_is_refused(serve: Serve) -> None:
    served = serve(make_study("a"), spool_quota=2 * CHUNK)
    seat = served.seat("a")
    with pytest.raises(RefusedError, match=r"more than its share of 0.002 GB.*larger --spool-quota-gb"):
        seat.mean("r0/model", LARGE, 1)
    seat.mean("r0/model", {"w": np.ones(10, np.float32)}, 1)
    with pytest.raises(RefusedError, match="differ from those of the first round: they have"):
        seat.mean("r1/model", {"w": np.ones(100, np.float32)}, 1)
    with pytest.raises(RefusedError, match="A sum takes"):
        seat._call(
            lambda: seat._stub.Offer(
                pb.OfferRequest(run=seat.run, key="r/s", site="a", verb="sum", weight=1, digest="0" * 32, size=2**40)
            )
        )


def test_uploads_of_one_site_at_a_time_are_few(serve: Serve) -> None:
    served = serve(make_study("ab"))
    a, b = served.seat("a"), served.seat("b")
    spool = served.coordinator._spool
    held = [spool.receive(upload_of(offer_of(a, LARGE, f"r{n}/model")[0]), 0) for n in range(2)]
    with held[0], held[1]:
        offer, outbound = offer_of(a, LARGE, "r2/model")
        with pytest.raises(grpc.RpcError) as refused:
            a._stub.Upload(outbound.messages(offer))
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        offer, outbound = offer_of(b, LARGE, "r2/model")
        assert b._stub.Upload(outbound.messages(offer)).verdict == "stands", "others are not held up"
    offer, outbound = offer_of(a, LARGE, "r2/model")
    assert a._stub.Upload(outbound.messages(offer)).verdict == "stands"


def test_a_full_disk_is_told(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve(make_study("a", deadline_minutes=1 / 60))
    seat = served.seat("a")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(round_closer, "write_result", full)
        with pytest.raises(UnreachableError, match="coordinator's disk is full"):
            seat.mean("r/model", LARGE, 1)
    assert seat.mean("r/model", LARGE, 1)["w"].tobytes() == LARGE["w"].tobytes()
    assert seat.bytes_sent == offer_of(seat, LARGE)[0].size, "what was accepted is not sent again"


# ------------------------------------------------------------------------------------------------------------ admission


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("wire_dtype", ["float32", "bfloat16"])
def test_numbers_that_are_not_finite_are_refused_with_their_tensor(serve: Serve, value: float, wire_dtype: str) -> None:
    """At the site, which sends nothing and tells why; and at the coordinator, should a site send it nevertheless."""
    served = serve(make_study("ab", wire_dtype=wire_dtype, min_sites=1))
    seat, other = served.seat("a"), served.seat("b")
    bad = {"good": np.float32([1]), "bad": np.full(3 * BLOCK, 1, np.float32)}
    bad["bad"][-1] = value
    with pytest.raises(NotFiniteError, match=r"Site 'a' has nothing to give to 'r/model'.*'bad' holds.*with --c"):
        seat.mean("r/model", bad, 1)
    with pytest.raises(NotFiniteError, match="tensor 'value' holds"):
        seat.sum("r/s", np.array([value]))
    assert seat.bytes_sent == 0
    assert other.mean("r/model", {"w": np.float32([1])}, 1)["w"] == 1, "nobody waits for it"
    there = set(spooled(served))
    seat._require_finite = lambda key, tensors: None  # type: ignore[method-assign]
    with pytest.raises(RefusedError, match="tensor 'bad' holds a number that is not finite"):
        seat.mean("s/raw", bad, 1)
    assert set(spooled(served)) <= there
    assert served.coordinator.status()["sites"]["a"]["standing"] == "absent"


def test_the_schema_of_the_first_round_holds_for_all(serve: Serve) -> None:
    seat = serve(make_study("a")).seat("a")
    seat.mean("start/model", {"w": np.float32([1, 2])}, 1)
    for other in ({"v": np.float32([1, 2])}, {"w": np.float32([[1, 2]])}, {"w": np.float16([1, 2])}):
        with pytest.raises(RefusedError, match="tensors of site 'a' for 'round-0005/model' differ"):
            seat.mean("round-0005/model", other, 1)
    seat.mean("round-0005/model", {"w": np.float32([3, 4])}, 1)
    seat.mean("round-0005/state", {"s": np.float64([3])}, 1)
    seat.sum("round-0005/model-sizes", np.array([1]))
    seat.sum("round-0006/model-sizes", np.array([1, 2]))


def test_an_update_that_is_too_large_is_quarantined_and_the_others_go_on(serve: Serve) -> None:
    study = make_study("abc", min_sites=2, max_update_norm=5.0)
    served = serve(study)
    seats = {site: served.seat(site) for site in "abc"}
    zero = {"w": np.zeros(100, np.float32)}

    def round_of(number: int, steps: dict[str, float]) -> dict[str, Any]:
        answers: dict[str, Any] = {}

        def take_part(site: str) -> None:
            try:
                step = {"w": zero["w"] + np.float32(number + steps[site])}
                answers[site] = seats[site].mean(f"round-{number:04d}/model", step, 1)["w"][0]
            except RefusedError as error:
                answers[site] = str(error)

        together(*(lambda site=site: take_part(site) for site in steps))
        return answers

    together(*(lambda seat=seat: seat.mean("start/model", zero, 1) for seat in seats.values()))
    assert round_of(0, {"a": 0.9, "b": 1.0, "c": 1.1}) == {site: np.float32(1) for site in "abc"}
    started = time.monotonic()
    answers = round_of(1, {"a": 1.0, "b": 50.0, "c": 1.0})
    assert time.monotonic() - started < 20, "nobody waits for the deadline"
    assert (answers["a"], answers["c"]) == (2, 2)
    assert answers["b"].startswith(
        "The update of site 'b' for 'round-0001/model' is quarantined: its norm 500 is above"
    )
    assert answers["b"].endswith(
        "raise max_update_norm in federation.toml, restart the coordinator, and continue with --c."
    )
    record = served.coordinator.status(record=True)
    assert ("b", answers["b"]) in [(event["site"], event["text"]) for event in record["events"]]
    (run,) = record["runs"].values()
    last = run["collectives"][-1]
    assert list(last["sites"]) == ["a", "c"]
    assert last["sites"]["a"]["norm"] == pytest.approx(10)
    assert round_of(2, {"a": 1.0, "b": 1.2, "c": 1.0})["b"] == pytest.approx(3.0667, abs=1e-3), "and it may come back"


def test_gathered_values_are_json(serve: Serve) -> None:
    served = serve(make_study("a"))
    seat = served.seat("a")
    for text in (b"NaN", b"[Infinity]", b"{", b"[" * 100_000, b"\xff"):
        digest, size = measure([text])
        offer = pb.OfferRequest(run=seat.run, key="r/g", site="a", verb="gather", weight=1, digest=digest, size=size)
        with pytest.raises(grpc.RpcError) as refused:
            seat._stub.Upload(iter([pb.UploadChunk(offer=offer), memoryview(text)]))
        assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert spooled(served) == []


# -------------------------------------------------------------------------------------------------------------- hostile

WORDS = st.text(max_size=20) | st.sampled_from(["a", "b", "mean", "training", "r/model", "../x", "r/" + "k" * 300])
SIZES = st.integers(0, 20) | st.integers(0, 2**64 - 1)
UINTS = st.integers(0, 2**32 - 1)
MESSAGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "Join": (pb.JoinRequest, {"protocol": st.just(2) | UINTS, "newest_protocol": UINTS, "fresh": st.booleans()}),
    "Offer": (pb.OfferRequest, {"weight": st.floats(), "size": SIZES, "position": SIZES}),
    "Newest": (pb.NewestRequest, {}),
    "Report": (pb.ReportRequest, {}),
    "Leave": (pb.LeaveRequest, {}),
    "Status": (pb.StatusRequest, {"newest_protocol": UINTS}),
}
RIGHT = {grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}


@given(data=st.data(), method=st.sampled_from([*MESSAGES, "Result", "Upload"]))
@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_nonsense_is_refused_and_changes_nothing(
    serve: Serve, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, method: str
) -> None:
    served, seat = hostile(serve, tmp_path_factory)
    before, code = state_of(served), grpc.StatusCode.NOT_FOUND
    try:
        if method == "Result":
            request = pb.ResultRequest(
                run=data.draw(WORDS), key=data.draw(WORDS), wait_seconds=data.draw(st.just(0.0) | st.just(np.nan)),
                position=data.draw(SIZES), digest=data.draw(WORDS),
            )  # fmt: skip
            list(seat._stub.Result(request, timeout=20))
        elif method == "Upload":
            offer = pb.OfferRequest(
                run=seat.run, key="r/model", site="a", verb=data.draw(st.sampled_from(["mean", "sum", "gather", ""])),
                weight=data.draw(st.floats(0, 2)), digest=data.draw(st.sampled_from(["0" * 32, "", "../" * 10])),
                size=data.draw(st.integers(0, 20)), position=data.draw(SIZES),
            )  # fmt: skip
            if offer.weight == 0:
                return  # a contribution
            stream = [pb.UploadChunk(offer=offer)] * data.draw(st.booleans())
            stream += [memoryview(piece) for piece in data.draw(st.lists(st.binary(max_size=20), max_size=3))]
            seat._stub.Upload(iter(stream), timeout=20)
        else:
            kind, special = MESSAGES[method]
            names = [field.name for field in kind.DESCRIPTOR.fields if field.name not in special]
            values: dict[str, Any] = {
                name: data.draw(WORDS) for name in names if name not in ("record", "held", "returns", "correct")
            }
            if "correct" in names:
                values["correct"] = data.draw(st.booleans())
            if "held" in names and data.draw(st.booleans()):
                values["held"] = pb.Held(key=data.draw(WORDS), digest=data.draw(WORDS))
            values.update({name: data.draw(strategy) for name, strategy in special.items()})
            getattr(seat._stub, method)(kind(**values), timeout=20)
    except grpc.RpcError as error:
        code = error.code()
    assert code in RIGHT | {grpc.StatusCode.DATA_LOSS, grpc.StatusCode.ABORTED}
    assert state_of(served) == before
    assert {path.suffix for path in spooled(served)} <= {PARTIAL}


def hostile(serve: Serve, paths: pytest.TempPathFactory, kept: dict[int, Any] = {}) -> tuple[Served, Any]:  # noqa: B006
    """One coordinator for all examples of a test."""
    if id(serve) not in kept:
        served = serve(make_study("a"), paths.mktemp("hostile"))
        kept[id(serve)] = served, served.seat("a")
    served, seat = kept[id(serve)]
    return served, seat


@given(serialized=st.binary(max_size=100), method=st.sampled_from([*MESSAGES, "Result", "Upload"]))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes_into_every_call(
    serve: Serve, tmp_path_factory: pytest.TempPathFactory, serialized: bytes, method: str
) -> None:
    served, _ = hostile(serve, tmp_path_factory)
    before, code = state_of(served), grpc.StatusCode.NOT_FOUND
    with grpc.insecure_channel(served.server.address) as channel:
        path = f"/nnunet_fed.v1.Coordinator/{method}"
        try:
            if method == "Upload":
                channel.stream_unary(path)(iter([serialized]), timeout=20)
            elif method == "Result":
                list(channel.unary_stream(path)(serialized, timeout=20))
            else:
                channel.unary_unary(path)(serialized, timeout=20)
        except grpc.RpcError as error:
            code = error.code()
    assert code in RIGHT | {grpc.StatusCode.INTERNAL}, code
    assert state_of(served) == before


def test_a_message_that_is_too_long_is_refused(serve: Serve) -> None:
    seat = serve(make_study("a")).seat("a")
    offer, _ = offer_of(seat, LARGE)
    with pytest.raises(grpc.RpcError) as refused:
        seat._stub.Upload(iter([pb.UploadChunk(offer=offer), memoryview(bytes(2 * CHUNK))]))
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


# ------------------------------------------------------------------------------------------------------------- survival


@pytest.mark.parametrize("damage", [b"", b"a part", None], ids=["empty", "partial", "missing"])
def test_a_result_that_did_not_reach_the_disk_is_made_again(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes | None
) -> None:
    """As after a machine stopped: the journal says closed, the payloads are there, the result is not whole."""
    first = serve(make_study("ab"))
    monkeypatch.setattr(first.coordinator._round_closer, "_settle", lambda collective, save: None)
    a, b = first.seat("a"), first.seat("b")
    other = {"w": LARGE["w"] * 2}
    result = together(lambda: a.mean("r/model", LARGE, 1), lambda: b.mean("r/model", other, 3))[0]
    first.stop()
    (file,) = (tmp_path / "state" / "results").iterdir()
    damaged(file, damage)
    second = serve(make_study("ab"))
    assert second.seat("a").fetch("r/model")["w"].tobytes() == result["w"].tobytes()  # type: ignore[index]
    assert spooled(second) == [], "once it is on disk, what it was made of is gone"


def damaged(path: Path, damage: bytes | None) -> None:
    path.write_bytes(damage) if damage is not None else path.unlink()


@pytest.mark.parametrize("damage", [b"", b"a part", None], ids=["empty", "partial", "missing"])
def test_a_contribution_that_did_not_reach_the_disk_is_sent_again(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, damage: bytes | None
) -> None:
    """As after a machine stopped: the journal has the contribution, and its bytes were in memory only."""
    monkeypatch.setattr(client, "LONG_POLL", 0.5)
    first = serve(make_study("ab"))
    a = first.seat("a")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(a.mean, "r/model", LARGE, 1)
        while not any("a" in collective["sites"] for collective in state_of(first)[0][0]):
            time.sleep(0.01)
        first.stop()
        (file,) = spooled(first)
        damaged(file, damage)
        second = serve(make_study("ab"), address=first.server.address)
        result = second.seat("b").mean("r/model", ZERO, 1)
        assert result["w"].tobytes() == waiting.result(60)["w"].tobytes() == (LARGE["w"] / 2).tobytes()
    assert a.bytes_sent == 2 * offer_of(a, LARGE)[0].size
    events = second.coordinator.status(record=True)["events"]
    assert [event["site"] for event in events if "gave to r/model was lost" in event["text"]] == ["a"]


def test_no_site_has_a_result_that_a_stopping_machine_can_take_back(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has closed the round, and stops before any of it is on its disk: the sites contribute once more."""
    monkeypatch.setattr(client, "LONG_POLL", 0.5)
    first, stopped = serve(make_study("ab")), threading.Event()

    def never(path: Path) -> None:
        stopped.wait(60)
        raise OSError(f"{path} is not on the disk")

    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(round_closer, "make_durable", never)
        a, b = first.seat("a"), first.seat("b")
        waiting = [pool.submit(a.mean, "r/model", LARGE, 1), pool.submit(b.mean, "r/model", ZERO, 1)]
        while not first.coordinator.tally().reductions:
            time.sleep(0.01)
        wait(waiting, 0.5)
        assert not any(future.done() for future in waiting), "the sites have the bytes, but not the word"
        stopped.set()
        first.stop()
        patch.undo()
        for file in [*spooled(first), *(tmp_path / "state" / "results").iterdir()]:
            file.write_bytes(b"")
        second = serve(make_study("ab"), address=first.server.address)
        results = [future.result(60)["w"].tobytes() for future in waiting]
    assert results == 2 * [(LARGE["w"] / 2).tobytes()]
    assert a.weights == {"a": 1, "b": 1}
    assert len(second.coordinator.status(record=True)["runs"][a.run]["collectives"]) == 1


def test_a_result_that_cannot_be_saved_now_is_saved_later(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve(make_study("a"))
    seat, tries = served.seat("a"), []

    def full_at_first(path: Path) -> None:
        tries.append(path)
        if len(tries) < 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(round_closer, "make_durable", full_at_first)
    assert seat.mean("r/model", LARGE, 1)["w"].tobytes() == LARGE["w"].tobytes()
    assert len(tries) == 3
    assert seat.bytes_sent == offer_of(seat, LARGE)[0].size, "what was accepted is not sent again"
    end = time.monotonic() + 10
    while spooled(served) and time.monotonic() < end:
        time.sleep(0.01)
    assert spooled(served) == []


def test_what_was_given_before_a_missed_deadline_outlives_a_restart(serve: Serve) -> None:
    first = serve(make_study("ab", deadline_minutes=1 / 60))
    with pytest.raises(DeadlineError):
        first.seat("a").mean("r/model", LARGE, 1)
    first.stop()
    second = serve(make_study("ab"))
    a, b = second.seat("a"), second.seat("b")
    result, _ = together(lambda: a.mean("r/model", LARGE, 1), lambda: b.mean("r/model", ZERO, 1))
    assert result["w"].tobytes() == (LARGE["w"] / 2).tobytes()  # type: ignore[index]


def test_a_stopping_coordinator_sends_away_who_waits(serve: Serve) -> None:
    served = serve(make_study("ab"))
    seat = served.seat("a")
    offer = pb.OfferRequest(run=seat.run, key="r/x", site="a", verb="mean", weight=0)
    seat._stub.Offer(offer)
    started = time.monotonic()
    waiting = seat._stub.Result(pb.ResultRequest(run=seat.run, key="r/x", site="a", wait_seconds=15))
    time.sleep(0.2)
    served.server.stop(15)
    assert next(waiting).header.status == "open"
    assert time.monotonic() - started < 10


def test_a_state_directory_of_another_format_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.transaction():
        store.set_fact("format", 1)
    store.close()
    with pytest.raises(ConfigurationError, match=r"has format 1, this version of nnunet_fed reads format 3"):
        Store(tmp_path)


def test_the_record_says_who_how_much_and_how_long(serve: Serve) -> None:
    served = serve(make_study("ab"))
    a, b = served.seat("a"), served.seat("b")
    together(lambda: a.mean("r/model", LARGE, 1), lambda: b.mean("r/model", LARGE, 3))
    (run,) = served.coordinator.status(record=True)["runs"].values()
    (collective,) = run["collectives"]
    assert {site: given["weight"] for site, given in collective["sites"].items()} == {"a": 1, "b": 3}
    assert all(given["bytes"] == collective["bytes"] for given in collective["sites"].values())
    assert all(0 < given["seconds"] < 60 for given in collective["sites"].values())
    assert 0 < collective["seconds"] < 60


def test_what_a_coordinator_does_not_need_is_swept_on_a_restart(serve: Serve) -> None:
    first = serve(make_study("ab"))
    a = first.seat("a")
    offer, outbound = offer_of(a, LARGE)
    assert a._stub.Upload(outbound.messages(offer)).verdict == "stands"
    (needed,) = spooled(first)
    first.stop()
    (needed.parent / "stray.0123abcd").write_bytes(b"a payload whose fact was not journalled")
    second = Coordinator(make_study("ab"), Store(needed.parents[1]))
    assert list(needed.parent.iterdir()) == [needed]
    second.close()
