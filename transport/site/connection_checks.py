"""What ``nnunet_fed check`` finds out about the way to the coordinator. Source: ours."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar

from nnunet_fed.addresses import host_and_port
from nnunet_fed.errors import ConfigurationError, RefusedError
from nnunet_fed.exchange.outgoing_log import Outgoing
from nnunet_fed.preflight.site_checks import Finding, Outcome
from nnunet_fed.study.site import Site
from nnunet_fed.study.table import NEWEST_PROTOCOL, OLDEST_PROTOCOL
from nnunet_fed.transport.channel.noise import noise
from nnunet_fed.transport.channel.proxy import VARIABLES, proxy_for
from nnunet_fed.transport.channel.retry import call_with_retries
from nnunet_fed.transport.channel.tls import (
    RENEWAL_DAYS,
    KeyFiles,
    check_name,
    check_security,
    connect,
    diagnose,
    open_channel,
)
from nnunet_fed.transport.proto import check_pb2 as pb
from nnunet_fed.transport.proto.check_pb2_grpc import CheckStub

T = TypeVar("T")

PATIENCE = 15.0
"""Seconds to try a coordinator whose port is open."""
SLOWEST = 1e6
"""Bytes a second, below which a model of 125 MB is minutes on its way."""
TRANSFER_SECONDS = 120.0


def check_keys(site: Site) -> Finding:
    """The files for TLS, and how long they are valid."""
    from nnunet_fed.certificates.x509 import read_certificates

    check_security(site)
    check_name(site)
    if site.insecure:
        return Finding("certificates", Outcome.ok, "none needed: no TLS, on this machine only")
    files = KeyFiles.of(site)
    own = files.read().owner
    authorities = [found for found in read_certificates(files.ca.read_bytes(), files.ca) if found.is_authority]
    ends = min([own, *authorities], key=lambda certificate: certificate.ends)
    text = f"'{own.name}' until {own.ends:%Y-%m-%d}, authority until {min(a.ends for a in authorities):%Y-%m-%d}"
    if ends.days_left < RENEWAL_DAYS:
        left = f"{text}: the first ends in {ends.days_left:.0f} days."
        return Finding("certificates", Outcome.warning, left, "Renew it (docs/security.md).")
    return Finding("certificates", Outcome.ok, text)


def check_name_resolution(site: Site) -> Finding:
    """The coordinator's name, or that of the proxy on the way, which then resolves the coordinator's."""
    proxy = proxy_for(site.coordinator)
    host = proxy.host if proxy else host_and_port(site.coordinator)[0]
    whose = f"the proxy {proxy.address} ({VARIABLES})" if proxy else "the coordinator"
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        remedy = "Correct 'coordinator' in site.toml, or ask for the name in the hospital's name server (DNS)."
        return Finding("name", Outcome.failed, f"{host} of {whose} is not known here: {error}.", remedy)
    addresses = ", ".join(dict.fromkeys(str(place[0]) for *_, place in found))
    return Finding("name", Outcome.ok, f"{host} of {whose} is {addresses}")


def check_port(site: Site) -> Finding:
    """The one connection that a site needs, to the coordinator's port."""
    proxy = proxy_for(site.coordinator)
    way = f" through the proxy {proxy.address}" if proxy else ""
    try:
        connect(site.coordinator).close()
    except OSError as error:
        remedy = "Is the coordinator running, and does the firewall let this outbound TCP connection pass?"
        text = f"no connection to {site.coordinator}{way}: {error}."
        return Finding("port", Outcome.failed, text, diagnose(site) or remedy)
    return Finding("port", Outcome.ok, f"{site.coordinator} is open{way}")


def check_handshake(site: Site) -> Finding:
    """Whether both sides accept each other's certificate."""
    reason = diagnose(site)
    if reason is not None:
        return Finding("TLS", Outcome.failed, reason)
    return Finding("TLS", Outcome.ok, "no TLS on either side" if site.insecure else "both certificates are accepted")


