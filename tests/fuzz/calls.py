"""Coverage-guided fuzzing of every call of a coordinator and of a peer, from the serialized messages on.

A call answers, or is refused through its context: an error of another kind would reach the caller as a traceback's
last line. Whatever was called, the result of a collective that is over stays as it is, and nothing lies around.

    python -m pip install atheris
    python tests/fuzz/calls.py -max_total_time=600 CORPUS_FOLDER
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import atheris
import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError
from starting import fuzz

with atheris.instrument_imports(include=["nnunet_fed"]):
    from nnunet_fed.coordinator.coordinator import Coordinator
    from nnunet_fed.coordinator.store import Store
    from nnunet_fed.coordinator.verdict import Offer
    from nnunet_fed.exchange.outgoing_log import OutgoingLog
    from nnunet_fed.exchange.payload import encode, measure
    from nnunet_fed.gossip.mailbox import Mailbox, State, described
    from nnunet_fed.gossip.schedule import Version
    from nnunet_fed.study.federation import Federation
    from nnunet_fed.study.site import Site
    from nnunet_fed.transport.channel.rate_limit import RateLimit
    from nnunet_fed.transport.channel.zero_copy_streams import serve, serve_peer, write
    from nnunet_fed.transport.coordinator import server
    from nnunet_fed.transport.coordinator.check_service import serve_checks
    from nnunet_fed.transport.peers import peer
    from nnunet_fed.transport.peers.contacts import Contacts
    from nnunet_fed.transport.peers.reception import Reception
    from nnunet_fed.transport.proto import check_pb2
    from nnunet_fed.transport.proto import federation_pb2 as pb

RENEWED = 1000
"""Inputs after which the state is made anew, so that the journal stays short."""
RUN = "0123456789abcdef" * 4
TENSORS = {"w": np.arange(4, dtype=np.float32)}
PAYLOAD, SUM = b"".join(encode(TENSORS)), b"".join(encode({"value": np.array([1, 2])}))
REQUESTS = {
    "Join": pb.JoinRequest, "Upload": pb.UploadChunk, "Result": pb.ResultRequest, "Newest": pb.NewestRequest,
    "Report": pb.ReportRequest, "Leave": pb.LeaveRequest, "Status": pb.StatusRequest,
    "Introduce": check_pb2.IntroduceRequest, "Send": check_pb2.Noise, "Receive": check_pb2.NoiseRequest,
    "Info": pb.PeerInfo, "Push": pb.ModelChunk, "Pull": pb.PullRequest,
}  # fmt: skip


class AbortedError(Exception):
    """The call was refused."""


class Context:
    """Of a call; takes the refusal."""

    def abort(self, code: object, details: str) -> NoReturn:
        raise AbortedError(f"{code}: {details}")

    def cancel(self) -> None:
        """Nothing to do."""

    def peer(self) -> str:
        return "fuzz"

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}


class Handlers:
    """Stands where a gRPC server would, and keeps what is registered."""

    def __init__(self) -> None:
        self.of: dict[str, Any] = {}

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        self.of.update({f"{service}/{name}": handler for name, handler in handlers.items()})

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """The same handlers again."""


class Target:
    """A coordinator of sites a and b, in which ``r/model`` is over, and the peer process of site a."""

    def __init__(self, folder: Path):
        study = {"name": "fuzz", "sites": ("a", "b"), "method": {"name": "fedavg"}, "rounds": 2, "min_sites": 1}
        self.coordinator = Coordinator(Federation.model_validate(study), Store(folder / "state"), spool_quota=1 << 22)
        handlers = Handlers()
        serve(server._Service(self.coordinator), handlers)
        serve_checks(self.coordinator, handlers)
        of_study = self.coordinator.study.digest
        for site in "ab":
            self.run: str = self.coordinator.join(site, "training", of_study, "3d", "T")
        digest, size = measure([PAYLOAD])
        for site in "ab":
            self.coordinator.take(Offer(self.run, "r/model", site, "mean", 1.0, digest, size), 0, [PAYLOAD])
        self._result = self._read_result()

        site = Site(
            name="a", coordinator="127.0.0.1:9", insecure=True, listen="127.0.0.1:9",
            peers={"a": "127.0.0.1:9", "b": "127.0.0.1:10"},
        )  # fmt: skip
        self.mailbox = Mailbox(folder / "mailbox")
        self.mailbox.publish_state(State(RUN, Version("a", {"a": 1}, 1), {}, 10, "i", *described(TENSORS)))
        stopped = threading.Event()
        contacts, reception = Contacts(self.mailbox), Reception(site, self.mailbox, stopped)
        outgoing, limit = OutgoingLog(folder / "outgoing.jsonl"), RateLimit(None, stopped)
        serve_peer(peer._Service(site, self.mailbox, reception, contacts, outgoing, limit, stopped), handlers)
        self.names, self._handlers = sorted(handlers.of), handlers.of
        of_model, size_of_model = described(TENSORS)
        self.words = ["a", "b", "x", "", self.run, RUN, "r/model", "mean", "{}", of_study, digest, of_model, "../a"]
        self.sizes = [1, 2, 3, 0, size, size + 1, 2**32, 2**53, 2**63, 2**64 - 1]
        both = {"protocol": [server.NEWEST_PROTOCOL], "size": [size], "position": [0, 1, size], "wait_seconds": [0.0]}
        self._likely: dict[bool, dict[str, list[Any]]] = {
            False: {
                "site": ["a", "b"], "run": [self.run], "key": ["r/model", "r/x", "q/model", "q/x", "q/y"],
                "verb": ["mean", "sum", "gather"], "purpose": ["training", "planning"], "digest": [of_study, digest],
                "configuration": ["3d"], "trainer": ["T"], "name": ["model"], "weight": [1.0, 2.5, 0.0],
                "progress": ["", "{}", '{"phase": "x"}'], **both,
            },
            True: {
                "site": ["b"], "run": [RUN], "schema": [of_model], "initial": ["i"], "digest": [digest],
                "training_cases": [1, 10], "epoch": [1, 2], "counter": [0, 1], **both,
            },
        }  # fmt: skip
        assert size == size_of_model

    def likely(self, field: Any) -> list[Any] | None:
        """What a field may hold, so that a call gets beyond the first checks."""
        of_peer = field.containing_type.name in ("PeerInfo", "Model", "PullRequest")
        return self._likely[of_peer].get(field.name)

    def _read_result(self) -> bytes:
        collective = self.coordinator.wait(self.run, "r/model", 0)
        assert collective is not None
        return self.coordinator.result_file(collective).read_bytes()

    def call(self, name: str, messages: list[bytes]) -> None:
        """Call as gRPC would; raises what a handler must not raise."""
        handler, context = self._handlers[name], Context()

        def requests() -> Iterator[Any]:
            for message in messages:
                yield handler.request_deserializer(message)

        try:
            given = requests() if handler.request_streaming else next(requests())
            if handler.response_streaming:
                function = handler.unary_stream
                for reply in function(given, context):
                    handler.response_serializer(reply)
            else:
                function = handler.stream_unary if handler.request_streaming else handler.unary_unary
                handler.response_serializer(function(given, context))
        except (AbortedError, DecodeError):  # gRPC itself answers the second
            pass

    def check(self) -> None:
        """Nothing has happened to what stands, and no upload is under way any more."""
        assert self._read_result() == self._result
        assert not self.coordinator._spool._receivers

    def close(self) -> None:
        """End it."""
        self.coordinator.close()


def message_of(provider: atheris.FuzzedDataProvider, kind: Any, target: Target) -> Any:
    """A message whose fields mostly hold what they may hold."""
    message = kind()
    oneofs = [provider.PickValueInList(list(oneof.fields)) for oneof in kind.DESCRIPTOR.oneofs]
    for field in oneofs or kind.DESCRIPTOR.fields:
        if provider.ConsumeIntInRange(0, 31) == 31:  # used-up input gives 0
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            key = provider.PickValueInList(["b", "a", "x"])
            of_text = field.message_type.fields_by_name["value"].type == FieldDescriptor.TYPE_STRING
            value = provider.PickValueInList(target.words if of_text else target.sizes)
            getattr(message, field.name)[key] = value
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            getattr(message, field.name).CopyFrom(message_of(provider, field.message_type._concrete_class, target))
        else:
            setattr(message, field.name, value_of(provider, field, target))
    return message


def value_of(provider: atheris.FuzzedDataProvider, field: Any, target: Target) -> Any:
    """A value for a field, a likely one nearly always."""
    likely = target.likely(field)
    if likely is not None and provider.ConsumeIntInRange(0, 15) < 15:
        return provider.PickValueInList(likely)
    if field.type == FieldDescriptor.TYPE_STRING:
        known = provider.ConsumeBool()
        return provider.PickValueInList(target.words) if known else provider.ConsumeUnicodeNoSurrogates(12)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return provider.ConsumeBytes(provider.ConsumeIntInRange(0, 40))
    if field.type == FieldDescriptor.TYPE_DOUBLE:
        return provider.PickValueInList([0.0, 1.0, 2.5, -1.0, float("nan"), float("inf"), 1e308])
    if field.type == FieldDescriptor.TYPE_BOOL:
        return provider.ConsumeBool()
    if field.type == FieldDescriptor.TYPE_UINT32:
        return provider.PickValueInList([0, 1, 2**32 - 1])
    return provider.PickValueInList(target.sizes)


def transfer_of(provider: atheris.FuzzedDataProvider, kind: Any, target: Target) -> list[bytes]:
    """A description and the bytes that it describes, nearly always: an upload or a push."""
    payload = provider.PickValueInList([PAYLOAD, SUM, b"[1]", b""])
    payload = payload or provider.ConsumeBytes(provider.ConsumeIntInRange(0, 120))
    upload = kind is pb.UploadChunk
    about = message_of(provider, pb.OfferRequest if upload else pb.Model, target)
    if provider.ConsumeIntInRange(0, 7) < 7:
        about.digest, about.size = measure([payload])
        about.position = 0
    first = pb.UploadChunk(offer=about) if upload else pb.ModelChunk(model=about)
    cut = provider.ConsumeIntInRange(0, len(payload))
    return [first.SerializeToString(), *(write(memoryview(piece)) for piece in (payload[:cut], payload[cut:]))]


class Fuzzer:
    """Makes calls out of bytes.

    Args:
        folder: for the states, one after the other.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._count = 0
        self._target: Target | None = None
        self._stack = ExitStack()

    def one_input(self, data: bytes) -> None:
        """Up to three calls."""
        if self._count % RENEWED == 0 or self._target is None:
            self._stack.close()
            folder = self._stack.enter_context(TemporaryDirectory(dir=self._folder))
            self._target = Target(Path(folder))
            self._stack.callback(self._target.close)
        self._count += 1
        target, provider = self._target, atheris.FuzzedDataProvider(data)
        for _ in range(provider.ConsumeIntInRange(1, 3)):
            name = provider.PickValueInList(target.names)
            target.call(name, self._messages(provider, name, target))
        target.check()

    def _messages(self, provider: atheris.FuzzedDataProvider, name: str, target: Target) -> list[bytes]:
        method = name.rpartition("/")[2]
        offer = pb.Model if ".Peer" in name else pb.OfferRequest
        kind = REQUESTS.get(method, offer)
        if provider.ConsumeIntInRange(0, 9) == 9:
            return [provider.ConsumeBytes(provider.ConsumeIntInRange(0, 60)) for _ in range(2)]
        if method in ("Upload", "Push") and provider.ConsumeIntInRange(0, 3) < 3:
            return transfer_of(provider, kind, target)
        return [message_of(provider, kind, target).SerializeToString() for _ in range(2)]


def main() -> None:
    """Fuzz until libFuzzer's options say enough, or something is found."""
    logging.disable(logging.CRITICAL)
    server.LONGEST_WAIT = 0.0  # type: ignore[misc]
    shared_memory = Path("/dev/shm")
    with TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else None, prefix="nnunet_fed_fuzz_") as name:
        seeds = (random.Random(number).randbytes(500) for number in range(100))  # some hundred bytes make a call
        fuzz(Fuzzer(Path(name)).one_input, Path(name), seeds, ["-len_control=0", "-max_len=1000"])


if __name__ == "__main__":
    main()
