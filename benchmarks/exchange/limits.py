"""What no collective can be faster than: a plain TCP copy of the same bytes, and the coordinator's reduction alone."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measuring import random_tensors

from nnunet_fed.exchange.payload import encode
from nnunet_fed.exchange.precision import WireDtype, narrow
from nnunet_fed.exchange.reduction import write_result

SPAWN = multiprocessing.get_context("spawn")


def tcp_client(port: int, size: int, rounds: int) -> None:
    """Send so many bytes and take as many back, each round."""
    outgoing, incoming = bytearray(os.urandom(1 << 20)) * (size >> 20), bytearray((size >> 20) << 20)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for _ in range(rounds):
            connection.recv(1)
            connection.sendall(outgoing)
            _fill(connection, incoming)
            connection.sendall(b"d")


def _fill(connection: socket.socket, buffer: bytearray) -> None:
    view = memoryview(buffer)
    while view:
        view = view[connection.recv_into(view) :]


def tcp_copy(sites: int, size: int, rounds: int) -> dict[str, Any]:
    """The bytes of a collective over plain TCP: all up into memory, then all down."""
    size = (size >> 20) << 20
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(sites) as pool:
        clients = [
            SPAWN.Process(target=tcp_client, args=(server.getsockname()[1], size, rounds + 1)) for _ in range(sites)
        ]
        for client in clients:
            client.start()
        connections = [server.accept()[0] for _ in clients]
        buffers = [bytearray(size) for _ in clients]
        seconds = []
        for _ in range(rounds + 1):
            start = time.monotonic()
            list(pool.map(lambda c: c.sendall(b"g"), connections))
            list(pool.map(_fill, connections, buffers))
            list(pool.map(lambda c: c.sendall(buffers[0]), connections))
            list(pool.map(lambda c: c.recv(1), connections))
            seconds.append(time.monotonic() - start)
        for connection in connections:
            connection.close()
        for client in clients:
            client.join()
    return {"transport": "plain TCP", "sites": sites, "seconds": seconds[1:], "bytes": 2 * sites * size}


def reduction(sites: int, wire_dtype: WireDtype, shapes: dict[str, tuple[int, ...]], rounds: int) -> dict[str, Any]:
    """Seconds of the coordinator's reduction alone, files in the page cache."""
    with tempfile.TemporaryDirectory(prefix="nnunet_fed_exchange_") as name:
        files = {}
        for number in range(sites):
            files[str(number)] = Path(name) / str(number)
            with files[str(number)].open("wb") as file:
                file.writelines(encode(narrow(random_tensors(shapes, number), wire_dtype)))
        seconds = []
        for _ in range(rounds + 1):
            start = time.monotonic()
            write_result("mean", files, [1.0 + number for number in range(sites)], Path(name) / "out")
            seconds.append(time.monotonic() - start)
            (Path(name) / "out").unlink()  # the coordinator writes new files only
    return {"transport": "reduction alone", "sites": sites, "wire_dtype": wire_dtype, "seconds": seconds[1:]}
