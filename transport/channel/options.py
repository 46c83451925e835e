"""What server and client agree on: protocol version, channel options, metadata, and where plain text is allowed."""

from __future__ import annotations

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.exchange.payload import CHUNK
from nnunet_fed.study.address import Address
from nnunet_fed.study.table import NEWEST_PROTOCOL, OLDEST_PROTOCOL

PEER_PROTOCOL = 2
"""Version of what peers say to each other; a peer of another version is refused."""

KEEPALIVE_SECONDS = (30, 20)
"""A connection on which nothing has come for so long is tried, and given up if no answer comes for so long."""
PING_SECONDS = 60
"""The same for an answer that is due while data are under way, behind which it waits. A stall lasts so long at most."""
LARGEST_REQUEST = CHUNK + (1 << 16)
"""Bytes of a message to the coordinator."""
LARGEST_REPLY = 1 << 26
"""Bytes of a message to a site: the record of a long study."""
STREAMS = 16
"""Calls that one connection may have under way."""
UNDER_WAY = 2 * CHUNK
"""Bytes of the messages that a coordinator has under way with all sites together, as far as their size decides it."""
HANDSHAKE_SECONDS, IDLE_SECONDS = 10, 600
"""A connection must have shown a certificate within so many seconds; one without calls for so long is closed, and its
owner makes another with its next call. So nobody can collect them."""
SMALLEST_MESSAGE = 1 << 16
"""Bytes: smaller ones cost more time than they spare memory."""
WITHDRAWN_BY = "nnunet-fed-withdrawn-by"
"""Name in the metadata of a refusal after which the others plan anew by themselves: of the site that has withdrawn what
it told (:class:`nnunet_fed.errors.WithdrawnError`)."""


def _options(**settings: int) -> tuple[tuple[str, int], ...]:
    keepalive = {
        "keepalive_time_ms": 1000 * KEEPALIVE_SECONDS[0],
        "keepalive_timeout_ms": 1000 * KEEPALIVE_SECONDS[1],
        "keepalive_permit_without_calls": 1,
        "http2.max_pings_without_data": 0,
        "http2.ping_timeout_ms": 1000 * PING_SECONDS,
    }
    return tuple((f"grpc.{name}", value) for name, value in {**keepalive, **settings}.items())


def spoken_protocol(oldest: int, newest: int) -> int | None:
    """The version of the protocol in which coordinator and site talk; ``None``: they have none in common.

    Args:
        oldest: version that the site speaks.
        newest: version that it speaks; 0: it says only the oldest one, as version 0.1 of nnunet_fed does.
    """
    spoken = min(newest or oldest, NEWEST_PROTOCOL)
    return spoken if spoken >= max(oldest, OLDEST_PROTOCOL) else None


def message_bytes(sites: int) -> int:
    """Largest message between the coordinator and one of so many sites, in bytes; also a connection's window.

    What a coordinator holds of a transfer is a few messages, and what may arrive before it is read (the window, which
    gRPC by itself lets grow with the speed of a line). All sites transfer at the same time: so that the coordinator
    needs no more memory with more sites, each gets its share. Two sites fill 160 Mbit/s each at a round trip of 50 ms,
    eight 40 Mbit/s each, thirty-two or more 10 Mbit/s each.
    """
    return min(CHUNK, max(SMALLEST_MESSAGE, UNDER_WAY // sites))


CHANNEL_OPTIONS = _options(max_receive_message_length=LARGEST_REPLY)


def server_options(window: int) -> tuple[tuple[str, int], ...]:
    """Options of a server on whose connections ``window`` bytes may arrive before they are read."""
    return _options(
        max_receive_message_length=LARGEST_REQUEST,
        max_concurrent_streams=STREAMS,
        **{
            "http2.min_ping_interval_without_data_ms": 5_000,
            "http2.bdp_probe": 0,
            "http2.lookahead_bytes": window,
            # a few bytes may become gigabytes, before anybody has seen whose they are: no algorithm but "none"
            "compression_enabled_algorithms_bitset": 1,
            "server_handshake_timeout_ms": 1000 * HANDSHAKE_SECONDS,
            "max_connection_idle_ms": 1000 * IDLE_SECONDS,
        },
        so_reuseport=0,  # or a second coordinator on the same port would start without a word
    )


def require_loopback(address: Address) -> None:
    """Plain text stays on this machine.

    Raises:
        ConfigurationError: ``address`` is not a loopback address.
    """
    if not address.is_loopback:
        raise ConfigurationError(
            f"'{address}' is not on this machine, and weights do not travel unencrypted. Use 127.0.0.1 or [::1], or "
            "TLS between machines ('nnunet_fed certs' makes the files for it)."
        )
