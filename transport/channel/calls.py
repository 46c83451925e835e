"""The calls under way: whose they are, how many each caller may have, and how long one may keep silent.

Source: ours, on gRPC's server interceptors.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError, Message

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.study.address import readable
from nnunet_fed.transport.channel.identity import Identity, check_names, revocation
from nnunet_fed.transport.channel.refusals import SPARING_LOG, caller_of, refuse

if TYPE_CHECKING:
    from nnunet_fed.certificates.x509 import Certificate  # it imports a library that plain text does not need

logger = logging.getLogger(__name__)

SHARE = 8
"""Calls that one caller may have under way: one that waits, two uploads, a download, a check, and short ones."""
FIRST_SECONDS, MESSAGE_SECONDS = 20.0, 60.0
"""For the first message of a call, and for each further one to come or to go: 17 kB/s if it has 1 MiB."""
LONGEST_METHOD = 100
"""Characters of a name that are logged."""
GLANCE_SECONDS = 1.0
"""Pause between two looks at the calls that are under way."""


class Call:
    """A call under way.

    Args:
        certificate: the caller's; ``None``: plain text.
        context: gRPC's.
    """

    def __init__(self, certificate: Certificate | None, context: grpc.ServicerContext):
        self.certificate = certificate
        self.context = context
        self.idle_since: float | None = None
        """When it began to wait for the network; ``None``: it does not."""
        self.allowed = FIRST_SECONDS
        """Seconds for that."""
        self.revoked = self.ended = False
        """Set once the certificate is found on the deny list; once the call was ended for one of these reasons."""

    @property
    def who(self) -> str:
        """The caller, for the log."""
        name = "somebody" if self.certificate is None else f"'{self.certificate.name}'"
        return f"{name} ({readable(self.context.peer())})"

    def receive(self, messages: Iterator[bytes]) -> Iterator[bytes]:
        """The caller's messages, unless it keeps silent for too long or its certificate is revoked meanwhile."""
        while True:
            self.idle_since = time.monotonic()
            try:
                message = next(messages)
            except StopIteration:
                return
            except grpc.RpcError:
                if self.allowed == FIRST_SECONDS and not self.ended:
                    text = "it broke off, or its message was not acceptable (compressed, or too large)"
                    SPARING_LOG.warn(f"nothing of {caller_of(self.context)}", f"no message of {self.who} came: {text}")
                raise
            finally:
                self.idle_since, self.allowed = None, MESSAGE_SECONDS
            self._check()
            yield message

    def send(self, replies: Iterator[Any]) -> Iterator[Any]:
        """The replies, unless the caller does not take them for too long or its certificate is revoked meanwhile."""
        for reply in replies:
            self._check()
            self.allowed, self.idle_since = MESSAGE_SECONDS, time.monotonic()
            yield reply
            self.idle_since = None

    def _check(self) -> None:
        if self.revoked and self.certificate is not None:
            refuse(self.context, revocation(self.certificate), grpc.StatusCode.PERMISSION_DENIED)


class Calls(grpc.ServerInterceptor):  # type: ignore[misc]
    """See who calls before anything of a call is read, and end calls that keep others from theirs.

    Every handler becomes one that takes its messages as a stream of bytes: only so is it called before they have come.

    Args:
        identity: knows who may call; ``None``: plain text, anybody.
    """

    def __init__(self, identity: Identity | None):
        self._identity = identity
        self._lock = threading.Lock()
        self._calls: set[Call] = set()
        self._number: Counter[str] = Counter()
        """Of calls under way, by the caller's name."""
        self._stopped = threading.Event()

    def start(self) -> None:
        """Begin to look at the calls under way, in a thread."""
        threading.Thread(target=self._watch, name="calls", daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()

    def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Any], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """See :class:`grpc.ServerInterceptor`."""
        method = handler_call_details.method
        handler = continuation(handler_call_details)
        if handler is None:
            SPARING_LOG.warn("", f"refused: there is no method {method[:LONGEST_METHOD]} here")
            return None

        def answer(messages: Iterator[bytes], context: grpc.ServicerContext, call: Call) -> Any:
            requests = _understood(handler.request_deserializer, call.receive(messages), call)
            if handler.request_streaming:
                serve = handler.stream_stream if handler.response_streaming else handler.stream_unary
                return serve(requests, context)
            request = next(requests, None)
            if request is None:
                refuse(context, f"{method} takes one message.", grpc.StatusCode.INVALID_ARGUMENT)
            return (handler.unary_stream if handler.response_streaming else handler.unary_unary)(request, context)

        def unary(messages: Iterator[bytes], context: grpc.ServicerContext) -> Any:
            with self._under_way(method, context) as call:
                return answer(messages, context, call)

        def stream(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[Any]:
            with self._under_way(method, context) as call:
                yield from call.send(answer(messages, context, call))

        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(stream, None, handler.response_serializer)
        return grpc.stream_unary_rpc_method_handler(unary, None, handler.response_serializer)

    @contextmanager
    def _under_way(self, method: str, context: grpc.ServicerContext) -> Iterator[Call]:
        """A call of somebody who may call, and has not too many of them; others are refused."""
        certificate = None if self._identity is None else self._identity.admit(method, context)
        call = Call(certificate, context)
        name = "" if certificate is None else certificate.name
        with self._lock:
            full = self._number[name] >= SHARE and certificate is not None
            if not full:
                self._number[name] += 1
                self._calls.add(call)
        if full:
            text = f"'{name}' has {SHARE} calls under way, and has to wait for one to end."
            refuse(context, text, grpc.StatusCode.RESOURCE_EXHAUSTED)
        try:
            yield call
        finally:
            with self._lock:
                self._number[name] -= 1
                self._calls.discard(call)

    def _watch(self) -> None:
        while not self._stopped.wait(GLANCE_SECONDS):
            with self._lock:
                calls = list(self._calls)
            for call in calls:
                self._look_at(call)

    def _look_at(self, call: Call) -> None:
        """End a call that has kept silent for too long; of one whose certificate was revoked, tell it first."""
        idle_since, allowed = call.idle_since, call.allowed
        if call.ended:
            return
        if call.revoked or (idle_since is not None and time.monotonic() - idle_since > allowed):
            call.ended = True
            why = "its certificate has been revoked" if call.revoked else f"nothing has moved for {allowed:g} s"
            SPARING_LOG.warn(f"ended {caller_of(call.context)}", f"ended a call of {call.who}: {why}")
            call.context.cancel()
        elif self._identity is not None and call.certificate is not None:
            try:
                call.revoked = self._identity.is_revoked(call.certificate)
            except ConfigurationError as error:  # who is in may go on, who comes is refused
                logger.error("the calls under way go on: %s", error)


def _understood(deserializer: Callable[[bytes], Any] | None, messages: Iterator[bytes], call: Call) -> Iterator[Any]:
    """Messages (or data as views) out of bytes, each of them the caller's own."""
    for message in messages:
        try:
            request = message if deserializer is None else deserializer(message)
        except DecodeError:
            text = "This is no message of the protocol."
            refuse(call.context, text, grpc.StatusCode.INVALID_ARGUMENT)
        if call.certificate is not None and isinstance(request, Message):
            # the rest are data (nnunet_fed.transport.channel.zero_copy_streams)
            check_names(call.certificate.name, request, call.context)
        yield request
