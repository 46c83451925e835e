"""``nnunet_fed coordinator``: the one process that all sites reach."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from nnunet_fed.cli.shared_options import KeyOptions, grouped
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.processes import END_SIGNALS
from nnunet_fed.study.federation import Federation


@grouped
def coordinator(
    *,
    study: Annotated[Path, typer.Argument(metavar="FEDERATION.toml", help="The study.")],
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Address to listen on.")],
    state: Annotated[Path, typer.Option(metavar="DIR", help="The coordinator's memory.")],
    keys: KeyOptions,
    revoked: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Certificates no longer accepted; read again when it changes.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS; on a loopback address only.")] = False,
    new_attempt: Annotated[bool, typer.Option("--new-attempt", hidden=True)] = False,
    spool_quota: Annotated[
        float, typer.Option("--spool-quota-gb", min=0.001, help="Disk for uploads until they are reduced.")
    ] = 100.0,
    http: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Show /status and /metrics (Prometheus) here; default: no.")
    ] = None,
    http_insecure: Annotated[
        bool, typer.Option("--http-insecure", help="Let --http be an address that other machines reach.")
    ] = False,
    log_json: Annotated[bool, typer.Option("--log-json", help="Log a JSON object a line.")] = False,
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write TensorBoard scalars of rounds and sites there.")
    ] = None,
) -> None:
    """Serve a study: all sites reach this one process, which sees weights and numbers but no image."""
    from nnunet_fed.coordinator.coordinator import Coordinator
    from nnunet_fed.coordinator.opening import open_attempt
    from nnunet_fed.coordinator.store import Store, explained
    from nnunet_fed.coordinator.tracking import FederationTracker
    from nnunet_fed.logs import log_as_json
    from nnunet_fed.transport.channel.allocator import COORDINATOR, keep_buffers
    from nnunet_fed.transport.channel.tls import KeyFiles
    from nnunet_fed.transport.coordinator.http import StatusServer
    from nnunet_fed.transport.coordinator.server import CoordinatorServer

    if new_attempt and _is_service():  # it would open an attempt at every restart
        raise ConfigurationError(f"--new-attempt is a command for services: nnunet_fed new-attempt {state}")
    if http_insecure and http is None:
        raise ConfigurationError("--http-insecure goes with --http.")
    if log_json:
        log_as_json()
    keep_buffers(COORDINATOR)
    key_files = KeyFiles.given(keys.cert, keys.key, keys.ca)
    federation = Federation.read(study)
    tracker = FederationTracker(tensorboard, len(federation.trained_folds) > 1) if tensorboard is not None else None
    store = Store(state)
    with explained(state):
        if new_attempt and store.fact("attempt") is not None:
            open_attempt(store)
        coordinator = Coordinator(federation, store, int(spool_quota * 1e9), tracker)
    pages = StatusServer(coordinator, http, http_insecure) if http is not None else None
    server = CoordinatorServer(coordinator, listen, insecure, key_files, revoked, pages.meter if pages else None)
    stopped = threading.Event()
    for number in END_SIGNALS:
        signal.signal(number, lambda *_: stopped.set())
    server.start()
    if pages is not None:
        pages.start()
    print(f"'{federation.name}' for {', '.join(federation.sites)} on {server.address}", flush=True)
    stopped.wait()
    if pages is not None:
        pages.stop()
    server.stop()
    coordinator.close()


def _is_service() -> bool:
    """Whether a service manager (systemd) or a container has started this process, and would start it again."""
    return "INVOCATION_ID" in os.environ or 1 in (os.getpid(), os.getppid())
