"""Sends a site's models to its peers, or fetches theirs: one after the other, and never for ever. Source: ours.

A peer that does not answer costs the deadline of an offer and a line in the log.
"""

from __future__ import annotations

import logging
import mmap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Literal

import grpc

from nnunet_fed.errors import FederationError, RefusedError, UnreachableError
from nnunet_fed.exchange.outgoing_log import OutgoingLog, tensors_entry
from nnunet_fed.exchange.payload import decode
from nnunet_fed.exchange.uploads import InterruptedUploadError
from nnunet_fed.gossip.mailbox import Letter, Mailbox
from nnunet_fed.logs import printable
from nnunet_fed.study.address import readable
from nnunet_fed.study.site import Site
from nnunet_fed.transport.channel.options import PEER_PROTOCOL
from nnunet_fed.transport.channel.rate_limit import RateLimit
from nnunet_fed.transport.channel.refusals import SPARING_LOG
from nnunet_fed.transport.channel.retry import DamagedError
from nnunet_fed.transport.channel.transfer import Outbound, seconds_allowed
from nnunet_fed.transport.channel.zero_copy_streams import PeerStub
from nnunet_fed.transport.peers.contacts import Contacts
from nnunet_fed.transport.peers.model_message import message_of
from nnunet_fed.transport.peers.peer_channel import PeerChannels
from nnunet_fed.transport.peers.reception import Reception
from nnunet_fed.transport.peers.stalled_transfers import given_up_if_stalled
from nnunet_fed.transport.proto import federation_pb2 as pb

logger = logging.getLogger(__name__)

Mode = Literal["push", "pull"]
Exchange = Callable[[PeerStub, Callable[[], bool]], pb.PeerReply]
"""Talks to a peer, for as long as the function does not say that its certificate has been revoked."""
Outcome = Literal["done", "next", "again", "later"]
"""Of an attempt: over; the next one's turn; go on where it broke; the peer has not decided, or was not reached."""

OFFER_SECONDS = 10.0
"""For an answer of a few hundred bytes (notes' 5.5)."""
FAREWELL_SECONDS = 2.0
ANSWERS = {
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.ABORTED,
}
"""Errors that a peer that lives has given."""
UNDECIDED = ("busy", "early")
"""Verdicts that may be others soon."""
BROKEN = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DATA_LOSS}
"""After these, a transfer that had begun goes on where it was."""


