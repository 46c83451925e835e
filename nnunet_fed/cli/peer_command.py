"""``nnunet_fed peer``: the process that a training with peers starts beside itself."""

from __future__ import annotations

import signal
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from nnunet_fed.processes import END_SIGNALS, Parent
from nnunet_fed.study.site import Site


class Exchange(str, Enum):
    """Who moves a model."""

    push = "push"
    pull = "pull"


def peer(
    folder: Annotated[Path, typer.Argument(help="The training's mailbox.")],
    site_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="site.toml; default: the one in nnUNet_fed_site.")
    ] = None,
    mode: Annotated[Exchange, typer.Option(help="push: send models; pull: fetch those of the peers.")] = Exchange.push,
    max_tries: Annotated[int, typer.Option(min=1, help="Attempts to reach a peer for one model.")] = 3,
    parent: Annotated[int | None, typer.Option(metavar="PID", help="End when this parent process has ended.")] = None,
) -> None:
    """Exchange models with the peers in site.toml (GCML). A training starts this by itself."""
    from nnunet_fed.gossip.mailbox import Mailbox
    from nnunet_fed.transport.peers.peer import PeerProcess

    site = Site.from_environment() if site_file is None else Site.read(site_file)
    process = PeerProcess(site, Mailbox(folder), "push" if mode == Exchange.push else "pull", max_tries)
    for number in END_SIGNALS:
        signal.signal(number, lambda *_: process.stop())
    starter = None if parent is None else Parent(parent)
    process.run(lambda: starter is None or starter.lives())
