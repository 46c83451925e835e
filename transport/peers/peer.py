"""The peer process of a site (GCML's notes, 5.5): a server for its peers, and a client of theirs. Source: ours.

It is a process of its own because gRPC and fork do not mix, while nnU-Net forks; because a slow peer must not stall a
training; and because it has no business with the data: it sees a mailbox, ``site.toml`` and certificates. No torch.
"""

from __future__ import annotations

import logging
import mmap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import grpc

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.exchange.outgoing_log import FILE, OutgoingLog, tensors_entry
from nnunet_fed.exchange.payload import chunks, decode
from nnunet_fed.gossip.mailbox import Mailbox
from nnunet_fed.study.address import Address
from nnunet_fed.study.site import Site
from nnunet_fed.transport.channel.listener import AddressError, Listener
from nnunet_fed.transport.channel.options import PEER_PROTOCOL, require_loopback
from nnunet_fed.transport.channel.rate_limit import RateLimit
from nnunet_fed.transport.channel.refusals import Refusals, refuse
from nnunet_fed.transport.channel.retry import DamagedError
from nnunet_fed.transport.channel.tls import KeyFiles, Keys, check_name
from nnunet_fed.transport.channel.zero_copy_streams import serve_peer
from nnunet_fed.transport.peers.contacts import Contacts
from nnunet_fed.transport.peers.model_message import incompatibility, message_of
from nnunet_fed.transport.peers.peer_client import Mode, PeerClient
from nnunet_fed.transport.peers.reception import Reception
from nnunet_fed.transport.peers.stalled_transfers import GLANCE_SECONDS, given_up_if_stalled
from nnunet_fed.transport.proto import federation_pb2 as pb
from nnunet_fed.transport.proto.federation_pb2_grpc import PeerServicer

logger = logging.getLogger(__name__)

ADDRESS_SECONDS, ADDRESS_PAUSE = 15.0, 0.5
"""So long the peer process of a training that was killed may still hold the address."""
INTRODUCTIONS = (0.5, 30.0)
"""First and longest pause, in seconds, before peers that have not been heard of are asked again."""
SILENCES = 4
"""So many askings in a row that nobody answered are worth a line in the log."""
LONGEST_PAUSE = 5.0
"""In lockstep, between two attempts for a peer that is away or has not decided."""
GRACE_SECONDS = 2.0
DISK_PAUSE = 10.0


class PeerProcess:
    """What the peer process does.

    Args:
        site: this site's settings.
        mailbox: the training's.
        mode: ``push``: send models; ``pull``: fetch those of the others. Either way it takes and gives what is asked.
        max_tries: attempts to reach a peer for one letter.

    Raises:
        ConfigurationError: ``site.toml`` names no peers, the address is taken, or TLS is missing or wrong.
    """

    def __init__(self, site: Site, mailbox: Mailbox, mode: Mode = "push", max_tries: int = 3):
        if site.listen is None:
            raise ConfigurationError(
                "site.toml names no peers: gossip needs 'listen', this site's address, and 'peers', those of all sites."
            )
        if site.insecure:
            for address in site.peers.values():
                require_loopback(Address.parse(address))
        else:
            check_name(site)
        self._site = site
        self._mailbox = mailbox
        self._stopped = threading.Event()
        contacts = Contacts(mailbox)
        outgoing = OutgoingLog(mailbox.folder / FILE)
        reception = Reception(site, mailbox, self._stopped)
        limit = RateLimit(site.peer_megabytes_per_second, self._stopped)
        service = _Service(site, mailbox, reception, contacts, outgoing, limit, self._stopped)
        self._listener = self._listen(site, site.listen, service)
        mailbox.sweep()
        self._contacts = contacts
        self._client = PeerClient(site, mailbox, reception, contacts, outgoing, limit, mode, max_tries, self._stopped)

    def _listen(self, site: Site, address: str, service: _Service) -> Listener:
        def check(keys: Keys) -> None:
            if keys.owner.name != site.name:
                raise ConfigurationError(f"The certificate {keys.files.certificate} is of '{keys.owner.name}'.")

        end = time.monotonic() + ADDRESS_SECONDS
        while True:
            try:
                return Listener(
                    address,
                    partial(serve_peer, service),
                    sorted(site.peers),
                    f"is not among the peers of site '{site.name}': add it to [peers] in site.toml at all sites.",
                    None if site.insecure else KeyFiles.of(site),
                    check,
                    site.revoked,
                )
            except AddressError:
                if time.monotonic() > end:
                    raise
            time.sleep(ADDRESS_PAUSE)

    def run(self, is_wanted: Callable[[], bool] = lambda: True) -> None:
        """Serve until :meth:`stop` is called, or nobody wants it any more. Ends within a few seconds then."""
        self._listener.start()
        introductions = threading.Thread(target=self._introduce, daemon=True)
        introductions.start()
        pause, again_at, tried = GLANCE_SECONDS, 0.0, ""
        while is_wanted() and not self._stopped.wait(GLANCE_SECONDS):
            try:
                found = self._mailbox.outgoing()
                if found is None or not found[2] or (found[0].name == tried and time.monotonic() < again_at):
                    continue
                pause = min(2 * pause, LONGEST_PAUSE) if found[0].name == tried else GLANCE_SECONDS
                tried = found[0].name
                self._client.serve(*found)
                again_at = time.monotonic() + pause
            except OSError as error:  # a full disk: what was not written down is tried again
                logger.error("the mailbox cannot be used at present: %s", error)
                self._stopped.wait(DISK_PAUSE)
        self._stopped.set()
        state = self._mailbox.state()
        if state is not None and state.leaving:
            self._client.say_farewell()
        self._listener.stop(GRACE_SECONDS)

    def stop(self) -> None:
        """Let :meth:`run` end; safe in a signal handler."""
        self._stopped.set()

    def _introduce(self) -> None:
        others = sorted(self._site.peers.keys() - {self._site.name})
        if not others:
            logger.warning("'%s' is the only site in [peers] of site.toml: it trains alone", self._site.name)
        while self._mailbox.state() is None:  # the training has not said who it is
            if self._stopped.wait(GLANCE_SECONDS):
                return
        pause, silent = INTRODUCTIONS[0], 0
        while not self._stopped.is_set():
            unheard = [peer for peer in others if peer not in self._contacts.members()]
            answered = [self._client.introduce(peer) for peer in unheard if not self._stopped.is_set()]
            silent = silent + 1 if len(unheard) == len(others) > 0 and not any(answered) else 0
            if silent == SILENCES:
                listed = ", ".join(f"'{peer}' at {self._site.peers[peer]}" for peer in others)
                logger.warning("none of the peers answers (%s); until one does, this site trains alone", listed)
            self._stopped.wait(pause)
            pause = min(2 * pause, INTRODUCTIONS[1])


