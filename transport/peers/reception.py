"""A peer's model before it is let into the mailbox: whether it is wanted, and what is in it. Source: ours.

The same for a model that is pushed here and for one that this site has pulled.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nnunet_fed.errors import RefusedError
from nnunet_fed.exchange.payload import check_finite, open_payload
from nnunet_fed.exchange.uploads import Spool, Upload
from nnunet_fed.gossip.mailbox import Letter, Mailbox, State, described
from nnunet_fed.gossip.schedule import judge
from nnunet_fed.study.site import Site
from nnunet_fed.transport.channel.rate_limit import RateLimit
from nnunet_fed.transport.channel.retry import DamagedError
from nnunet_fed.transport.channel.transfer import data_of
from nnunet_fed.transport.peers.model_message import incompatibility, letter_of
from nnunet_fed.transport.peers.stalled_transfers import given_up_if_stalled
from nnunet_fed.transport.proto import federation_pb2 as pb

logger = logging.getLogger(__name__)

ARRIVALS = 2
"""Models that may arrive at a time, one of a peer."""


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
        self._rate_limit = RateLimit(site.peer_megabytes_per_second, stopped)
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
            verdict = judge(letter.version, known, state.version.epoch, state.max_epoch_distance)
        position = self._spool.position(_upload(letter)) if verdict == "accept" else 0
        return pb.PeerReply(verdict=verdict, reason=reason, position=position)

    def position(self, model: pb.Model) -> int:
        """How many bytes of a model's payload have come already."""
        return self._spool.position(_upload(letter_of(model)))

    def refused(self, model: pb.Model, reply: pb.PeerReply) -> None:
        """Record that a model was not wanted."""
        why = {"reason": reply.reason} if reply.reason else {}
        self._note_event("refused", letter_of(model), verdict=reply.verdict, **why)

    def take(
        self, model: pb.Model, messages: Iterable[pb.ModelChunk | memoryview], cancel: Callable[[], object],
        revoked: Callable[[], bool] = lambda: False,
    ) -> pb.PeerReply:  # fmt: skip
        """Take the bytes of a model from its position on, and put it into the inbox.

        Args:
            model: for which :meth:`reply` has just said ``accept``.
            messages: whose data follow.
            cancel: ends the call.
            revoked: whether it shall be ended.

        Raises:
            RefusedError: the content is not what was agreed upon, or has numbers that are not finite.
            DamagedError: the bytes are not those offered.
            OSError: the disk is full, or broken; the inbox is as before.
        """
        letter, started, arrived = letter_of(model), time.monotonic(), model.position

        def count(number: int) -> None:
            nonlocal arrived
            self._rate_limit.passed(number - arrived)
            arrived = number

        with self._place(letter) as free:
            if not free:
                return pb.PeerReply(verdict="busy")
            self._spool.quota = letter.size * len(self._site.peers)  # all payloads of a run have one size
            try:
                with given_up_if_stalled(cancel, lambda: arrived, self._stopped, revoked=revoked):
                    payload = self._spool.take(_upload(letter), model.position, data_of(messages), count)
                if payload is None:
                    raise DamagedError
                try:
                    _check(payload, letter)
                    self._mailbox.deliver(letter, payload)
                finally:
                    payload.unlink(missing_ok=True)
            except (RefusedError, DamagedError, OSError) as error:
                if isinstance(error, OSError):
                    self._spool.forget_site(letter.run, model.site)
                with suppress(OSError):  # if the disk is full
                    self._note_event("refused", letter, bytes=arrived - model.position, reason=str(error) or "damaged")
                raise
            moved = {"bytes": letter.size - model.position, "seconds": round(time.monotonic() - started, 3)}
            self._note_event("received", letter, **moved, verdict="accept")
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
    def _place(self, letter: Letter) -> Iterator[bool]:
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

    def _note_event(self, event: str, letter: Letter, **facts: object) -> None:
        site, counter = letter.version.site, letter.version.counter
        nothing = {"bytes": 0, "seconds": 0.0}
        self._mailbox.note_event(event=event, peer=site, site=site, counter=counter, **{**nothing, **facts})


def _check(payload: Path, letter: Letter) -> None:
    """See that a payload is what was described; it is closed afterwards, without which Windows moves no file."""
    tensors = open_payload(payload)
    if described(tensors)[0] != letter.schema:
        raise RefusedError(f"The tensors of site '{letter.version.site}' are not those that it has described.")
    check_finite(tensors)


def _upload(letter: Letter) -> Upload:
    return Upload(letter.run, "model", letter.version.site, letter.digest, letter.size)
