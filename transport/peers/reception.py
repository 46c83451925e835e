"""A peer's model before it is let into the mailbox: whether it is wanted, and what is in it. Source: ours.

The same for a model that is pushed here and for one that this site has pulled.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import MappingProxyType

from nnunet_fed.errors import RefusedError
from nnunet_fed.exchange.payload import check_finite, open_payload
from nnunet_fed.exchange.uploads import Spool, Upload
from nnunet_fed.gossip.mailbox import Letter, Mailbox, State, described
from nnunet_fed.gossip.schedule import Version, judge
from nnunet_fed.study.federation import Site
from nnunet_fed.transport.channel.options import PROTOCOL
from nnunet_fed.transport.channel.rate_limit import Pace
from nnunet_fed.transport.channel.retry import DamagedError
from nnunet_fed.transport.channel.transfer import received
from nnunet_fed.transport.proto import federation_pb2 as pb

logger = logging.getLogger(__name__)

ARRIVALS = 2
"""Models that may arrive at a time, one of a peer."""
STALL_SECONDS = 60.0
"""A transfer in which nothing has moved for so long is given up (notes' 5.5)."""
GLANCE_SECONDS = 0.2
LARGEST_NUMBER = 2**53
"""Of counters and epochs: what JSON holds everywhere."""
DIGEST = re.compile(r"[0-9a-f]{32}")


def message_of(letter: Letter) -> pb.Model:
    """A letter on the wire."""
    return pb.Model(
        protocol=PROTOCOL, site=letter.version.site, run=letter.run, vector=letter.version.vector,
        epoch=letter.version.epoch, training_cases=letter.training_cases, initial=letter.initial, schema=letter.schema,
        digest=letter.digest, size=letter.size,
    )  # fmt: skip


def letter_of(model: pb.Model) -> Letter:
    """A letter off the wire; raises :class:`RefusedError` if it says what none of ours would."""
    version = Version(model.site, dict(sorted(model.vector.items())), model.epoch)
    numbers = (*version.vector.values(), version.epoch, model.training_cases)
    if (
        not DIGEST.fullmatch(model.digest)
        or version.counter < 1
        or model.training_cases < 1
        or max(numbers) > LARGEST_NUMBER
    ):
        raise RefusedError(f"Site '{model.site}' describes its model by what cannot be.")
    return Letter(
        model.run, version, model.training_cases, model.initial, model.schema, model.digest, model.size
    )  # fmt: skip


@contextmanager
def given_up_if_stalled(
    cancel: Callable[[], object], reached: Callable[[], int], stopped: threading.Event, seconds: float = STALL_SECONDS
) -> Iterator[None]:
    """Cancel what goes on within if nothing has moved for so many seconds, or once ``stopped`` is set."""
    done = threading.Event()

    def watch() -> None:
        last, since = reached(), time.monotonic()
        while not done.wait(GLANCE_SECONDS):
            if (now := reached()) != last:
                last, since = now, time.monotonic()
            if stopped.is_set() or time.monotonic() - since > seconds:
                cancel()
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


class Contacts:
    """Which peers answer, and how many training cases they have; the training reads it in the mailbox. Thread-safe."""

    def __init__(self, mailbox: Mailbox):
        self._mailbox = mailbox
        self._lock = threading.Lock()
        self._failures = mailbox.contacts()
        self._members: dict[str, int] = {}
        mailbox.publish_contacts(self._failures, self._members)

    def members(self) -> set[str]:
        """Names of the peers heard of that have not left."""
        with self._lock:
            return set(self._members)

    def reached(self, peer: str) -> None:
        """A peer has called or answered: its failures are forgotten."""
        self._change(peer, failed=False)

    def missed(self, peer: str) -> None:
        """A peer was not reached."""
        self._change(peer, failed=True)

    def introduced(self, peer: str, training_cases: int, leaving: bool) -> None:
        """A peer takes part with so many training cases, or no more."""
        cases = training_cases if 0 < training_cases <= LARGEST_NUMBER and not leaving else None
        self._change(peer, False, {peer: cases})

    def _change(self, peer: str, failed: bool, introduced: Mapping[str, int | None] = MappingProxyType({})) -> None:
        with self._lock:
            failures = {**self._failures, peer: self._failures.get(peer, 0) + 1 if failed else 0}
            known = {**self._members, **introduced}
            members = {name: cases for name, cases in known.items() if cases is not None}
            if (failures[peer], members) != (self._failures.get(peer, 0), self._members):
                self._mailbox.publish_contacts(failures, members)
            self._failures, self._members = failures, members


class Reception:
    """Lets models into a mailbox.

    Args:
        site: this site's settings.
        mailbox: the training's.
        stopped: once set, what arrives is given up.
    """

    def __init__(self, site: Site, mailbox: Mailbox, stopped: threading.Event):
        self._site = site
        self._mailbox = mailbox
        self._stopped = stopped
        self._pace = Pace(site.peer_megabytes_per_second, stopped)
        self._lock = threading.Lock()
        self._arriving: dict[str, Letter] = {}
        self._spool = Spool(mailbox.arriving, quota=0)

    def reply(self, model: pb.Model) -> pb.PeerReply:
        """Whether a model is wanted.

        Raises:
            RefusedError: see :func:`letter_of`; or a site that is no peer has influenced it.
        """
        letter, state = letter_of(model), self._mailbox.state()
        strangers = sorted(letter.version.vector.keys() - self._site.peers.keys())
        if strangers:
            raise RefusedError(
                f"The model of site '{model.site}' has learnt from '{strangers[0]}', which is not among the peers of "
                f"'{self._site.name}': give [peers] in site.toml the same sites everywhere."
            )
        verdict = "busy"
        reason = "" if state is None else self._incompatibility(model, state)
        if reason:
            verdict = "incompatible"
        elif state is not None and state.leaving:
            verdict = "leaving"
        elif state is not None and state.lockstep and letter.version.epoch > state.version.epoch:
            verdict = "early"  # it would take the place of the one that this training takes next
        elif state is not None and not state.busy and self._has_room(letter):
            known = self._mailbox.received()
            verdict = judge(letter.version, state.version, known, state.max_epoch_distance)
        position = self._spool.position(_upload(letter)) if verdict == "accept" else 0
        return pb.PeerReply(verdict=verdict, reason=reason, position=position)

    def position(self, model: pb.Model) -> int:
        """How many bytes of a model's payload have come already."""
        return self._spool.position(_upload(letter_of(model)))

    def refused(self, model: pb.Model, reply: pb.PeerReply) -> None:
        """Record that a model was not wanted."""
        why = {"reason": reply.reason} if reply.reason else {}
        self._record("refused", letter_of(model), verdict=reply.verdict, **why)

    def take(
        self, model: pb.Model, messages: Iterable[pb.ModelChunk | memoryview], cancel: Callable[[], object]
    ) -> pb.PeerReply:
        """Take the bytes of a model from its position on, and put it into the inbox.

        Args:
            model: for which :meth:`reply` has just said ``accept``.
            messages: whose data follow.
            cancel: ends the call.

        Raises:
            RefusedError: the content is not what was agreed upon, or has numbers that are not finite.
            DamagedError: the bytes are not those offered.
            OSError: the disk is full, or broken; the inbox is as before.
        """
        letter, started, arrived = letter_of(model), time.monotonic(), model.position

        def count(number: int) -> None:
            nonlocal arrived
            self._pace.passed(number - arrived)
            arrived = number

        with self._seat(letter) as free:
            if not free:
                return pb.PeerReply(verdict="busy")
            self._spool.quota = letter.size * len(self._site.peers)  # all payloads of a run have one size
            try:
                with given_up_if_stalled(cancel, lambda: arrived, self._stopped):
                    payload = received(self._spool, _upload(letter), model.position, messages, count)
                if payload is None:
                    raise DamagedError
                try:
                    tensors = open_payload(payload)
                    if described(tensors)[0] != letter.schema:
                        raise RefusedError(f"The tensors of site '{model.site}' are not those that it has described.")
                    check_finite(tensors)
                    self._mailbox.deliver(letter, payload)
                finally:
                    payload.unlink(missing_ok=True)
            except (RefusedError, DamagedError, OSError) as error:
                if isinstance(error, OSError):
                    self._spool.forget_site(letter.run, model.site)
                with suppress(OSError):  # if the disk is full
                    self._record("refused", letter, bytes=arrived - model.position, reason=str(error) or "damaged")
                raise
            moved = {"bytes": letter.size - model.position, "seconds": round(time.monotonic() - started, 3)}
            self._record("received", letter, **moved, verdict="accept")
            logger.info("received %s of epoch %d", letter.name, letter.version.epoch)
            return pb.PeerReply(verdict="accept")

    def _incompatibility(self, model: pb.Model, state: State) -> str:
        return incompatibility(model, state, self._site.name) or (
            f"Its payload has {model.size} bytes, this site's {state.size}." if model.size != state.size else ""
        )

    def _has_room(self, letter: Letter) -> bool:
        """The same payload may go on in the place of its own broken connection."""
        same = self._arriving.get(letter.version.site)
        return len(self._arriving) < ARRIVALS if same is None else same.digest == letter.digest

    @contextmanager
    def _seat(self, letter: Letter) -> Iterator[bool]:
        """One of the few places for what arrives, if there is one."""
        site = letter.version.site
        with self._lock:
            free = self._has_room(letter)
            if free:
                self._arriving[site] = letter
        try:
            yield free
        finally:
            with self._lock:
                if self._arriving.get(site) is letter:
                    del self._arriving[site]

    def _record(self, event: str, letter: Letter, **facts: object) -> None:
        site, counter = letter.version.site, letter.version.counter
        nothing = {"bytes": 0, "seconds": 0.0}
        self._mailbox.record(event=event, peer=site, site=site, counter=counter, **{**nothing, **facts})


def incompatibility(theirs: pb.Model | pb.PullRequest, state: State, name: str) -> str:
    """Why the model, or the request for one, does not go with this site's training; empty: it does."""
    if theirs.protocol != PROTOCOL:
        return (
            f"Site '{theirs.site}' speaks version {theirs.protocol} of the protocol, site '{name}' version {PROTOCOL}. "
            "Install the same version of nnunet_fed everywhere."
        )
    if theirs.run != state.run:
        return (
            f"Site '{theirs.site}' trains in another run ({theirs.run[:12]}) than site '{name}' ({state.run[:12]}): "
            "study, configuration and attempt must be the same."
        )
    if theirs.schema != state.schema:
        return f"The network of site '{theirs.site}' has other tensors than that of site '{name}'."
    return ""


def _upload(letter: Letter) -> Upload:
    return Upload(letter.run, "model", letter.version.site, letter.digest, letter.size)
