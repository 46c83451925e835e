"""What the options of a command line hold. Source: ours."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.study.toml import TOMLDecodeError, from_toml


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


def named_values(options: list[str]) -> dict[str, Any]:
    """Values by name out of ``NAME=VALUE``; VALUE is as in TOML, or a text. Raises :class:`ConfigurationError`."""
    values: dict[str, Any] = {}
    for option in options:
        name, separator, text = option.partition("=")
        if not separator:
            raise ConfigurationError(f"--option {option}: give a name and a value, as in --option strength=2.")
        if name in values:
            raise ConfigurationError(f"--option {name} is given twice.")
        try:
            values[name] = from_toml(f"value = {text}")["value"]
        except TOMLDecodeError:
            values[name] = text
    return values


def named_labels(options: list[str], sites: Iterable[str]) -> dict[str, dict[str, tuple[int | str, ...]]]:
    """Label maps by site out of ``LABEL=SOURCES`` for all sites and ``SITE:LABEL=SOURCES`` for one.

    SOURCES are the site's labels, by name or number, with commas between them; none: the site has none of it. What is
    said of one site precedes what is said of all. Labels stand in the order in which they are first named, which
    numbers them.

    Args:
        options: as on the command line.
        sites: all sites.

    Raises:
        ConfigurationError: an option has another form, or says twice what a label is.
    """
    given: dict[tuple[str | None, str], tuple[int | str, ...]] = {}
    for option in options:
        target, separator, text = option.partition("=")
        site, _, label = target.partition(":") if ":" in target else (None, "", target)
        if not separator or not label or site == "":
            raise ConfigurationError(
                f"--labels {option}: give a label of the federation and the site's labels that become it, as in "
                "--labels lesion=tumour,cyst, or --labels site_a:lesion=tumour for one site."
            )
        if (site, label) in given:
            raise ConfigurationError(f"--labels {target} is given twice; put commas between labels that become one.")
        sources = [source.strip() for source in text.split(",") if source.strip()]
        given[site, label] = tuple(int(source) if source.isdecimal() else source for source in sources)
    maps: dict[str, dict[str, tuple[int | str, ...]]] = {}
    for name in dict.fromkeys([*sites, *(site for site, _ in given if site is not None)]):
        for label in dict.fromkeys(label for _, label in given):
            found = given.get((name, label), given.get((None, label)))
            if found is not None:
                maps.setdefault(name, {})[label] = found
    return maps


def whole_number(option: str, text: str) -> int:
    """The number in an option's text; raises :class:`ConfigurationError`."""
    try:
        return int(text)
    except ValueError:
        raise ConfigurationError(f"{option} must be a whole number or 'all', not {text!r}.") from None


def whole_numbers(option: str, text: str) -> list[int]:
    """The numbers in an option's text, with commas between them; raises :class:`ConfigurationError`."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ConfigurationError(f"{option} must be whole numbers with commas between them, not {text!r}.") from None