class PeerClient:
    """Talks to the peers of a site.

    Args:
        site: this site's settings.
        mailbox: the training's.
        reception: takes what is fetched.
        contacts: hears who answers.
        outgoing: hears of everything that this site sends, before it leaves (:mod:`nnunet_fed.exchange.outgoing_log`).
        limit: of what leaves.
        mode: ``push``: send the own model; ``pull``: fetch a peer's.
        max_tries: attempts for one letter.
        stopped: once set, what goes on is given up.
    """

    def __init__(
        self, site: Site, mailbox: Mailbox, reception: Reception, contacts: Contacts, outgoing: OutgoingLog,
        limit: RateLimit, mode: Mode, max_tries: int, stopped: threading.Event,
    ):  # fmt: skip
        self._site = site
        self._channels = PeerChannels(site)
        self._mailbox = mailbox
        self._reception = reception
        self._contacts = contacts
        self._outgoing = outgoing
        self._rate_limit = limit
        self._broken: dict[str, pb.Model] = {}
        """Of each peer the model of which a part has been pulled."""
        self._attempt = self._push if mode == "push" else self._pull
        self._max_tries = max_tries
        self._stopped = stopped

    def serve(self, letter: Letter, path: Path, candidates: Sequence[str]) -> None:
        """Try the candidates of a letter until one exchange has succeeded, at most ``max_tries`` times.

        In lockstep a peer that has not decided is asked again in the next call, and until then is no served candidate.
        """
        try:
            with path.open("rb") as file:
                payload = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except FileNotFoundError:  # a newer one is in its place
            return
        waiting = deque(peer for peer in candidates if peer in self._site.peers and peer != self._site.name)
        for _ in range(self._max_tries):
            if not waiting or self._stopped.is_set():
                break
            peer = waiting.popleft()
            outcome = self._attempt(peer, letter, payload)
            if outcome == "done":
                break
            if outcome == "again":
                waiting.appendleft(peer)
            if outcome in ("again", "later") and self._in_lockstep():
                return
        if not self._stopped.is_set():
            self._mailbox.served(letter)

    def introduce(self, peer: str, seconds: float = OFFER_SECONDS) -> bool:
        """Tell a peer who this site is, and learn who the peer is; whether it answers."""
        state = self._mailbox.state()
        info = pb.PeerInfo(protocol=PEER_PROTOCOL, site=self._site.name)
        if state is not None:
            info.run, info.training_cases, info.leaving = state.run, state.training_cases, state.leaving
        facts = {field.name: getattr(info, field.name) for field in info.DESCRIPTOR.fields}
        try:
            with self._channels.to(peer) as (channel, _):
                self._sends(peer, "info", **facts)
                answer = PeerStub(channel).Info(info, timeout=seconds)
        except (grpc.RpcError, FederationError) as error:
            logger.debug("site '%s' does not answer (%s)", peer, error)
            return False
        if state is not None and answer.site == peer and answer.run == state.run:
            self._contacts.introduced(peer, answer.training_cases, answer.leaving)
        return True

    def say_farewell(self) -> None:
        """Tell all peers at once that this site has left; who does not answer soon is left out."""
        peers = sorted(self._site.peers.keys() - {self._site.name})
        with ThreadPoolExecutor(max(1, len(peers))) as pool:
            list(pool.map(lambda peer: self.introduce(peer, FAREWELL_SECONDS), peers))

    def _push(self, peer: str, letter: Letter, payload: memoryview) -> Outcome:
        outbound, model, started = Outbound([payload]), message_of(letter), time.monotonic()
        if outbound.digest != letter.digest:
            logger.error("the payload of %s in the outbox is damaged: it is not sent", letter.name)
            return "next"

        def exchange(stub: PeerStub, revoked: Callable[[], bool]) -> pb.PeerReply:
            facts = {**_facts(letter), "bytes": letter.size, "digest": letter.digest}
            self._sends(peer, "offer", **facts)
            asked = stub.Offer.future(model, timeout=OFFER_SECONDS)
            with given_up_if_stalled(asked.cancel, lambda: 0, self._stopped):
                reply: pb.PeerReply = asked.result()
            if reply.verdict != "accept":
                return reply
            model.position = outbound.reached = min(reply.position, letter.size)
            begun = {"from_byte": model.position} if model.position else {}
            self._sends(peer, "upload", **facts, **begun, **tensors_entry(decode(payload)))

            def paced() -> Iterator[memoryview]:
                for data in outbound.data(model.position):
                    yield data
                    self._rate_limit.passed(len(data))

            messages = chain([pb.ModelChunk(model=model)], paced())
            call = stub.Push.future(messages, timeout=seconds_allowed(letter.size))
            with given_up_if_stalled(call.cancel, lambda: outbound.reached, self._stopped, revoked=revoked):
                reply = call.result()
            return reply

        def moved() -> int:
            return outbound.reached - model.position

        return self._exchange(peer, letter, exchange, moved, started, "sent")

    def _pull(self, peer: str, letter: Letter, payload: memoryview) -> Outcome:
        started, fetched = time.monotonic(), 0
        request = pb.PullRequest(
            protocol=PEER_PROTOCOL, site=self._site.name, run=letter.run, schema=letter.schema,
            counter=self._mailbox.received().get(peer, 0),
        )  # fmt: skip
        begun: dict[str, object] = {}
        if (broken := self._broken.get(peer)) is not None:
            request.digest, request.position = broken.digest, self._reception.position(broken)
            begun = {"digest": request.digest, "from_byte": request.position}

        def exchange(stub: PeerStub, revoked: Callable[[], bool]) -> pb.PeerReply:
            nonlocal fetched
            self._sends(peer, "ask", run=letter.run, schema=letter.schema, counter=request.counter, **begun)
            replies = stub.Pull(request, timeout=seconds_allowed(letter.size))
            with given_up_if_stalled(replies.cancel, lambda: 0, self._stopped, OFFER_SECONDS):
                first = next(replies, pb.ModelChunk(reply=pb.PeerReply(verdict="nothing")))
            if not isinstance(first, pb.ModelChunk) or first.WhichOneof("part") != "model":
                return first.reply if isinstance(first, pb.ModelChunk) else pb.PeerReply(verdict="nothing")
            model = first.model
            goes_on = (model.digest, model.position) == (request.digest, request.position)
            if model.site != peer or (model.position and not goes_on):
                replies.cancel()
                raise RefusedError(f"Site '{peer}' gave a model of '{model.site}', which was not asked for.")
            reply = self._reception.reply(model)
            if reply.verdict != "accept":
                replies.cancel()
                return reply

            def counted() -> Iterator[pb.ModelChunk | memoryview]:
                nonlocal fetched
                for message in replies:
                    fetched += len(message) if isinstance(message, memoryview) else len(message.data)
                    yield message

            self._broken[peer] = model
            taken = self._reception.take(model, counted(), replies.cancel, revoked)
            del self._broken[peer]
            return taken

        return self._exchange(peer, letter, exchange, lambda: fetched, started, None)

    def _exchange(
        self, peer: str, letter: Letter, exchange: Exchange, moved: Callable[[], int],
        started: float, success: str | None,
    ) -> Outcome:  # fmt: skip
        """One attempt, whose success is recorded under this name; ``None``: what came is the reception's to note."""

        def note_event(event: str, **facts: str) -> None:
            seconds = round(time.monotonic() - started, 3)
            own = success is not None
            site, counter = (letter.version.site, letter.version.counter) if own else (peer, None)
            self._mailbox.note_event(
                event=event, peer=peer, site=site, counter=counter, bytes=moved(), seconds=seconds, **facts
            )

        try:
            with self._channels.to(peer) as (channel, revoked):
                reply = exchange(PeerStub(channel), revoked)
        except (grpc.RpcError, grpc.FutureCancelledError, UnreachableError) as error:
            code, reason = _reason(error)
            SPARING_LOG.warn(f"peer {peer}", f"no exchange with site '{peer}': {reason}")
            if code in ANSWERS:
                self._contacts.reached(peer)
            else:
                self._contacts.missed(peer)
            note_event("declined" if code in ANSWERS else "missed", reason=reason)
            if code in BROKEN and moved() > 0:
                return "again"
            return "next" if code in ANSWERS else "later"
        except (FederationError, DamagedError, InterruptedUploadError, OSError) as error:
            logger.warning("no exchange with site '%s': %s", peer, error or "its model was damaged")
            if success is not None:
                note_event("missed", reason=str(error))
            return "next"
        self._contacts.reached(peer)
        if reply.verdict == "accept":
            if success is not None:
                note_event(success, verdict=reply.verdict)
                logger.info("sent %s to site '%s'", letter.name, peer)
            return "done"
        if reply.verdict in UNDECIDED and self._in_lockstep():
            return "later"
        logger.info("site '%s' and this site exchange nothing: %s %s", peer, reply.verdict, reply.reason)
        note_event("declined", verdict=reply.verdict, **({"reason": reply.reason} if reply.reason else {}))
        return "next"

    def _in_lockstep(self) -> bool:
        state = self._mailbox.state()
        return state is not None and state.lockstep

    def _sends(self, peer: str, what: str, **facts: object) -> None:
        self._outgoing({"to": f"{peer} at {self._site.peers[peer]}", "what": what, **facts}, repeats=what != "upload")


def _reason(error: Exception) -> tuple[grpc.StatusCode, str]:
    """Status and sentence of an exchange that failed."""
    if isinstance(error, grpc.RpcError):
        return error.code(), printable(readable(str(error.details())))
    if isinstance(error, UnreachableError):
        return grpc.StatusCode.UNAVAILABLE, str(error)
    return grpc.StatusCode.CANCELLED, "it stalled or was stopped, or its certificate has been revoked"


def _facts(letter: Letter) -> dict[str, object]:
    version = letter.version
    described = {"site": version.site, "vector": dict(version.vector), "epoch": version.epoch}
    return {
        "run": letter.run, **described, "training_cases": letter.training_cases, "initial": letter.initial,
        "schema": letter.schema,
    }  # fmt: skip
