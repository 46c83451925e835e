"""What server and client agree on: protocol version, channel options, and where plain text is allowed."""

from __future__ import annotations

import ipaddress

from nnunet_fed.errors import ConfigurationError

PROTOCOL = 1
"""Version of the protocol; a site of another version is refused."""

CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
SERVER_OPTIONS = (
    *CHANNEL_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
    ("grpc.so_reuseport", 0),  # or a second coordinator on the same port would start without a word
)


def is_loopback(address: str) -> bool:
    """Whether ``host:port`` can be reached from this machine only."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_loopback(address: str) -> None:
    """Plain text stays on this machine.

    Raises:
        ConfigurationError: ``address`` (``host:port``) is not a loopback address.
    """
    if not is_loopback(address):
        raise ConfigurationError(
            f"'{address}' is not on this machine, and weights do not travel unencrypted. Use 127.0.0.1, or TLS between "
            "machines ('nnunet_fed certs' makes the files for it)."
        )
