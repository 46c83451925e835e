"""``nnunet_fed digest``: by which sites and studies know pretrained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def digest(
    file: Annotated[Path, typer.Argument(help="A checkpoint of nnU-Net, such as checkpoint_final.pth.")],
) -> None:
    """Print the digest of a checkpoint's weights, for 'pretrained' in federation.toml."""
    from nnunet_fed.trainers.parts.pretrained_weights import read_weights

    print(read_weights(file).digest)
