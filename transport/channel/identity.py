"""Who calls: names come from certificates, and whoever does not belong is refused before anything is read.

Source: ours, on gRPC's server interceptors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from google.protobuf.message import Message
from grpc_health.v1.health import SERVICE_NAME as HEALTH

from nnunet_fed.certificates.deny_list import DenyList
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.study.federation import COORDINATOR, WATCHER

if TYPE_CHECKING:
    from nnunet_fed.certificates.x509 import Certificate  # it imports a library that plain text does not need

logger = logging.getLogger(__name__)

READING = {"/nnunet_fed.v1.Coordinator/Status", f"/{HEALTH}/Check"}
"""The methods that :data:`COORDINATOR` and :data:`WATCHER` may call too."""


class IdentityInterceptor(grpc.ServerInterceptor):  # type: ignore[misc]
    """Let sites in, each under the name in its certificate, whatever a message says.

    TLS has seen before that an authority of ours signed the certificate and that its owner holds the key. Checked here,
    with every call, since a connection may outlive all of this: the validity, the deny list, the names of sites, and
    that every field ``site`` of every message says the certificate's name.

    Args:
        sites: names of those who may call.
        stranger: what another is told after its name, a sentence's end and what to do.
        revoked: certificates that are no longer accepted.
    """

    def __init__(self, sites: Collection[str], stranger: str, revoked: DenyList | None = None):
        self._sites = sites
        self._stranger = stranger
        self._revoked = revoked

    def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Any], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """See :class:`grpc.ServerInterceptor`."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        kind = (
            f"{'stream' if handler.request_streaming else 'unary'}_"
            f"{'stream' if handler.response_streaming else 'unary'}"
        )
        serve, admit = getattr(handler, kind), partial(self._admit, handler_call_details.method)

        def guarded(request: Any, context: grpc.ServicerContext) -> Any:
            name = admit(context)
            if handler.request_streaming:
                return serve(_own(name, request, context), context)
            _check_names(name, request, context)
            return serve(request, context)

        wrap = getattr(grpc, f"{kind}_rpc_method_handler")
        return wrap(guarded, handler.request_deserializer, handler.response_serializer)

    def _admit(self, method: str, context: grpc.ServicerContext) -> str:
        """The caller's name."""
        pem = context.auth_context().get("x509_pem_cert", [b""])[0]
        try:
            caller = _certificate(pem)
        except ConfigurationError:
            _refuse(context, "Your certificate cannot be read.", grpc.StatusCode.UNAUTHENTICATED)
        whose = f"The certificate of '{caller.name}' (serial number {caller.serial})"
        if caller.days_left <= 0:
            text = f"{whose} expired on {caller.ends:%Y-%m-%d %H:%M} UTC. Renew it (docs/security.md)."
            _refuse(context, text, grpc.StatusCode.UNAUTHENTICATED)
        try:
            revoked = self._revoked is not None and caller.serial in self._revoked
        except ConfigurationError as error:  # nothing is lost: whoever calls tries again
            logger.error("nobody is let in: %s", error)
            text = "The list of revoked certificates cannot be read there."
            _refuse(context, text, grpc.StatusCode.UNAVAILABLE)
        if revoked:
            _refuse(context, f"{whose} has been revoked. Ask the study's operator for a new one.")
        if caller.name not in self._sites and not (method in READING and caller.name in (COORDINATOR, WATCHER)):
            _refuse(context, f"{whose} is valid, but '{caller.name}' {self._stranger}")
        return caller.name


def _own(
    name: str, requests: Iterator[Message | memoryview], context: grpc.ServicerContext
) -> Iterator[Message | memoryview]:
    for request in requests:
        if isinstance(request, Message):  # the rest are data (nnunet_fed.transport.channel.zero_copy_streams)
            _check_names(name, request, context)
        yield request


def _check_names(name: str, request: Message, context: grpc.ServicerContext) -> None:
    for claimed in _claimed(request):
        if claimed != name:
            _refuse(
                context,
                f"The certificate is of '{name}', the message says '{claimed}': a site's name is what its certificate "
                "says. Correct 'name' or 'certificate' in site.toml.",
            )


def _claimed(message: Message) -> Iterator[str]:
    """Every site that a message says it is from; its bytes are not looked at."""
    for field in message.DESCRIPTOR.fields:
        if field.name == "site":
            yield getattr(message, field.name)
        elif field.message_type is not None and field.has_presence and message.HasField(field.name):
            yield from _claimed(getattr(message, field.name))


@lru_cache(maxsize=256)
def _certificate(pem: bytes) -> Certificate:
    from nnunet_fed.certificates.x509 import read_certificates

    return read_certificates(pem, "The caller")[0]


def _refuse(
    context: grpc.ServicerContext, text: str, code: grpc.StatusCode = grpc.StatusCode.PERMISSION_DENIED
) -> NoReturn:
    logger.warning("refused %s: %s", context.peer(), text)
    context.abort(code, text)
    raise AssertionError("abort does not return")
