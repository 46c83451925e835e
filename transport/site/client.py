"""A site's communicator over gRPC: what it asks of the coordinator, and tells it."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

import grpc

from nnunet_fed.coordinator.record_pages import FIRST_PAGE, add_page
from nnunet_fed.errors import (
    DeadlineError,
    NoContributionError,
    NotFiniteError,
    RefusedError,
    RoundClosedError,
    UnknownCollectiveError,
    WithdrawnError,
)
from nnunet_fed.exchange.communicator import Held, Verb, check_weight
from nnunet_fed.exchange.keys import MODEL, last_round, name_of
from nnunet_fed.exchange.outgoing_log import Outgoing, array_entry, tensors_entry, value_entry
from nnunet_fed.exchange.payload import Array, Tensors, check_finite, decode, encode
from nnunet_fed.exchange.precision import narrow, widen
from nnunet_fed.logs import printable
from nnunet_fed.strict_json import to_json
from nnunet_fed.study.address import readable
from nnunet_fed.study.federation import Federation, Fold, canonical_json
from nnunet_fed.study.site import Site
from nnunet_fed.study.table import NEWEST_PROTOCOL, OLDEST_PROTOCOL
from nnunet_fed.transport.channel.options import message_bytes
from nnunet_fed.transport.channel.retry import DamagedError, call_with_retries, first_reply
from nnunet_fed.transport.channel.tls import check_name, check_security, diagnose, open_channel
from nnunet_fed.transport.channel.transfer import Inbound, Outbound, seconds_allowed
from nnunet_fed.transport.channel.zero_copy_streams import Stub
from nnunet_fed.transport.proto import federation_pb2 as pb

logger = logging.getLogger(__name__)

T = TypeVar("T")

LONG_POLL = 15.0
"""Seconds for which one call asks the coordinator to wait."""
OVERDUE = 60.0
"""Seconds after which a call is given up that should have been answered."""
LONGEST_TRANSFER = 3600.0
"""Seconds after which a download is asked for again; it goes on where it is."""


class GrpcCommunicator:
    """The collectives of :class:`nnunet_fed.exchange.communicator.Collectives` at a site, through the coordinator.

    The channel opens with the first call and may be closed and opened again. A process must not fork once it has opened
    one, even if it is closed: a forked child may hang.

    Args:
        site: this site's settings.
        outgoing: hears of everything that this site sends, before it leaves (:mod:`nnunet_fed.exchange.outgoing_log`).
        corrects: if this site tells something else while planning than it has told before, it withdraws that, once.

    Raises:
        ConfigurationError: the coordinator's address needs TLS, or a file for it is missing or wrong.
    """

    def __init__(self, site: Site, outgoing: Outgoing = lambda entry: None, corrects: bool = False):
        check_security(site)
        self.site = site.name
        self.bytes_sent = 0
        self.bytes_received = 0
        self.weights: dict[str, float] = {}
        """Who took part in the last collective, and with which weight."""
        self._settings = site
        self._outgoing = outgoing
        self._corrects = corrects
        self._knows_corrections = True
        self._channel: grpc.Channel | None = None
        self._opened: Stub | None = None
        self._random = random.Random()  # not the global one, whose state belongs to the training
        self._patience = 60 * site.connect_minutes
        self._purpose = ""
        self.study: Federation
        self.run = ""
        self.attempt = 0
        self.generation = 0
        """How often rounds of the run had been undone when it was opened."""
        self.standing = ""
        """Where the model stands that this site held when it joined (:mod:`nnunet_fed.coordinator.reconciliation`);
        empty: it held none."""
        self.held: Held | None = None
        """The newest model of the federation that this site has taken."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of all sites of the study, sorted."""
        return self.study.sites

    def join(
        self,
        purpose: str,
        digest: str = "",
        configuration: str = "",
        trainer: str = "",
        fresh: bool = False,
        fold: Fold | None = None,
        held: Held | None = None,
    ) -> Federation:
        """Join the run; returns the study as the coordinator has it.

        Args:
            purpose, digest, configuration, trainer, fresh, fold: see
                :meth:`nnunet_fed.coordinator.members.Members.join`.
            held: the newest model that this site has taken, before it was started again.

        Raises:
            ConfigurationError: this site's certificate is another's, or this version of nnunet_fed does not know what
                the study asks for.
            RefusedError: see :meth:`nnunet_fed.coordinator.members.Members.join`.
            UnreachableError: no coordinator answers within ``connect_minutes``.
        """
        check_name(self._settings)
        self._patience = 60 * self._settings.connect_minutes
        facts: dict[str, Any] = {
            "protocol": OLDEST_PROTOCOL, "newest_protocol": NEWEST_PROTOCOL, "site": self.site, "purpose": purpose,
            "digest": digest, "configuration": configuration, "trainer": trainer, "fresh": fresh,
            "fold": "" if fold is None else str(fold),
        }  # fmt: skip
        if held is not None:
            facts["held"] = held._asdict()
        request = pb.JoinRequest(**facts)
        self._sends("join", **facts)
        reply = self._call(lambda: self._stub.Join(request, timeout=30))
        self.study = Federation.restore(json.loads(reply.study))
        self.run, self.attempt, self._purpose = reply.run, reply.attempt, purpose
        self._knows_corrections = reply.protocol > OLDEST_PROTOCOL
        self.generation, self.standing, self.held = reply.generation, reply.standing, held
        minutes = self.study.planning_deadline_minutes if purpose == "planning" else self.study.deadline_minutes
        self._patience = 60 * minutes
        return self.study

    def mean(self, key: str, tensors: Tensors, weight: float, exact: bool = False) -> dict[str, Array]:
        """See :meth:`nnunet_fed.exchange.communicator.Collectives.mean`.

        Raises:
            RefusedError: also if a value is too large for the study's ``wire_dtype``.
            NotFiniteError: a number in the tensors is not finite; the others are told that nobody need wait.
        """
        wire_dtype = "float32" if exact else self.study.wire_dtype
        sent = narrow(tensors, wire_dtype) if check_weight(weight) > 0 else {}
        self._require_finite(key, sent)
        pieces = encode(sent) if weight > 0 else None
        result = decode(self._collective(key, "mean", weight, pieces, lambda: tensors_entry(sent)))
        check_finite(result)
        return result if wire_dtype == "float32" else widen(result)

    def _require_finite(self, key: str, tensors: Tensors) -> None:
        try:
            check_finite(tensors)
        except NotFiniteError as error:
            if self._purpose == "training":
                self.leave(f"what it has for {key} is not finite", returns=True)
            raise NotFiniteError(
                f"Site '{self.site}' has nothing to give to '{key}'. {error} If so, continue with --c: this site then "
                "starts anew from the federation's newest model. If it diverges again, look into its data."
            ) from None

    def sum(self, key: str, array: Array) -> Array:
        """See :meth:`nnunet_fed.exchange.communicator.Collectives.sum`. Errors also as in :meth:`mean`."""
        self._require_finite(key, {"value": array})
        pieces = encode({"value": array})
        return decode(self._collective(key, "sum", 1.0, pieces, lambda: array_entry(array)))["value"]

    def gather(self, key: str, value: Any) -> dict[str, Any]:
        """See :meth:`nnunet_fed.exchange.communicator.Collectives.gather`."""
        text = canonical_json(value)
        data = self._collective(key, "gather", 1.0, [text], lambda: value_entry(value))
        gathered: dict[str, Any] = json.loads(bytes(data))
        return gathered

    def gathered(self, key: str) -> dict[str, Any] | None:
        """What the sites have gathered, without contributing to it; ``None``: nothing yet."""
        try:
            inbound = Inbound()
            header = self._call(lambda: self._ask(key, inbound, wait=0))
        except UnknownCollectiveError:
            return None
        result: dict[str, Any] | None = json.loads(bytes(inbound.buffer)) if header.status == "closed" else None
        return result

    def newest(self, name: str) -> str | None:
        """Key of the newest closed mean called ``SCOPE/name`` whose result is kept; ``None``: there is none."""
        return self._call(lambda: self._stub.Newest(pb.NewestRequest(run=self.run, name=name), timeout=30)).key or None

    def fetch(self, key: str) -> dict[str, Array]:
        """The stored result of a closed mean, without contributing to it. Errors as in :meth:`mean`."""
        result = decode(self._result(key))
        check_finite(result)
        return result if self.study.wire_dtype == "float32" else widen(result)

    def report(self, progress: dict[str, Any], wait: bool = False) -> None:
        """Tell what this site is doing, to those who watch; never fails, and waits only when told to."""
        request = pb.ReportRequest(run=self.run, site=self.site, progress=to_json(progress))
        self._sends("report", run=self.run, progress=progress)
        call = self._stub.Report.future(request, timeout=30)
        if wait:
            with suppress(grpc.RpcError, grpc.FutureTimeoutError):
                call.result(timeout=5)

    def note(self, text: str) -> None:
        """Tell what happened at this site, for the record; a coordinator that does not answer does not get it."""
        self._sends("note", run=self.run, text=text)
        self._once(lambda: self._stub.Report(pb.ReportRequest(run=self.run, site=self.site, note=text), timeout=10))

    def leave(self, reason: str, returns: bool = False) -> None:
        """Take leave in order: no later round waits for this site. A coordinator that does not answer is not told.

        Args:
            reason: for the record.
            returns: this site will come back; who needs it for the quorum waits.
        """
        self._sends("leave", run=self.run, reason=reason, returns=returns)
        request = pb.LeaveRequest(run=self.run, site=self.site, reason=reason, returns=returns)
        self._once(lambda: self._stub.Leave(request, timeout=10))

    def _once(self, call: Callable[[], object]) -> None:
        try:
            call()
        except grpc.RpcError as error:
            logger.warning("the coordinator could not be told: %s", readable(str(error.details())))

    def status(self, record: bool = False) -> dict[str, Any]:
        """The coordinator's state; see :meth:`nnunet_fed.coordinator.coordinator.Coordinator.status`. The record comes
        page by page, but from a coordinator of version 0.1."""
        request = pb.StatusRequest(record=record, newest_protocol=NEWEST_PROTOCOL, page=FIRST_PAGE if record else "")
        reply = self._call(lambda: self._stub.Status(request, timeout=30))
        status: dict[str, Any] = json.loads(reply.status)
        while reply.next:
            request.page = reply.next
            reply = self._call(lambda: self._stub.Status(request, timeout=30))
            add_page(status, json.loads(reply.status))
        return status

    def status_at_once(self) -> dict[str, Any]:
        """As :meth:`status`; empty if the coordinator does not answer at once."""
        try:
            reply = self._stub.Status(pb.StatusRequest(newest_protocol=NEWEST_PROTOCOL), timeout=10)
        except grpc.RpcError as error:
            details = readable(str(error.details()))
            logger.warning("the coordinator could not be asked whether the training goes on: %s", details)
            return {}
        status: dict[str, Any] = json.loads(reply.status)
        return status

    def close(self) -> None:
        """Close the channel; the next call opens another."""
        if self._channel is not None:
            self._channel.close()
        self._channel = self._opened = None

    @property
    def _stub(self) -> Stub:
        if self._opened is None:
            self._channel = open_channel(self._settings)
            self._opened = Stub(self._channel)
        return self._opened

    def _sends(self, what: str, **facts: Any) -> None:
        self._outgoing({"to": self._settings.coordinator, "what": what, **facts})

    def _collective(
        self,
        key: str,
        verb: Verb,
        weight: float,
        pieces: Iterable[bytes | memoryview] | None,
        content: Callable[[], dict[str, Any]],
    ) -> memoryview:
        outbound = Outbound(pieces or ())
        offer = pb.OfferRequest(
            run=self.run, key=key, site=self.site, verb=verb, weight=weight,
            digest=outbound.digest if pieces else "", size=outbound.size,
            held=None if self.held is None else pb.Held(**self.held._asdict()), correct=self._corrects,
        )  # fmt: skip
        contribute = partial(self._offer, offer, outbound, content)
        try:
            contribute()
            return self._result(key, contribute)
        except WithdrawnError as error:
            corrects, self._corrects = self._corrects, False  # nothing that this site has told stands any more
            if error.site != self.site or corrects:
                raise
            raise RefusedError(
                f"Another command at site '{self.site}' has withdrawn what it told, and plans anew. This one ends."
            ) from None

    def _offer(self, offer: pb.OfferRequest, outbound: Outbound, content: Callable[[], dict[str, Any]]) -> None:
        """Contribute, unless a contribution of this site stands."""
        key = offer.key
        self._sends("offer", **_facts(offer))
        verdict = self._call(lambda: self._contribute(offer, outbound, content), lambda: outbound.reached)
        if verdict == "closed":
            if self._purpose == "planning":
                raise RoundClosedError(
                    f"The others have planned without site '{self.site}'. Join them: nnunet_fed plan_and_preprocess "
                    "... --join. Or let the coordinator open a new attempt, in which all sites plan and train anew."
                )
            raise RoundClosedError(f"'{key}' closed without site '{self.site}'.")
        if verdict == "differs":
            if self._purpose == "planning":
                raise RefusedError(
                    f"Site '{self.site}' has already contributed other values to '{key}': its data set or software "
                    f"changed since. Undo that, or {self._remedy()}"
                )
            logger.warning("'%s': this site has already contributed other values; those stand.", key)

    def _remedy(self) -> str:
        """How to tell something else than this site has told while planning."""
        anew = "let the coordinator open a new attempt (nnunet_fed new-attempt STATE) and plan at all sites again."
        if self._knows_corrections:
            return (
                "correct what it has told: give the same command with --correct, and all sites plan anew. Once the "
                f"plans are agreed that is refused: then {anew}"
            )
        return f"{anew} (The coordinator's version of nnunet_fed does not know --correct.)" if self._corrects else anew

    def _contribute(self, offer: pb.OfferRequest, outbound: Outbound, content: Callable[[], dict[str, Any]]) -> str:
        reply = self._stub.Offer(offer, timeout=60)
        verdict: str = reply.verdict
        if verdict == "send":
            offer.position = reply.position
            self._sends("upload", **_facts(offer), **content())
            size = message_bytes(len(self.study.sites))
            try:
                upload = self._stub.Upload(outbound.messages(offer, size), timeout=seconds_allowed(offer.size))
                verdict = upload.verdict
            finally:
                self.bytes_sent += max(0, outbound.reached - offer.position)
                offer.position = 0
        return verdict

    def _result(self, key: str, contribute: Callable[[], None] | None = None) -> memoryview:
        """Wait for a result and take it; whoever waits is told for whom and until when.

        A coordinator that has lost what this site gave it (its machine stopped, or was restored) has it contribute
        again.
        """
        told: Sequence[str] = ()
        inbound = Inbound()
        while True:
            try:
                header = self._call(lambda: self._ask(key, inbound, LONG_POLL), lambda: inbound.reached)
            except UnknownCollectiveError:
                if contribute is None:
                    raise
                contribute()
                continue
            if header.status == "closed":
                self.weights = dict(sorted(header.weights.items()))
                self._takes(key, header.digest)
                return inbound.buffer
            if header.status == "empty":
                raise NoContributionError(f"No site contributed to '{key}'.")
            if header.status == "failed":
                raise DeadlineError(printable(header.error))
            if header.status == "pruned":
                raise RoundClosedError(f"The result of '{key}' is no longer kept.")
            if header.wanted and contribute is not None:
                contribute()
            if list(header.missing) != list(told):
                told = list(header.missing)
                until = datetime.fromtimestamp(header.closes_at).strftime("%Y-%m-%d %H:%M:%S")
                who = printable(", ".join(told)) or "the result"
                logger.info("waiting for %s in '%s', until %s at most", who, key, until)

    def _takes(self, key: str, digest: str) -> None:
        """Note which model this site has: the one of the latest round, whatever else it reads."""
        if name_of(key) == MODEL and (self.held is None or last_round(key) >= last_round(self.held.key)):
            self.held = Held(key, digest)

    def _ask(self, key: str, inbound: Inbound, wait: float) -> pb.ResultHeader:
        request = pb.ResultRequest(
            run=self.run, key=key, site=self.site, wait_seconds=wait, digest=inbound.digest, position=inbound.reached
        )
        replies = self._stub.Result(request, timeout=LONGEST_TRANSFER)
        header: pb.ResultHeader = first_reply(replies, wait + OVERDUE).header
        if header.status == "closed":
            inbound.start(header)
        before = inbound.reached
        try:
            for reply in replies:
                inbound.write(reply if isinstance(reply, memoryview) else reply.data)
        finally:
            self.bytes_received += inbound.reached - before
        if header.status == "closed" and not inbound.is_whole():
            raise DamagedError
        return header

    def _call(self, function: Callable[[], T], reached: Callable[[], int] = lambda: 0) -> T:
        """Try until an answer comes or the patience ends, with growing, jittered pauses."""
        settings = self._settings
        return call_with_retries(
            function, self._patience, settings.coordinator, self._random, reached, lambda: diagnose(settings)
        )


def _facts(offer: pb.OfferRequest) -> dict[str, Any]:
    facts = {"run": offer.run, "key": offer.key, "verb": offer.verb, "weight": offer.weight}
    held = {"held": {"key": offer.held.key, "digest": offer.held.digest}} if offer.HasField("held") else {}
    correct = {"correct": True} if offer.correct else {}
    begun = {"from_byte": offer.position} if offer.position else {}
    return {**facts, **held, "bytes": offer.size, "digest": offer.digest, **correct, **begun}
