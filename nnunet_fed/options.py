"""What the options of a command line hold. Source: ours."""

from __future__ import annotations

from pathlib import Path

from nnunet_fed.errors import ConfigurationError


def repeat_option(arguments: list[str], option: str) -> list[str]:
    """Let one option take several values, as nnU-Net's own commands do: ``-c 2d 3d_fullres``."""
    repeated: list[str] = []
    within = False
    for argument in arguments:
        if within and not argument.startswith("-") and repeated[-1] != option:
            repeated.append(option)
        within = argument == option or (within and not argument.startswith("-"))
        repeated.append(argument)
    return repeated


def named_folders(sites: list[str]) -> dict[str, Path]:
    """Sites and their folders out of ``NAME=FOLDER``, each given once; raises :class:`ConfigurationError`."""
    folders: dict[str, Path] = {}
    for site in sites:
        name, separator, folder = site.partition("=")
        if not separator or not folder:
            raise ConfigurationError(f"--site {site}: give a name and a folder, as in --site site_a=data/site_a.")
        if name in folders:
            raise ConfigurationError(f"--site {name} is given twice; every site has a name of its own.")
        folders[name] = Path(folder)
    return folders


def whole_number(option: str, text: str) -> int:
    """The number in an option's text; raises :class:`ConfigurationError`."""
    try:
        return int(text)
    except ValueError:
        raise ConfigurationError(f"{option} must be a whole number or 'all', not {text!r}.") from None
