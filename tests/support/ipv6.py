"""Whether this machine has IPv6's loopback address."""

from __future__ import annotations

import socket

import pytest


def _is_there() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not _is_there(), reason="this machine has no IPv6 loopback address (::1)")
