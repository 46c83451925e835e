"""Who calls: names come from certificates, and whoever does not belong is refused before anything is read.

Source: ours, on gRPC's authentication context.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import grpc
from google.protobuf.message import Message
from grpc_health.v1.health import SERVICE_NAME as HEALTH

from nnunet_fed.certificates.deny_list import DenyList
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.study.federation import COORDINATOR, WATCHER
from nnunet_fed.transport.channel.refusals import refuse

if TYPE_CHECKING:
    from nnunet_fed.certificates.x509 import Certificate  # it imports a library that plain text does not need

logger = logging.getLogger(__name__)

READING = {"/nnunet_fed.v1.Coordinator/Status", f"/{HEALTH}/Check"}
"""The methods that :data:`COORDINATOR` and :data:`WATCHER` may call too."""


class Identity:
    """Lets sites in, each under the name in its certificate, whatever a message says.

    TLS has seen before that an authority of ours signed the certificate and that its owner holds the key. Checked here,
    with every call, since a connection may outlive all of this: the validity, the deny list, the names of sites.

    Args:
        sites: names of those who may call.
        stranger: what another is told after its name, a sentence's end and what to do.
        revoked: certificates that are no longer accepted.
    """

    def __init__(self, sites: Collection[str], stranger: str, revoked: DenyList | None = None):
        self._sites = sites
        self._stranger = stranger
        self._revoked = revoked

    def admit(self, method: str, context: grpc.ServicerContext) -> Certificate:
        """The caller's certificate; one that may not call this method is refused."""
        pem = context.auth_context().get("x509_pem_cert", [b""])[0]
        try:
            caller = _certificate(pem)
        except ConfigurationError:
            refuse(context, "Your certificate cannot be read.", grpc.StatusCode.UNAUTHENTICATED)
        if caller.days_left <= 0:
            text = f"{whose(caller)} expired on {caller.ends:%Y-%m-%d %H:%M} UTC. Renew it (docs/security.md)."
            refuse(context, text, grpc.StatusCode.UNAUTHENTICATED)
        if caller.weakness:
            refuse(context, f"{whose(caller)} has {caller.weakness}.", grpc.StatusCode.UNAUTHENTICATED)
        try:
            revoked = self.is_revoked(caller)
        except ConfigurationError as error:  # nothing is lost: whoever calls tries again
            logger.error("nobody is let in: %s", error)
            text = "The list of revoked certificates cannot be read there."
            refuse(context, text, grpc.StatusCode.UNAVAILABLE)
        if revoked:
            refuse(context, revocation(caller), grpc.StatusCode.PERMISSION_DENIED)
        if caller.name not in self._sites and not (method in READING and caller.name in (COORDINATOR, WATCHER)):
            text = f"{whose(caller)} is valid, but '{caller.name}' {self._stranger}"
            refuse(context, text, grpc.StatusCode.PERMISSION_DENIED)
        return caller

    def is_revoked(self, caller: Certificate) -> bool:
        """Whether a certificate is no longer accepted; raises :class:`ConfigurationError` if the list is damaged."""
        return self._revoked is not None and caller.serial in self._revoked


def whose(caller: Certificate) -> str:
    """How a sentence about a certificate begins."""
    return f"The certificate of '{caller.name}' (serial number {caller.serial})"


def revocation(caller: Certificate) -> str:
    """What the owner of a revoked certificate is told."""
    return f"{whose(caller)} has been revoked. Ask the study's operator for a new one."


def check_names(name: str, request: Message, context: grpc.ServicerContext) -> None:
    """See that every field ``site`` of a message says the name in the caller's certificate."""
    for claimed in _claimed(request):
        if claimed != name:
            refuse(
                context,
                f"The certificate is of '{name}', the message says '{claimed}': a site's name is what its certificate "
                "says. Correct 'name' or 'certificate' in site.toml.",
                grpc.StatusCode.PERMISSION_DENIED,
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