class Probe:
    """Ask a coordinator what a check wants to know.

    Args:
        site: settings of this site.
        outgoing: hears of everything that this site sends, before it leaves.
    """

    def __init__(self, site: Site, outgoing: Outgoing):
        self._site = site
        self._outgoing = outgoing
        self._channel = open_channel(site)
        self._stub = CheckStub(self._channel)

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def introduce(self, versions: dict[str, str]) -> Introduction:
        """Tell this site's versions, and hear the coordinator's answer.

        Raises:
            ConfigurationError: the coordinator speaks another version of the protocol, or does not know checks.
            RefusedError: the site is not in the study, or its certificate is not accepted.
            UnreachableError: no answer.
        """
        facts: dict[str, Any] = {
            "site": self._site.name, "protocol": OLDEST_PROTOCOL, "newest_protocol": NEWEST_PROTOCOL,
            "versions": versions,
        }  # fmt: skip
        request = pb.IntroduceRequest(**facts)
        self._sends("introduce", **facts)

        def ask() -> Introduction:
            started = time.time()
            reply = self._stub.Introduce(request, timeout=30)
            return Introduction(reply, started, time.time() - started)

        try:
            introduction = self._call(ask)
        except RefusedError as error:
            if "Method not found" not in str(error):  # gRPC's own words
                raise
            raise ConfigurationError(
                "The coordinator's nnunet_fed is older than checks are. Install the same version everywhere."
            ) from None
        if not OLDEST_PROTOCOL <= introduction.reply.protocol <= NEWEST_PROTOCOL:
            raise ConfigurationError(
                f"The coordinator (nnunet_fed {introduction.reply.version}) speaks version "
                f"{introduction.reply.protocol} of the protocol, this site versions {OLDEST_PROTOCOL} to "
                f"{NEWEST_PROTOCOL}. Install the same version of nnunet_fed everywhere."
            )
        return introduction

    def time_transfer(self, size: int, payload: int | None) -> Finding:
        """Send so many random bytes, and receive as many.

        Args:
            size: bytes.
            payload: bytes of a model, for which to tell how long it will be on its way.
        """
        self._sends("noise", bytes=size)
        there = self._timed(lambda: self._stub.Send(noise(size), timeout=TRANSFER_SECONDS).size, size)
        request = pb.NoiseRequest(site=self._site.name, size=size)
        back = self._timed(
            lambda: sum(len(piece.data) for piece in self._stub.Receive(request, timeout=TRANSFER_SECONDS)), size
        )
        speeds = [f"{size / seconds / 1e6:.1f} MB/s" for seconds in (there, back)]
        text = f"{size / 1e6:.1f} MB there at {speeds[0]}, back at {speeds[1]}"
        if payload:
            text += f"; a model of {payload / 1e6:.0f} MB takes about {payload / size * (there + back):.0f} s a round"
        if size / max(there, back) < SLOWEST:
            return Finding(
                "transfer", Outcome.warning, f"{text}.", "Ask for more bandwidth, or train more epochs a round."
            )
        return Finding("transfer", Outcome.ok, text)

    def _timed(self, transfer: Callable[[], int], size: int) -> float:
        started = time.monotonic()
        arrived = self._call(transfer)
        if arrived != size:
            raise ConfigurationError(f"Of {size} bytes {arrived} arrived: something on the way changes what is sent.")
        return time.monotonic() - started

    def _call(self, function: Callable[[], T]) -> T:
        site = self._site
        return call_with_retries(function, PATIENCE, site.coordinator, random.Random(), diagnose=lambda: diagnose(site))

    def _sends(self, what: str, **facts: object) -> None:
        self._outgoing({"to": self._site.coordinator, "what": what, **facts})


class Introduction:
    """A coordinator's answer.

    Args:
        reply: the message.
        asked: when it was asked, in seconds since the epoch.
        trip: seconds until it answered.
    """

    def __init__(self, reply: pb.IntroduceReply, asked: float, trip: float):
        self.reply = reply
        self.halfway = asked + trip / 2
        self.trip = trip
        self.versions: dict[str, dict[str, str]] = json.loads(reply.versions)
        """By site, by package."""
