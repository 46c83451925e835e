"""``nnunet_fed init``: files to start from."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.files import write_text


def init(folder: Annotated[Path, typer.Argument(help="Where to write them.")] = Path()) -> None:
    """Write a commented federation.toml and site.toml to start from."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("federation.toml", "site.toml")
    for name in names:
        if (folder / name).exists():
            raise ConfigurationError(f"{folder / name} is there already; choose another folder or remove it.")
    for name in names:
        write_text(folder / name, (resources.files("nnunet_fed") / "templates" / name).read_text(encoding="utf-8"))
        print(folder / name)