class _Service(PeerServicer):  # type: ignore[misc]
    def __init__(
        self, site: Site, mailbox: Mailbox, reception: Reception, contacts: Contacts, outgoing: OutgoingLog,
        limit: RateLimit, stopped: threading.Event,
    ):  # fmt: skip
        self._site = site
        self._mailbox = mailbox
        self._reception = reception
        self._contacts = contacts
        self._outgoing = outgoing
        self._rate_limit = limit
        self._stopped = stopped

    def Info(self, request: pb.PeerInfo, context: grpc.ServicerContext) -> pb.PeerInfo:  # noqa: N802
        with self._called(request.site, context):
            state = self._mailbox.state()
            if state is None:
                return pb.PeerInfo(protocol=PEER_PROTOCOL, site=self._site.name)
            if request.run == state.run:
                self._contacts.introduced(request.site, request.training_cases, request.leaving)
            facts: dict[str, Any] = {"run": state.run, "training_cases": state.training_cases, "leaving": state.leaving}
            facts |= {"protocol": PEER_PROTOCOL, "site": self._site.name}
            self._outgoing({"to": request.site, "what": "info", **facts}, repeats=True)
            return pb.PeerInfo(**facts)

    def Offer(self, request: pb.Model, context: grpc.ServicerContext) -> pb.PeerReply:  # noqa: N802
        with self._called(request.site, context):
            reply = self._reception.reply(request)
            if reply.verdict != "accept":
                self._reception.refused(request, reply)
            return reply

    def Push(  # noqa: N802
        self, requests: Iterator[pb.ModelChunk | memoryview], context: grpc.ServicerContext
    ) -> pb.PeerReply:
        first = next(requests, None)
        if not isinstance(first, pb.ModelChunk) or first.WhichOneof("part") != "model":
            refuse(context, "A push begins with a model's description.", grpc.StatusCode.INVALID_ARGUMENT)
        with self._called(first.model.site, context):
            reply = self._reception.reply(first.model)
            if reply.verdict != "accept":
                self._reception.refused(first.model, reply)
                return reply
            try:
                return self._reception.take(first.model, requests, context.cancel)
            except grpc.RpcError:
                logger.warning("site '%s' broke off while it sent its model", first.model.site)
                raise
            except DamagedError:
                refuse(context, "The model did not arrive as it was offered.", grpc.StatusCode.DATA_LOSS)

    def Pull(  # noqa: N802
        self, request: pb.PullRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ModelChunk | memoryview]:
        with self._called(request.site, context):
            state, found = self._mailbox.state(), self._mailbox.outgoing()
            if state is not None and (reason := incompatibility(request, state, self._site.name)):
                yield pb.ModelChunk(reply=pb.PeerReply(verdict="incompatible", reason=reason))
                return
            if found is None or found[0].run != request.run or found[0].version.counter <= request.counter:
                yield pb.ModelChunk(reply=pb.PeerReply(verdict="nothing"))
                return
            letter, path, _ = found
            try:
                with path.open("rb") as file:
                    payload = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            except FileNotFoundError:  # a newer one comes in its place
                yield pb.ModelChunk(reply=pb.PeerReply(verdict="nothing"))
                return
            started, given = time.monotonic(), 0
            version, model = letter.version, message_of(letter)
            if request.digest == letter.digest and request.position <= letter.size:
                model.position = request.position
            begun = {"from_byte": model.position} if model.position else {}
            self._outgoing(
                {
                    "to": request.site, "what": "upload", "run": letter.run, "site": version.site,
                    "vector": dict(version.vector), "epoch": version.epoch, "bytes": letter.size,
                    "digest": letter.digest, **begun, **tensors_entry(decode(payload)),
                },
                repeats=True,
            )  # fmt: skip
            with given_up_if_stalled(context.cancel, lambda: given, self._stopped):
                yield pb.ModelChunk(model=model)
                for chunk in chunks([payload[model.position :]]):
                    yield memoryview(chunk)
                    given += len(chunk)
                    self._rate_limit.passed(len(chunk))
            self._mailbox.note_event(
                event="sent", peer=request.site, site=version.site, counter=version.counter, bytes=given,
                seconds=round(time.monotonic() - started, 3), verdict="pulled",
            )  # fmt: skip

    @contextmanager
    def _called(self, peer: str, context: grpc.ServicerContext) -> Iterator[None]:
        """Who calls is a peer of this site, and lives."""
        with Refusals(context, f"The disk of site '{self._site.name}'"):
            if peer not in self._site.peers or peer == self._site.name:
                text = f"'{peer}' is not among the peers of site '{self._site.name}'."
                refuse(context, text, grpc.StatusCode.PERMISSION_DENIED)
            self._contacts.reached(peer)
            yield
