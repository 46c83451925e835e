"""Flower's legacy interface, ``start_server`` and ``start_client``; Flower's Python runs this.

Without arguments it starts itself once as the server and once for each site.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flwr.client import NumPyClient, start_client
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerConfig, start_server
from flwr.server.strategy import FedAvg
from measuring import (
    Memory,
    Processes,
    Settings,
    free_port,
    random_tensors,
    seconds_of_rounds,
    stamp,
    tree_of,
    wait_until_finished,
    wait_until_served,
)


def serve(address: str, settings: Settings) -> None:
    """All rounds."""
    files = settings.certificates
    certificates = files and tuple(Path(files[name]).read_bytes() for name in ("ca", "certificate", "key"))
    strategy = FedAvg(
        fraction_evaluate=0.0, min_fit_clients=settings.sites, min_available_clients=settings.sites,
        initial_parameters=ndarrays_to_parameters(list(random_tensors(settings.shapes, 0).values())),
    )  # fmt: skip
    start_server(
        server_address=address, config=ServerConfig(num_rounds=settings.receipts), strategy=strategy,
        certificates=certificates,
    )  # fmt: skip


def take_part(address: str, site: str, settings: Settings) -> None:
    """Send back what came."""

    class Client(NumPyClient):  # type: ignore[misc]
        def fit(self, parameters: list[Any], config: dict[str, Any]) -> tuple[list[Any], int, dict[str, Any]]:
            stamp(settings, site)
            return parameters, 1, {}

    files = settings.certificates
    start_client(
        server_address=address, client=Client().to_client(), insecure=files is None,
        root_certificates=files and Path(files["ca"]).read_bytes(),
    )  # fmt: skip


def main() -> None:
    """Start all, wait for the sites, and print what was measured as JSON."""
    settings = Settings.read()
    address = f"127.0.0.1:{free_port()}"
    with Processes(settings) as processes:

        def start(role: str) -> subprocess.Popen[bytes]:
            return processes.start(role, sys.executable, __file__, role, address)

        server = start("server")
        memory = Memory(lambda: tree_of(server.pid))
        memory.start()
        wait_until_served(address, processes.alive)
        for number in range(settings.sites):
            start(f"site_{number}")
        wait_until_finished(settings, processes.alive)
        found = memory.stop()
    seconds = seconds_of_rounds(settings)
    print(json.dumps({"framework": f"Flower {version('flwr')}, legacy", "seconds": seconds, **found}))


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "server":
        serve(sys.argv[2], Settings.read())
    else:
        take_part(sys.argv[2], sys.argv[1], Settings.read())
