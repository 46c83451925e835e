"""Models from peer to peer: invariants 23 to 27, 30 and 31 of GCML's notes, on real gRPC over loopback."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hostile_callers import Held
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ipv6 import needs_ipv6
from recording_proxy import RecordingProxy

from nnunet_fed.certificates.authority import Authority
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.exchange.payload import CHUNK, Tensors, encode, measure, open_payload
from nnunet_fed.files import PARTIAL
from nnunet_fed.gossip import mailbox as mailbox_module
from nnunet_fed.gossip.mailbox import Letter, Mailbox, State, described
from nnunet_fed.gossip.schedule import Schedule, Version
from nnunet_fed.study.address import Address
from nnunet_fed.study.site import Site
from nnunet_fed.study.toml import to_toml
from nnunet_fed.transport.channel import zero_copy_streams
from nnunet_fed.transport.channel.rate_limit import RateLimit
from nnunet_fed.transport.channel.tls import open_channel
from nnunet_fed.transport.channel.zero_copy_streams import PeerStub
from nnunet_fed.transport.peers import peer, peer_client, stalled_transfers
from nnunet_fed.transport.peers.model_message import message_of
from nnunet_fed.transport.peers.peer import PeerProcess
from nnunet_fed.transport.proto import federation_pb2 as pb

RUN = "0123456789abcdef" * 4
TENSORS = {"w": np.random.default_rng(0).normal(size=CHUNK // 2).astype(np.float32), "b": np.ones(5, np.float32)}


def until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Wait for something to become true; what it is then."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)
    return found


def free_addresses(number: int, host: str = "127.0.0.1") -> list[str]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sockets = [socket.socket(family) for _ in range(number)]
    for one in sockets:
        one.bind((host, 0))
    addresses = [str(Address(host, one.getsockname()[1])) for one in sockets]
    for one in sockets:
        one.close()
    return addresses


class Peers:
    """Sites with mailboxes; each can have a peer process in a thread."""

    def __init__(
        self, folder: Path, stack: ExitStack, sites: str = "abc", authority: Authority | None = None,
        host: str = "127.0.0.1",
    ):  # fmt: skip
        self.folder = folder
        self.addresses = dict(zip(sites, free_addresses(len(sites), host), strict=True))
        self.mailboxes = {site: Mailbox(folder / site) for site in sites}
        self.authority = authority
        self._stack = stack
        for site in sites:
            self.publish(site)

    def settings(self, site: str, **changes: Any) -> Site:
        keys: dict[str, Any] = {"insecure": True}
        if self.authority is not None:
            files = self.authority.folder / "sites" / site
            keys = {name: files / f"{stem}.pem" for name, stem in [("certificate", "certificate"), ("key", "key")]}
            keys |= {"ca": files / "ca.pem", "revoked": self.authority.folder / "revoked.txt"}
        given = {"coordinator": "127.0.0.1:9", "listen": self.addresses[site], "peers": self.addresses, **keys}
        return Site.model_validate({"name": site, **given, **changes})

    def file(self, site: str) -> Path:
        path = self.folder / f"{site}.toml"
        values = {name: str(v) if isinstance(v, Path) else v for name, v in self.settings(site) if v is not None}
        path.write_text(to_toml(values))
        return path

    def state(self, site: str, **changes: Any) -> State:
        schema, size = described(TENSORS)
        return replace(State(RUN, Version(site, {}, 0), {}, 10, "i", schema, size), **changes)

    def publish(self, site: str, **changes: Any) -> None:
        self.mailboxes[site].publish_state(self.state(site, **changes))

    def start(self, *sites: str, listen: str | None = None, **options: Any) -> PeerProcess:
        changes = {} if listen is None else {"listen": listen}
        for site in sites:
            process = PeerProcess(self.settings(site, **changes), self.mailboxes[site], **options)
            thread = threading.Thread(target=process.run)
            thread.start()
            self._stack.callback(thread.join)
            self._stack.callback(process.stop)
        return process

    def post(self, site: str, counter: int, *candidates: str, tensors: Tensors = TENSORS, run: str = RUN) -> Letter:
        version = Version(site, {site: counter}, counter)
        facts: dict[str, Any] = {"training_cases": 10, "initial": "i"}
        mailbox = self.mailboxes[site]
        return mailbox.post(run=run, version=version, tensors=tensors, candidates=candidates, **facts)

    def is_served(self, site: str) -> bool:
        found = self.mailboxes[site].outgoing()
        return found is not None and found[2] == ()

    def files(self, site: str) -> list[str]:
        """What the peer process of a site has let in, whole or not."""
        folders = [self.folder / site / name for name in ("inbox", "arriving", "used")]
        return sorted(str(path) for folder in folders for path in folder.rglob("*") if path.is_file())

    def stub(self, caller: str, callee: str) -> PeerStub:
        channel = open_channel(self.settings(caller), callee)
        self._stack.callback(channel.close)
        return PeerStub(channel)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def peers(tmp_path: Path, stack: ExitStack) -> Peers:
    return Peers(tmp_path, stack)


def letter_to(site: str, tensors: Tensors = TENSORS, counter: int = 1, **changes: Any) -> pb.Model:
    """What a site ``site`` describes its model by."""
    digest, size = measure(encode(tensors))
    letter = Letter(RUN, Version(site, {site: counter}, 1), 10, "i", described(tensors)[0], digest, size)
    model = message_of(letter)
    model.MergeFrom(pb.Model(**changes))
    return model


def pushed(stub: PeerStub, model: pb.Model, payload: bytes) -> pb.PeerReply:
    pieces = [memoryview(payload)[start : start + CHUNK] for start in range(0, len(payload), CHUNK)]
    return stub.Push(iter([pb.ModelChunk(model=model), *pieces]), timeout=20)  # type: ignore[no-any-return]


def bytes_of(tensors: Tensors) -> bytes:
    return b"".join(encode(tensors))


# ----------------------------------------------------------------------------------------------------------- exchanging


@pytest.mark.parametrize("mode", ["push", "pull"])
def test_23_a_model_arrives_bit_for_bit_and_only_once(peers: Peers, mode: Any) -> None:
    giver, taker = ("a", "b") if mode == "push" else ("b", "a")
    peers.start("a", "b", mode=mode)
    letters_of = {site: peers.post(site, 1, *("b" if site == "a" else "")) for site in "ba"}
    found = until(peers.mailboxes[taker].deliveries)
    assert found == {giver: letters_of[giver]}
    letter, path = peers.mailboxes[taker].take(giver)
    for name, array in open_payload(path).items():
        assert array.tobytes() == TENSORS[name].tobytes()
    until(lambda: peers.is_served("a"))
    peers.post("a", 2, "b")
    if mode == "pull":
        until(lambda: [e for e in peers.mailboxes["a"].history() if e.get("verdict") == "nothing"])
        assert peers.mailboxes[taker].deliveries() == {}
    else:
        assert until(peers.mailboxes["b"].deliveries)["a"].version.counter == 2
    until(lambda: peers.is_served("a"))
    (received, *_) = [e for e in peers.mailboxes[taker].history() if e["event"] == "received"]
    (sent, *_) = [e for e in peers.mailboxes[giver].history() if e["event"] == "sent"]
    for entry, other in ((received, giver), (sent, taker)):
        assert (entry["peer"], entry["site"], entry["counter"], entry["bytes"]) == (other, giver, 1, letter.size)


def test_peers_learn_who_takes_part_and_who_leaves(peers: Peers) -> None:
    peers.publish("b", training_cases=7)
    peers.start("a")
    process = peers.start("b")
    assert until(peers.mailboxes["a"].members) == {"b": 7}
    assert until(peers.mailboxes["b"].members) == {"a": 10}
    peers.publish("b", leaving=True)
    process.stop()
    until(lambda: peers.mailboxes["a"].members() == {})


def test_the_newest_model_of_a_peer_takes_the_place_of_older_ones(peers: Peers) -> None:
    peers.start("a", "b")
    for counter in (1, 2, 3):
        peers.post("a", counter, "b")
        until(lambda: peers.is_served("a"))
    (letter,) = peers.mailboxes["b"].deliveries().values()
    assert letter.version.counter == 3
    assert len(peers.files("b")) == 2


def test_25_a_dead_peer_costs_a_line_and_the_next_candidate_gets_the_model(
    peers: Peers, caplog: pytest.LogCaptureFixture
) -> None:
    peers.start("a", "b")
    peers.post("a", 1, "c", "b")
    assert until(peers.mailboxes["b"].deliveries).keys() == {"a"}
    until(lambda: peers.is_served("a"))
    assert peers.mailboxes["a"].contacts() == {"c": 1}
    assert "no exchange with site 'c'" in caplog.text
    peers.post("a", 2, "c")
    until(lambda: peers.is_served("a"))
    assert peers.mailboxes["a"].contacts() == {"c": 2}
    peers.start("c")
    peers.post("a", 3, "c")
    until(peers.mailboxes["c"].deliveries)
    until(lambda: peers.mailboxes["a"].contacts() == {})


def test_a_peer_that_takes_the_call_and_says_nothing_costs_the_deadline_of_an_offer(
    peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_client, "OFFER_SECONDS", 0.5)
    host, _, port = peers.addresses["c"].partition(":")
    with socket.create_server((host, int(port))):
        peers.start("a", "b")
        peers.post("a", 1, "c", "b")
        assert until(peers.mailboxes["b"].deliveries).keys() == {"a"}
        assert peers.mailboxes["a"].contacts() == {"c": 1}


def test_no_more_than_max_tries_for_one_model(peers: Peers) -> None:
    peers.start("a", max_tries=1)
    peers.post("a", 1, "c", "b")
    until(lambda: peers.is_served("a"))
    assert peers.mailboxes["a"].contacts() == {"c": 1}


def test_everything_that_leaves_is_listed_before(peers: Peers) -> None:
    peers.start("a", "b")
    letter = peers.post("a", 1, "b")
    until(peers.mailboxes["b"].deliveries)
    lines = [json.loads(line) for line in (peers.folder / "a" / "outgoing.jsonl").read_text().splitlines()]
    offer, upload = (line for line in lines if line["what"] in ("offer", "upload"))
    assert offer["to"] == upload["to"] == f"b at {peers.addresses['b']}"
    assert offer["digest"] == upload["digest"] == letter.digest
    assert upload["tensors"] == {name: ["F32", list(array.shape)] for name, array in TENSORS.items()}
    assert {line["what"] for line in lines} == {"info", "offer", "upload"}


# ------------------------------------------------------------------------------------------------------- not exchanging


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"busy": True}, "busy"),
        ({"leaving": True}, "leaving"),
        ({"received": {"a": 1}}, "replay"),
        ({"version": Version("b", {}, 50), "max_epoch_distance": 9}, "stale"),
        ({"run": "f" * 64}, "incompatible"),
        ({"schema": "f" * 64}, "incompatible"),
        ({"size": 100}, "incompatible"),
    ],
)
def test_26_an_unwanted_model_is_declined_before_a_byte_of_it_is_sent(
    peers: Peers, changes: dict[str, Any], verdict: str
) -> None:
    peers.publish("b", **changes)
    peers.start("a", "b")
    peers.post("a", 1, "b")
    until(lambda: peers.is_served("a"))
    assert peers.files("b") == []
    (entry,) = [e for e in peers.mailboxes["a"].history() if e["event"] == "declined"]
    assert (entry["verdict"], entry["bytes"], entry["peer"]) == (verdict, 0, "b")
    assert ("reason" in entry) == (verdict == "incompatible")
    assert peers.mailboxes["b"].history()[0]["verdict"] == verdict
    assert peers.mailboxes["a"].contacts() == {}
    upload = [line for line in (peers.folder / "a" / "outgoing.jsonl").read_text().splitlines() if "upload" in line]
    assert upload == []


def test_a_peer_that_tells_nonsense_of_itself_is_no_member(peers: Peers) -> None:
    peers.start("b")
    stub = peers.stub("a", "b")
    for info in (pb.PeerInfo(training_cases=0), pb.PeerInfo(training_cases=2**63), pb.PeerInfo(training_cases=3)):
        info.site, info.run = "a", "other" if info.training_cases == 3 else RUN
        assert stub.Info(info).training_cases == 10
        assert peers.mailboxes["b"].members() == {}


def test_before_the_training_has_said_who_it_is_everything_is_declined(peers: Peers) -> None:
    (peers.folder / "b" / "state.json").unlink()
    peers.start("b")
    assert peers.stub("a", "b").Offer(letter_to("a")).verdict == "busy"


def test_26_a_replay_is_recognised_whether_it_waits_or_was_taken_or_used(peers: Peers) -> None:
    peers.start("b")
    stub, payload, mailbox = peers.stub("a", "b"), bytes_of(TENSORS), peers.mailboxes["b"]
    assert pushed(stub, letter_to("a", counter=5), payload).verdict == "accept"
    assert stub.Offer(letter_to("a", counter=5)).verdict == "replay"
    mailbox.take("a")
    assert pushed(stub, letter_to("a", counter=4), payload).verdict == "replay"
    peers.publish("b", received={"a": 5})
    mailbox.discard_taken()
    assert stub.Offer(letter_to("a", counter=5)).verdict == "replay"
    assert stub.Offer(letter_to("a", counter=6)).verdict == "accept"


def damaged(payload: bytes) -> bytes:
    return payload[:-1] + bytes([payload[-1] ^ 1])


NAN = {**TENSORS, "b": np.array([1, 2, np.nan, 4, 5], np.float32)}
RENAMED = {"w": TENSORS["w"], "c": TENSORS["b"]}  # of the same size
HOSTILE: list[tuple[str, pb.Model, bytes, grpc.StatusCode]] = [
    ("damaged", letter_to("a"), damaged(bytes_of(TENSORS)), grpc.StatusCode.DATA_LOSS),
    ("truncated", letter_to("a"), bytes_of(TENSORS)[:-9], grpc.StatusCode.DATA_LOSS),
    ("oversize", letter_to("a"), bytes_of(TENSORS) + b"1", grpc.StatusCode.DATA_LOSS),
    ("not finite", letter_to("a", NAN), bytes_of(NAN), grpc.StatusCode.FAILED_PRECONDITION),
    (
        "other tensors than described",
        letter_to("a", RENAMED, schema=described(TENSORS)[0]),
        bytes_of(RENAMED),
        grpc.StatusCode.FAILED_PRECONDITION,
    ),
    ("a path", letter_to("a", digest="../../../../../etc/passwd"), b"", grpc.StatusCode.FAILED_PRECONDITION),
    ("a stranger's influence", letter_to("a", vector={"z": 1}), b"", grpc.StatusCode.FAILED_PRECONDITION),
    ("a counter of 64 bits", letter_to("a", counter=2**63), b"", grpc.StatusCode.FAILED_PRECONDITION),
    ("in nobody's name", letter_to("nobody"), b"", grpc.StatusCode.PERMISSION_DENIED),
    ("in its own name", letter_to("b"), b"", grpc.StatusCode.PERMISSION_DENIED),
    ("from a byte that is not there", letter_to("a", position=7), b"", grpc.StatusCode.ABORTED),
]


@pytest.mark.parametrize(
    ("model", "payload", "code"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE]
)
def test_23_what_is_no_good_is_refused_and_the_inbox_is_as_before(
    peers: Peers, model: pb.Model, payload: bytes, code: grpc.StatusCode
) -> None:
    peers.start("b")
    stub = peers.stub("a", "b")
    pushed(stub, letter_to("c"), bytes_of(TENSORS))
    before = peers.files("b")
    with pytest.raises(grpc.RpcError) as refused:
        pushed(stub, model, payload)
    assert refused.value.code() == code
    assert [path for path in peers.files("b") if PARTIAL not in path] == before
    assert pushed(stub, letter_to("a", counter=2), bytes_of(TENSORS)).verdict == "accept"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(method=st.sampled_from(["Info", "Offer", "Push", "Pull"]), messages=st.lists(st.binary(max_size=80), max_size=3))
def test_nonsense_changes_nothing(peers: Peers, method: str, messages: list[bytes]) -> None:
    if peers.files("b") == [] and not (peers.folder / "b" / "contacts.json").exists():
        peers.start("b")
    # of its own: grpcio never ends a stream whose message it could not read, and a connection has few
    own_connection = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(peers.addresses["b"], options=own_connection) as channel:
        call = channel.stream_stream(f"/nnunet_fed.v1.Peer/{method}")(iter(messages), timeout=10)
        with pytest.raises(grpc.RpcError) as refused:
            list(call)
    assert refused.value.code() in {
        grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNKNOWN,
    }  # fmt: skip
    assert peers.files("b") == []
    assert peers.mailboxes["b"].members() == {}
    assert peers.stub("a", "b").Offer(letter_to("a")).verdict == "accept"


def test_a_push_that_does_not_begin_with_a_model(peers: Peers) -> None:
    peers.start("b")
    for messages in ([], [memoryview(b"data")], [pb.ModelChunk()]):
        with pytest.raises(grpc.RpcError) as refused:
            peers.stub("a", "b").Push(iter(messages), timeout=20)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_in_lockstep_a_model_from_the_future_and_one_for_a_site_that_is_away_are_tried_until_they_arrive(
    peers: Peers,
) -> None:
    for site in "abc":
        peers.publish(site, lockstep=True, version=Version(site, {}, 3))
    peers.start("a", "b", max_tries=1)
    peers.post("a", 4, "b")
    until(lambda: [entry for entry in peers.mailboxes["b"].history() if entry.get("verdict") == "early"])
    assert not peers.is_served("a")
    assert peers.mailboxes["b"].deliveries() == {}
    peers.publish("b", lockstep=True, version=Version("b", {}, 4))
    assert until(peers.mailboxes["b"].deliveries)["a"].version.counter == 4
    until(lambda: peers.is_served("a"))
    peers.post("b", 1, "c")
    until(lambda: peers.mailboxes["b"].contacts().get("c", 0) > 1)
    assert not peers.is_served("b")
    peers.start("c")
    assert until(peers.mailboxes["c"].deliveries).keys() == {"b"}


def test_a_site_has_one_model_under_way_and_all_have_two(peers: Peers) -> None:
    """And the same model may go on through another connection."""
    peers.start("b")
    stub, blocked, begun = peers.stub("a", "b"), threading.Event(), threading.Barrier(3)
    payload = memoryview(bytes_of(TENSORS))

    def slow(model: pb.Model) -> Iterator[pb.ModelChunk | memoryview]:
        yield pb.ModelChunk(model=model)
        yield payload[:CHUNK]
        begun.wait(10)
        blocked.wait(10)
        yield payload[CHUNK : 2 * CHUNK]
        yield payload[2 * CHUNK :]

    calls = [stub.Push.future(slow(letter_to(site))) for site in "ac"]
    begun.wait(10)
    until(lambda: len(peers.files("b")) == 2)
    other = letter_to("a", {**TENSORS, "b": TENSORS["b"] + 1}, counter=2)
    assert stub.Offer(other).verdict == "busy"
    again = until(lambda: (reply := stub.Offer(letter_to("a"))).position and reply)
    assert (again.verdict, again.position) == ("accept", CHUNK)
    blocked.set()
    assert [call.result().verdict for call in calls] == ["accept"] * 2
    assert peers.mailboxes["b"].deliveries().keys() == {"a", "c"}


def test_a_broken_push_goes_on_where_it_was(peers: Peers) -> None:
    peers.start("b")
    model, payload = letter_to("a"), memoryview(bytes_of(TENSORS))

    def broken() -> Iterator[pb.ModelChunk | memoryview]:
        yield pb.ModelChunk(model=model)
        yield payload[:CHUNK]
        until(lambda: [path for path in peers.files("b") if Path(path).stat().st_size == CHUNK])
        raise ConnectionError

    with pytest.raises(grpc.RpcError):
        peers.stub("a", "b").Push(broken())
    peers.start("a")
    peers.post("a", 1, "b")
    until(peers.mailboxes["b"].deliveries)
    (sent,) = until(lambda: [e for e in peers.mailboxes["a"].history() if e["event"] == "sent"])
    assert sent["bytes"] == model.size - CHUNK


def test_a_broken_pull_goes_on_where_it_was(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    pull, broken = peer._Service.Pull, threading.Event()

    def breaking(service: Any, request: pb.PullRequest, context: grpc.ServicerContext) -> Iterator[Any]:
        for number, message in enumerate(pull(service, request, context)):
            if number == 2 and not broken.is_set():
                broken.set()
                until(lambda: [path for path in peers.files("a") if Path(path).stat().st_size == CHUNK])
                context.abort(grpc.StatusCode.UNAVAILABLE, "away")
            yield message

    monkeypatch.setattr(peer._Service, "Pull", breaking)
    peers.start("a", "b", mode="pull")
    letter = peers.post("b", 1)
    peers.post("a", 1, "b")
    assert until(peers.mailboxes["a"].deliveries) == {"b": letter}
    (received,) = until(lambda: [entry for entry in peers.mailboxes["a"].history() if entry["event"] == "received"])
    assert received["bytes"] == letter.size - CHUNK
    asked = [json.loads(line) for line in (peers.folder / "a" / "outgoing.jsonl").read_text().splitlines()]
    assert [line.get("from_byte") for line in asked if line["what"] == "ask"] == [None, CHUNK]
    given = [json.loads(line) for line in (peers.folder / "b" / "outgoing.jsonl").read_text().splitlines()]
    assert [line.get("from_byte") for line in given if line["what"] == "upload"] == [None, CHUNK]


@pytest.mark.parametrize("mode", ["push", "pull"])
def test_every_byte_of_a_model_counts_for_the_pace_at_both_ends(
    peers: Peers, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    passed: list[int] = []
    monkeypatch.setattr(RateLimit, "passed", lambda limit, number: passed.append(number))
    peers.start("a", "b", mode=mode)
    letter = peers.post("b", 1)
    peers.post("a", 1, "b")
    until(peers.mailboxes["b" if mode == "push" else "a"].deliveries)
    until(lambda: sum(passed) == 2 * letter.size)
    assert max(passed) == CHUNK


class Clock(threading.Event):
    """Whoever waits for it moves it on."""

    now = 100.0

    def wait(self, timeout: float | None = None) -> bool:
        self.now += timeout or 0
        return False


def test_a_pace_is_kept_in_the_long_run_and_idle_time_is_not_saved_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("nnunet_fed.transport.channel.rate_limit.time.monotonic", lambda: clock.now)
    limit = RateLimit(2.0, clock)
    for _ in range(10):
        limit.passed(10**6)
    assert clock.now == pytest.approx(105)
    clock.now = 200.0
    limit.passed(10**6)
    assert clock.now == pytest.approx(200.5)
    RateLimit(None, clock).passed(10**9)
    assert clock.now == pytest.approx(200.5)


def test_a_transfer_that_stalls_is_given_up(
    peers: Peers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stalled_transfers.given_up_if_stalled.__wrapped__, "__defaults__", (0.3, lambda: False))
    peers.start("b")
    released = threading.Event()

    def stalled() -> Iterator[pb.ModelChunk]:
        yield pb.ModelChunk(model=letter_to("a"))
        released.wait(20)

    try:
        with pytest.raises(grpc.RpcError):
            peers.stub("a", "b").Push(stalled())
    finally:
        released.set()
    # grpc tells a cancelled stream's reader of an error or of an end, as it comes
    until(lambda: "broke off while it sent" in caplog.text or "did not arrive as it was offered" in caplog.text)
    assert pushed(peers.stub("a", "b"), letter_to("a", counter=2), bytes_of(TENSORS)).verdict == "accept"


def test_a_full_disk_is_told_to_the_sender_and_leaves_no_trace(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    flush = mailbox_module.flush

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    peers.start("a", "b")
    monkeypatch.setattr(mailbox_module, "flush", full)
    peers.post("a", 1, "b")
    until(lambda: peers.is_served("a"))
    (entry,) = [e for e in peers.mailboxes["a"].history() if e["event"] == "declined"]
    assert "The disk of site 'b' is full" in entry["reason"]
    assert peers.files("b") == []
    assert peers.mailboxes["a"].contacts() == {}
    monkeypatch.setattr(mailbox_module, "flush", flush)
    peers.post("a", 2, "b")
    assert until(peers.mailboxes["b"].deliveries).keys() == {"a"}


# ------------------------------------------------------------------------------------------------------------------ TLS


@pytest.fixture
def secured(tmp_path: Path, stack: ExitStack) -> Peers:
    authority = Authority.create(tmp_path / "authority", "study")
    for site in "abcd":
        authority.site(site, ["127.0.0.1"])
    return Peers(tmp_path, stack, "abc", authority)


def code_of(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as refused:
        call()
    return refused.value.code(), str(refused.value.details())


def test_peers_are_who_their_certificates_say(secured: Peers) -> None:
    assert secured.authority is not None
    secured.start("a", "b")
    secured.post("a", 1, "b")
    assert until(secured.mailboxes["b"].deliveries).keys() == {"a"}
    stub = secured.stub("a", "b")
    for message in (lambda: stub.Offer(letter_to("c")), lambda: pushed(stub, letter_to("c"), bytes_of(TENSORS))):
        code, text = code_of(message)
        assert code == grpc.StatusCode.PERMISSION_DENIED
        assert "The certificate is of 'a', the message says 'c'" in text
    own, files = secured.settings("a"), secured.authority.folder / "sites" / "d"
    stranger = own.model_copy(update={"certificate": files / "certificate.pem", "key": files / "key.pem"})
    with open_channel(stranger, "b") as channel:
        code, text = code_of(lambda: PeerStub(channel).Info(pb.PeerInfo(site="a")))
    assert (code, "'d' is not among the peers of site 'b'" in text) == (grpc.StatusCode.PERMISSION_DENIED, True)
    plain = secured.settings("a").model_copy(update={"insecure": True})
    with open_channel(plain, "b") as channel:
        assert code_of(lambda: PeerStub(channel).Info(pb.PeerInfo(site="a")))[0] == grpc.StatusCode.UNAVAILABLE
    secured.authority.revoke("a")
    assert "has been revoked" in code_of(lambda: stub.Offer(letter_to("a", counter=9)))[1]
    assert secured.mailboxes["b"].deliveries().keys() == {"a"}


@needs_ipv6
@pytest.mark.parametrize("mode", ["push", "pull"])
@pytest.mark.parametrize("shown", ["::1", "0:0:0:0:0:0:0:1"])
def test_peers_on_ipv6(tmp_path: Path, stack: ExitStack, mode: Any, shown: str) -> None:
    authority = Authority.create(tmp_path / "authority", "study")
    for site in "ab":
        authority.site(site, ["::1"])
    peers = Peers(tmp_path, stack, "ab", authority, "::1")
    peers.addresses = {site: address.replace("::1", shown) for site, address in peers.addresses.items()}
    giver, taker = ("a", "b") if mode == "push" else ("b", "a")
    peers.start("a", "b", mode=mode)
    for site in "ba":
        peers.post(site, 1, *("b" if site == "a" else ""))
    assert until(peers.mailboxes[taker].deliveries).keys() == {giver}


@pytest.mark.parametrize("mode", ["push", "pull"])
def test_nothing_goes_to_a_revoked_peer_or_comes_from_it(
    secured: Peers, mode: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Only callers were looked up: a site that had been revoked was still called, and sent the model."""
    assert secured.authority is not None
    secured.authority.revoke("b")
    secured.start("a", mode=mode)
    secured.start("b")
    secured.post("b", 1)
    secured.post("a", 1, "b")
    until(lambda: secured.is_served("a"))
    assert "The certificate of site 'b' (serial number" in caplog.text
    assert secured.mailboxes["b"].deliveries() == secured.mailboxes["a"].deliveries() == {}
    sent = secured.folder / "a" / "outgoing.jsonl"
    assert not sent.exists() or "offer" not in sent.read_text()


