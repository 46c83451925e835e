"""Flower as deployed: a SuperLink, a SuperNode for each site, and ``flwr run``; Flower's Python runs this."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from measuring import (
    Memory,
    Processes,
    Settings,
    free_port,
    seconds_of_rounds,
    tree_of,
    wait_until_finished,
    wait_until_served,
)

HERE = Path(__file__).parent
PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "exchange"
version = "1.0.0"
description = "Tensors that nobody trains"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "benchmark"

[tool.flwr.app.components]
serverapp = "flower_app:server"
clientapp = "flower_app:client"
"""


def main() -> None:
    """Start all, wait for the sites, and print what was measured as JSON."""
    settings = Settings.read()
    folder, programs = Path(settings.folder), Path(sys.executable).parent
    app = folder / "app"
    app.mkdir()
    (app / "pyproject.toml").write_text(PROJECT)
    shutil.copy(HERE / "flower_app.py", app)
    address = f"127.0.0.1:{free_port()}"
    if settings.certificates is None:
        server_options, site_options, connection = ["--insecure"], ["--insecure"], "insecure = true"
    else:
        ca, certificate, key = (settings.certificates[name] for name in ("ca", "certificate", "key"))
        server_options = ["--ssl-ca-certfile", ca, "--ssl-certfile", certificate, "--ssl-keyfile", key]
        site_options = ["--root-certificates", ca, *server_options]
        connection = f"root-certificates = {json.dumps(ca)}"
    home = folder / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{address}"\n{connection}\n'
    )
    environment = {
        **os.environ, "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "PYTHONPATH": str(HERE),
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    with Processes(settings) as processes:

        def start(log: str, program: str, *arguments: str) -> subprocess.Popen[bytes]:
            return processes.start(log, programs / program, *arguments, env=environment, cwd=app)

        host, _, port = address.partition(":")
        link = start(
            "superlink", "flower-superlink", *server_options, "--host", host, "--port", port,
            "--disable-runtime-dependency-installation",
        )  # fmt: skip
        memory = Memory(lambda: tree_of(link.pid))
        memory.start()
        wait_until_served(address, processes.alive)
        for number in range(settings.sites):
            start(
                f"supernode_{number}", "flower-supernode", *site_options, "--superlink", address,
                "--port", str(free_port()), "--node-config", f"site={number}",
            )  # fmt: skip
        run = start("run", "flwr", "run", ".", "here", "--stream")
        wait_until_finished(settings, lambda: processes.alive() and run.poll() is None)
        found = memory.stop()
    print(json.dumps({"framework": f"Flower {version('flwr')}", "seconds": seconds_of_rounds(settings), **found}))


if __name__ == "__main__":
    main()
