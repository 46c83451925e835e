"""What a collective over gRPC cannot be faster than: streams of as many bytes, which nobody looks at."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from nnunet_fed.transport.channel.allocator import COORDINATOR, SITE, keep_buffers

SPAWN = multiprocessing.get_context("spawn")
MESSAGE = 1 << 20
LIMITS = (("grpc.max_receive_message_length", 2 * MESSAGE), ("grpc.max_send_message_length", 2 * MESSAGE))
Keys = tuple[bytes, bytes, bytes]
"""PEM: the authority's certificate, an own key, and its certificate."""


def serve(sites: int, size: int, keys: Keys | None, address: Any) -> None:
    """Take a stream of each site, and once all are there give each one; puts the address into the queue."""
    keep_buffers(COORDINATOR)
    everybody = threading.Barrier(sites)
    blob = os.urandom(MESSAGE)

    def up(messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        for _ in messages:
            pass
        everybody.wait()
        return b""

    def down(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        return (blob for _ in range(size // MESSAGE))

    server = grpc.server(ThreadPoolExecutor(2 * sites), options=LIMITS)
    calls = {"Up": grpc.stream_unary_rpc_method_handler(up), "Down": grpc.unary_stream_rpc_method_handler(down)}
    server.add_registered_method_handlers("Copy", calls)
    if keys is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        ca, key, certificate = keys
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)], ca, True))
    server.start()
    address.put(f"127.0.0.1:{port}")
    server.wait_for_termination()


def take_part(address: str, size: int, rounds: int, keys: Keys | None, results: Any) -> None:
    """One site: so many rounds; puts a list of (start, end) into the queue."""
    keep_buffers(SITE)
    if keys is None:
        channel = grpc.insecure_channel(address, options=LIMITS)
    else:
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(*keys), options=LIMITS)
    blob, spans = os.urandom(MESSAGE), []
    with channel:
        up, down = channel.stream_unary("/Copy/Up"), channel.unary_stream("/Copy/Down")
        up(iter([]), wait_for_ready=True)  # all are there
        for _ in range(rounds):
            start = time.monotonic()
            up(blob for _ in range(size // MESSAGE))
            for _ in down(b""):
                pass
            spans.append((start, time.monotonic()))
    results.put(spans)


def grpc_copy(sites: int, size: int, rounds: int, keys: list[Keys] | None) -> dict[str, Any]:
    """Seconds of rounds in which every site sends and takes ``size`` bytes; ``keys``: of the server and the sites."""
    answers = SPAWN.Queue()
    server = SPAWN.Process(target=serve, args=(sites, size, keys and keys[0], answers), daemon=True)
    server.start()
    try:
        address = answers.get(timeout=60)
        clients = [
            SPAWN.Process(
                target=take_part, args=(address, size, rounds + 1, keys and keys[1 + site], answers), daemon=True
            )
            for site in range(sites)
        ]
        for client in clients:
            client.start()
        spans = zip(*(answers.get(timeout=600) for _ in clients), strict=True)
    finally:
        server.kill()
    seconds = [max(end for _, end in span) - min(start for start, _ in span) for span in spans][1:]
    return {
        "transport": "bare gRPC streams, mutual TLS" if keys else "bare gRPC streams", "sites": sites,
        "seconds": seconds, "bytes": 2 * sites * (size // MESSAGE) * MESSAGE,
    }  # fmt: skip
