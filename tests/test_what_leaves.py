"""What leaves a site is what ``outgoing.jsonl`` says, byte by byte, and holds no image, case name or path."""

from __future__ import annotations

import json
import logging
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from google.protobuf.message import DecodeError, Message
from planning_sites import SITE_A, SITE_B, few_samples, set_paths, write_dataset
from recording_proxy import RecordingProxy
from serving import Served, make_study, tensors_of, together
from workers import workers_as_threads

from nnunet_fed.exchange.outgoing_log import LARGEST_ARRAY, OutgoingLog
from nnunet_fed.exchange.payload import Array, encode
from nnunet_fed.planners.planning import agree
from nnunet_fed.preflight.site_checks import own_versions
from nnunet_fed.study.federation import canonical_json
from nnunet_fed.transport.proto import check_pb2, federation_pb2
from nnunet_fed.transport.site.client import GrpcCommunicator
from nnunet_fed.transport.site.connection_checks import Probe

Serve = Callable[..., Served]


# ------------------------------------------------------------------------------------------------ reading the wire


def frames(connection: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Type, flags, stream and content of the HTTP/2 frames that a client sent (RFC 9113, section 4.1)."""
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    assert connection.startswith(preface)
    rest = memoryview(connection)[len(preface) :]
    while rest:
        length = int.from_bytes(rest[:3], "big")
        kind, flags, stream = struct.unpack(">BBI", rest[3:9])
        yield kind, flags, stream & 0x7FFFFFFF, bytes(rest[9 : 9 + length])
        rest = rest[9 + length :]


def messages_sent(connection: bytes) -> tuple[list[list[bytes]], int]:
    """gRPC's messages by call, and the bytes of all headers."""
    data: dict[int, bytearray] = defaultdict(bytearray)
    headers = 0
    for kind, flags, stream, content in frames(connection):
        if kind == 0:
            assert not flags & 0x8, "no padding"
            data[stream] += content
        elif kind in (1, 9):
            headers += len(content)
    calls = []
    for stream in sorted(data):
        rest, messages = memoryview(data[stream]), []
        while rest:
            assert rest[0] == 0, "not compressed"
            length = int.from_bytes(rest[1:5], "big")
            messages.append(bytes(rest[5 : 5 + length]))
            rest = rest[5 + length :]
        calls.append(messages)
    return calls, headers


def texts(message: Message) -> set[str]:
    """All strings of a message."""
    found = set()
    for field, value in message.ListFields():
        if isinstance(value, str):
            found.add(value)
        assert not isinstance(value, bytes), field.name
    return found


# --------------------------------------------------------------------------- what the file says must be on the wire


def offer_of(entry: dict[str, Any], site: str) -> federation_pb2.OfferRequest:
    names = {"run": "run", "key": "key", "verb": "verb", "weight": "weight", "digest": "digest", "size": "bytes"}
    offer = federation_pb2.OfferRequest(site=site, **{field: entry[name] for field, name in names.items()})
    offer.correct = entry.get("correct", False)
    if "held" in entry:
        offer.held.key, offer.held.digest = entry["held"]["key"], entry["held"]["digest"]
    return offer


def payload_of(entry: dict[str, Any], tensors: dict[str, Array]) -> bytes:
    """The bytes that an upload must have by what the file says of them; only tensors' numbers are not in it."""
    if "tensors" in entry:
        listed = {name: tuple(described) for name, described in entry["tensors"].items()}
        kinds = {"float32": "F32", "float64": "F64"}
        assert {name: (kinds[str(a.dtype)], list(a.shape)) for name, a in tensors.items()} == listed
        return b"".join(encode(tensors))
    if "dtype" not in entry:
        return canonical_json(entry["value"])
    array = np.zeros(entry["shape"], entry["dtype"])
    if "value" in entry:
        array = np.array(entry["value"], entry["dtype"]).reshape(entry["shape"])
    for place, number in entry.get("nonzero", []):
        array.reshape(-1)[place] = number
    return b"".join(encode({"value": array}))


def is_call(messages: list[bytes], entry: dict[str, Any], site: str, tensors: dict[str, Array]) -> bool:
    """Whether a call on the wire is the one that a line of the file tells of."""
    what, pb = entry["what"], federation_pb2
    try:
        if what == "upload":
            first, *rest = (pb.UploadChunk.FromString(message) for message in messages)
            if first.offer != offer_of(entry, site):
                return False
            data = b"".join(chunk.data for chunk in rest)
            assert len(data) == entry["bytes"]
            assert data == payload_of(entry, tensors)
            return True
        if what == "noise":
            data = b"".join(check_pb2.Noise.FromString(message).data for message in messages)
            return len(data) == entry["bytes"]
        expected: Message
        if what == "offer":
            expected = offer_of(entry, site)
        elif what == "introduce":
            names = ("site", "protocol", "newest_protocol", "versions")
            expected = check_pb2.IntroduceRequest(**{name: entry[name] for name in names})
        elif what == "join":
            given = {name: value for name, value in entry.items() if name not in ("at", "to", "what")}
            expected = pb.JoinRequest(**given)
        elif what == "report":
            expected = pb.ReportRequest(run=entry["run"], site=site, progress=json.dumps(entry["progress"]))
        elif what == "note":
            expected = pb.ReportRequest(run=entry["run"], site=site, note=entry["text"])
        else:
            assert what == "leave"
            expected = pb.LeaveRequest(run=entry["run"], site=site, reason=entry["reason"])
        return len(messages) == 1 and type(expected).FromString(messages[0]) == expected
    except (DecodeError, ValueError):
        return False


def test_the_file_tells_every_byte_on_the_wire(serve: Serve, tmp_path: Path) -> None:
    served = serve(make_study("ab"))
    proxy = RecordingProxy(served.server.address)
    file, tensors = tmp_path / "outgoing.jsonl", tensors_of("a")
    settings = served.settings("a", coordinator=proxy.address)
    a, b = GrpcCommunicator(settings, outgoing=OutgoingLog(file)), served.seat("b")

    def talk(seat: GrpcCommunicator) -> None:
        seat.mean("round-0000/model", tensors_of(seat.site), 3)
        seat.sum("round-0000/few", np.arange(5) - 2)
        seat.sum("round-0000/sparse", np.eye(1, 3 * LARGEST_ARRAY, 7, dtype=np.int64).reshape(3, LARGEST_ARRAY))
        seat.gather("round-0000/values", {"Zürich": [1.5, None, "x" * 300]})

    with closing(Probe(settings, OutgoingLog(file))) as probe:
        probe.introduce(own_versions())
        probe.time_transfer(300_000, None)
    a.join("training", served.study.digest, "3d_fullres", "T")
    together(lambda: talk(a), lambda: talk(b))
    a.status()
    a.newest("model")
    a.report({"phase": "training", "loss": 0.25}, wait=True)
    a.note("noted")
    a.leave("done")
    a.close()
    proxy.close()

    calls, headers = [], 0
    for connection in proxy.connections:
        found, more = messages_sent(bytes(connection))
        calls, headers = calls + found, headers + more
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {line["to"] for line in lines} == {proxy.address}
    whats = [line["what"] for line in lines]
    assert whats[:3] == ["introduce", "noise", "join"]
    assert (whats.count("offer"), whats.count("upload")) == (4, 4)
    for line in lines:
        if line["what"] == "offer":  # also stands at an upload's head
            matching = [call for call in calls if len(call) == 1 and is_call(call, line, "a", tensors)]
        else:
            matching = [call for call in calls if is_call(call, line, "a", tensors)]
        assert matching, f"on the wire there is no {line}"
        calls.remove(matching[0])

    # what is left are questions, which hold nothing but names that the file knows
    known = {"a", a.run, "model", *(line["key"] for line in lines if "key" in line)}
    known |= {collective["digest"] for run in served.coordinator.status(record=True)["runs"].values()
              for collective in run["collectives"]}  # fmt: skip
    questions = (
        federation_pb2.ResultRequest,
        federation_pb2.NewestRequest,
        federation_pb2.StatusRequest,
        check_pb2.NoiseRequest,
    )
    for call in calls:
        [message] = call
        assert len(message) < 300
        assert any(_asks(kind, message, known) for kind in questions), message
    assert headers < 150 * (len(lines) + len(calls)), "the headers have no room for more than gRPC's own"


def _asks(kind: type[Message], message: bytes, known: set[str]) -> bool:
    try:
        question = kind.FromString(message)
    except DecodeError:
        return False
    question.DiscardUnknownFields()  # lest another message passes for a question
    return question.SerializeToString() == message and texts(question) <= known


# ------------------------------------------------------------------------------------- what must never be on the wire


def markers_of(folder: Path) -> set[bytes]:
    """Rows of voxels of all images of a data set, as they would stand in memory, a file or JSON."""
    found = set()
    for path in folder.glob("imagesTr/*.nii.gz"):
        image = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        for row in image.reshape(-1, image.shape[-1])[::41, :4]:
            if len(set(row)) == len(row):  # not the empty part
                found |= {np.asarray(row, kind).tobytes() for kind in (np.float32, np.float64)}
                found.add(json.dumps([float(value) for value in row])[1:-1].encode())
    return found


MODEL = np.linspace(0, 1, 1000, dtype=np.float32)


def stored(folder: Path) -> bytes:
    return b"\0".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_no_image_no_case_name_and_no_path_leaves_a_site(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    few_samples(monkeypatch)
    workers_as_threads(monkeypatch)
    raw = set_paths(monkeypatch, tmp_path)
    caplog.set_level(logging.DEBUG)
    folders = {"a": write_dataset(raw, SITE_A, (417, 418)), "b": write_dataset(raw, SITE_B, (419, 421))}
    served = serve(make_study("ab", planner="nnUNetPlannerFedSmall"), tmp_path / "coordinator")
    proxy = RecordingProxy(served.server.address)
    seats = {}
    for site in folders:
        seat = GrpcCommunicator(
            served.settings(site, coordinator=proxy.address), outgoing=OutgoingLog(tmp_path / f"{site}.jsonl")
        )
        seat.join("planning")
        seats[site] = seat

    def plan_and_train(site: str, number: int) -> None:
        seat = seats[site]
        agree(seat, served.study, number, 1, lambda phase: seat.report({"phase": phase}, wait=True))
        seat.join("training", served.study.digest, "3d_fullres", "T")
        seat.mean("round-0000/model", {"w": MODEL * ord(site)}, 1)
        seat.leave("done")
        seat.close()

    together(lambda: plan_and_train("a", SITE_A), lambda: plan_and_train("b", SITE_B))
    state = stored(tmp_path / "coordinator")
    status = json.dumps(served.coordinator.status(record=True)).encode()
    log = "\n".join(
        record.getMessage() for record in caplog.records if record.name.startswith("nnunet_fed.coord")
    ).encode()
    listed = b"".join((tmp_path / f"{site}.jsonl").read_bytes() for site in folders)
    everything = {
        "sent": proxy.sent, "received": bytes(proxy.received), "state": state, "status": status, "log": log,
        "outgoing.jsonl": listed,
    }  # fmt: skip
    proxy.close()

    markers = markers_of(folders["a"]) | markers_of(folders["b"])
    assert len(markers) > 200
    names = [case for folder in folders.values() for case in cases_of(folder)]
    assert len(names) == 4
    secrets = {str(tmp_path).encode(), b"Dataset0", b".nii", *(name.encode() for name in names), *markers}
    for place, content in everything.items():
        assert not {secret for secret in secrets if secret in content}, place

    # the search finds what is there: the channels' names, which the sites compare, and a model's numbers
    assert b'"CT"' in everything["sent"]
    assert (MODEL * ord("a")).tobytes() in everything["sent"]
    assert b"planning/dataset" in everything["log"]
    assert b"planning/dataset" in everything["state"]
    image = sitk.GetArrayFromImage(sitk.ReadImage(str(next(folders["a"].glob("imagesTr/*.nii.gz")))))
    assert any(marker in image.tobytes() for marker in markers)


def cases_of(folder: Path) -> set[str]:
    return {path.name.removesuffix(".nii.gz") for path in folder.glob("labelsTr/*")}
