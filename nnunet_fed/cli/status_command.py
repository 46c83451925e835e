"""``nnunet_fed status``: what goes on in a study."""

from __future__ import annotations

from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console

from nnunet_fed.cli.shared_options import KeyOptions, grouped
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.strict_json import to_json
from nnunet_fed.study.federation import WATCHER
from nnunet_fed.study.site import Site
from nnunet_fed.study.toml import explain


@grouped
def status(
    *,
    address: Annotated[
        str | None, typer.Option("--coordinator", metavar="HOST:PORT", help="Default: the one in site.toml.")
    ] = None,
    keys: KeyOptions,
    server_name: Annotated[
        str | None, typer.Option(metavar="HOST", help="The coordinator's name in its certificate, if it differs.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole record once, as JSON.")] = False,
    once: Annotated[bool, typer.Option("--once", help="Print the table once.")] = False,
) -> None:
    """Watch a coordinator: who is doing what, and for whom the others wait."""
    from nnunet_fed.coordinator.watch import status_table, watch
    from nnunet_fed.transport.site.client import GrpcCommunicator

    communicator = GrpcCommunicator(_watcher(address, keys, server_name))
    if as_json:
        print(to_json(communicator.status(record=True), indent=2))
    elif once:
        Console().print(status_table(communicator.status()))
    else:
        watch(communicator.status, lambda: True, Console())


def _watcher(address: str | None, given: KeyOptions, server_name: str | None) -> Site:
    """Settings of who only looks: as in site.toml, or as given."""
    from nnunet_fed.transport.channel.tls import KeyFiles

    keys = KeyFiles.given(given.cert, given.key, given.ca)
    if (keys and address is None) or (server_name and keys is None):
        raise ConfigurationError(
            "--coordinator, --cert, --key and --ca go together, and --server-name goes with them. Without them, what "
            "stands in site.toml is used."
        )
    if address is None:
        return Site.from_environment()
    try:
        return Site(
            name=WATCHER, coordinator=address, certificate=given.cert, key=given.key, ca=given.ca,
            server_name=server_name, insecure=keys is None,
        )  # fmt: skip
    except ValidationError as error:
        raise ConfigurationError(f"--{explain(error, Site)}") from None