@pytest.mark.parametrize("mode", ["push", "pull"])
def test_a_peer_that_is_revoked_while_a_model_is_under_way(
    secured: Peers, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert secured.authority is not None
    tensors = {"w": np.zeros(2_000_000, np.float32)}
    schema, size = described(tensors)
    for site in "ab":
        secured.publish(site, schema=schema, size=size)
    slow = secured.settings("a", peer_megabytes_per_second=1.0)
    monkeypatch.setattr(secured, "settings", lambda site, **_: slow if site == "a" else Peers.settings(secured, site))
    secured.start("a", mode=mode)
    secured.start("b")
    secured.post("b", 1, tensors=tensors)
    secured.post("a", 1, "b", tensors=tensors)
    until(lambda: secured.files("b" if mode == "push" else "a"))
    secured.authority.revoke("b")
    (entry,) = until(lambda: [e for e in secured.mailboxes["a"].history() if e["event"] == "missed"])
    assert entry["bytes"] < size
    assert secured.mailboxes["b"].deliveries() == secured.mailboxes["a"].deliveries() == {}


def test_what_is_shown_at_a_peers_address_must_be_the_peers_certificate(
    secured: Peers, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "nnunet_fed")
    secured.start("c", listen=secured.addresses["b"])
    secured.start("a")
    secured.post("a", 1, "b")
    until(lambda: secured.is_served("a"))
    assert "the address of site 'b', 'c' shows its certificate" in caplog.text
    assert secured.mailboxes["c"].deliveries() == {}


def test_silent_calls_keep_no_peer_out(secured: Peers) -> None:
    """Twenty calls whose request never came filled every slot, also with a certificate that had been revoked."""
    assert secured.authority is not None
    secured.start("a", "b")
    stranger = secured.authority.folder / "sites" / "d"
    secured.authority.revoke("d")
    own = secured.settings("a").model_copy(
        update={"certificate": stranger / "certificate.pem", "key": stranger / "key.pem"}
    )
    held = Held()
    with open_channel(own, "b") as one, open_channel(secured.settings("c"), "b") as other:
        for channel in (one, other):
            for _ in range(50):
                held.begin(channel, "/nnunet_fed.v1.Peer/Push")
        until(lambda: sum(call.done() for call in held.calls) >= 92)
        secured.post("a", 1, "b")
        until(secured.mailboxes["b"].deliveries)
        held.let_go()


def test_a_certificate_that_no_peer_would_accept_is_told_at_the_start(secured: Peers) -> None:
    assert secured.authority is not None
    other = secured.authority.site("e")
    files = {"certificate": other / "certificate.pem", "key": other / "key.pem"}
    with pytest.raises(ConfigurationError, match="name = 'a', but the certificate .* is of 'e'"):
        PeerProcess(secured.settings("a", **files), secured.mailboxes["a"])
    secured.addresses["e"] = secured.addresses.pop("a")
    renamed = secured.settings("b").model_copy(update={"name": "e", "listen": secured.addresses["e"], **files})
    with pytest.raises(ConfigurationError, match="names no host at which others reach its owner.*--host"):
        PeerProcess(renamed, secured.mailboxes["a"])


# ----------------------------------------------------------------------------------------------------------- processes


def command(peers: Peers, site: str, *options: str) -> list[str]:
    folder = str(peers.folder / site)
    return [sys.executable, "-m", "nnunet_fed", "peer", folder, "--site-file", str(peers.file(site)), *options]


def test_24_killed_while_it_sends_it_leaves_a_partial_file_until_the_next_start(peers: Peers) -> None:
    process = peers.start("b")
    large = {"w": np.zeros(16 * CHUNK, np.float32)}
    schema, size = described(large)
    for site in "ab":
        peers.publish(site, schema=schema, size=size)
    sender = subprocess.Popen(command(peers, "a"), stderr=subprocess.DEVNULL)
    try:
        peers.post("a", 1, "b", tensors=large)
        (partial,) = until(lambda: [path for path in peers.files("b") if PARTIAL in path])
        sender.send_signal(signal.SIGKILL)
        sender.wait()
    finally:
        sender.kill()
        sender.wait()
    assert peers.mailboxes["b"].deliveries() == {}
    time.sleep(0.3)
    assert peers.files("b") == [partial]
    assert Path(partial).stat().st_size < size
    process.stop()
    again = PeerProcess(peers.settings("b"), Mailbox(peers.folder / "b"))
    assert peers.files("b") == []
    again.stop()
    again.run()


def test_27_half_a_gigabyte_goes_over_in_messages_below_4_mib(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    large = {"w": np.zeros((500, 1 << 18), np.float32), "b": np.ones(5, np.float32)}
    schema, size = described(large)
    for site in "ab":
        peers.publish(site, schema=schema, size=size)
    lengths: list[int] = []
    write = zero_copy_streams.write

    def measured(message: Any) -> bytes:
        serialized = write(message)
        lengths.append(len(serialized))
        return serialized

    monkeypatch.setattr(zero_copy_streams, "write", measured)
    peers.start("a", "b")
    letter = peers.post("a", 1, "b", tensors=large)
    assert until(peers.mailboxes["b"].deliveries, 120) == {"a": letter}
    assert sum(lengths) > size > 500 << 20
    assert max(lengths) < 4 << 20


def test_30_a_ring_moves_half_of_fedavgs_bytes_and_nothing_else(peers: Peers, stack: ExitStack) -> None:
    large = {"w": np.random.default_rng(0).normal(size=CHUNK).astype(np.float32)}
    schema, size = described(large)
    proxies, listen = {}, dict(peers.addresses)
    for site, address in listen.items():
        peers.publish(site, schema=schema, size=size)
        proxies[site] = RecordingProxy(address)
        stack.callback(proxies[site].close)
        peers.addresses[site] = proxies[site].address
    rounds, sites = 3, len(listen)
    for site in listen:
        peers.start(site, listen=listen[site])
    ring = Schedule("ring", 0)
    for number in range(rounds):
        for site in listen:
            peers.post(site, number + 1, *ring.candidates(number, site, dict.fromkeys(listen, 1))[:1], tensors=large)
        for site in listen:
            until(lambda site=site: peers.is_served(site))
    on_the_wire = sum(len(proxy.sent) + len(proxy.received) for proxy in proxies.values())
    recorded = sum(e["bytes"] for site in listen for e in peers.mailboxes[site].history() if e["event"] == "sent")
    assert recorded == rounds * sites * size
    assert on_the_wire == pytest.approx(recorded, rel=0.01)
    assert on_the_wire / (2 * sites * rounds * size) == pytest.approx(0.5, rel=0.01)


def test_the_process_ends_at_a_signal_and_with_its_parent_and_imports_no_torch(peers: Peers) -> None:
    peers.start("a")
    process = subprocess.Popen(command(peers, "b"), stderr=subprocess.DEVNULL)
    try:
        assert until(peers.mailboxes["a"].members) == {"b": 10}
        mapped = Path(f"/proc/{process.pid}/maps")
        assert not mapped.exists() or "torch" not in mapped.read_text()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
    script = (
        "import os, subprocess, sys; p = subprocess.Popen([*sys.argv[1:], '--parent', str(os.getpid())]); "
        "print(p.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, *command(peers, "c")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert parent.stdout is not None
    number = int(parent.stdout.readline())
    until(lambda: "c" in peers.mailboxes["a"].members())
    parent.kill()
    parent.wait()
    until(lambda: not is_running(number))


def is_running(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{number}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_31_the_process_opens_its_mailbox_and_settings_and_nothing_else_of_the_site(peers: Peers) -> None:
    (peers.folder / "data").mkdir()
    shutil.copy(peers.file("a"), peers.folder / "data" / "image.nii.gz")
    peers.start("b")
    peers.post("a", 1, "b")
    script = (
        "import sys; opened = open(sys.argv.pop(1), 'w', buffering=1); sys.addaudithook(lambda event, args: "
        "opened.write(f'{args[0]}\\n') if event == 'open' and str(args[0]) != opened.name else None); "
        "from nnunet_fed.cli.app import main; main()"
    )
    log = peers.folder / "opened.txt"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(log), *command(peers, "a")[3:]], stderr=subprocess.DEVNULL
    )
    try:
        until(peers.mailboxes["b"].deliveries)
    finally:
        process.terminate()
        assert process.wait(20) == 0
    of_the_site = {line for line in log.read_text().splitlines() if line.startswith(str(peers.folder))}
    assert of_the_site
    mailbox, settings = peers.folder / "a", peers.folder / "a.toml"
    assert [line for line in of_the_site if not Path(line).is_relative_to(mailbox) and Path(line) != settings] == []


# ------------------------------------------------------------------------------------------------------------ bad input


def test_a_site_without_peers_or_on_another_machine_without_tls(peers: Peers) -> None:
    with pytest.raises(ConfigurationError, match="site.toml names no peers: gossip needs 'listen'"):
        PeerProcess(peers.settings("a", listen=None, peers={}), peers.mailboxes["a"])
    peers.addresses["b"] = "192.0.2.1:7465"
    with pytest.raises(ConfigurationError, match="'192.0.2.1:7465' is not on this machine"):
        PeerProcess(peers.settings("a"), peers.mailboxes["a"])


def test_an_address_in_use_is_tried_for_a_while(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    first = PeerProcess(peers.settings("a"), peers.mailboxes["a"])
    monkeypatch.setattr(peer, "ADDRESS_SECONDS", 0.3)
    with pytest.raises(ConfigurationError, match=f"Cannot listen on {peers.addresses['a']}: the port is in use"):
        PeerProcess(peers.settings("a"), peers.mailboxes["a"])
    monkeypatch.undo()
    first._listener.start()
    threading.Timer(0.3, first._listener.stop, [0]).start()
    PeerProcess(peers.settings("a"), peers.mailboxes["a"])


def test_peers_that_all_stay_silent_and_a_site_that_is_alone(
    tmp_path: Path, stack: ExitStack, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer, "INTRODUCTIONS", (0.05, 1.0))
    silent, alone = Peers(tmp_path / "2", stack, "ab"), Peers(tmp_path / "1", stack, "a")
    silent.start("a")
    until(lambda: f"none of the peers answers ('b' at {silent.addresses['b']})" in caplog.text)
    alone.start("a")
    until(lambda: "'a' is the only site in [peers] of site.toml: it trains alone" in caplog.text)
    alone.post("a", 1)
    assert alone.is_served("a")
