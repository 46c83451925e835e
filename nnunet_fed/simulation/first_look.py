"""What a simulation looks at before its sites do anything: the folder, the data, and what the plans look like.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from nnunet_fed.agreement.odd_plans import ODD
from nnunet_fed.datasets.description import read_description
from nnunet_fed.datasets.findings import FILE, require
from nnunet_fed.datasets.listing import list_cases
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.files import new_folder, write_text
from nnunet_fed.study.labels import LabelMap

if TYPE_CHECKING:
    from nnunet_fed.inspection.look import Look

SITES, PLANNING_LOG = "sites", "plan.log"
"""Folder with a folder for each site, and the log of what a site has planned."""


def take(out: Path) -> None:
    """Make the folder, or take it if there is nothing in it but what an earlier look has found."""
    of_sites = list((out / SITES).glob("*/*"))
    only_looks = bool(of_sites) and {path.name for path in of_sites} <= {FILE, PLANNING_LOG}
    new_folder(out, SITES if only_looks else "")


def look_at_sites(
    sites: Mapping[str, Path], maps: Mapping[str, LabelMap], folder: Path, console: Console
) -> dict[str, Look]:
    """Look at all data of all sites, before anything starts.

    Args:
        sites: raw data set of each site.
        maps: label map of each site that has one.
        folder: gets a folder for each site with what is found, if anything is.
        console: shows it.

    Raises:
        DataError: with all errors of all sites.
    """
    from nnunet_fed.inspection.look import look_at  # with nnU-Net's readers, which others spare
    from nnunet_fed.inspection.workers import Readers

    looks: dict[str, Look] = {}
    with Readers() as readers:
        for name, source in sorted(sites.items()):
            looks[name] = look_at(source.resolve(), f"site '{name}'", folder / name / FILE, maps.get(name), readers)
            looks[name].report.show(console)
    if any(look.report.findings for look in looks.values()):
        for name, look in looks.items():
            look.write(folder / name / FILE)
            write_text(folder / name / PLANNING_LOG, look.report.text())
        console.print(f"All findings stand in {folder}.", soft_wrap=True)
    require([look.report for look in looks.values()], "nothing was started")
    return looks


def tell_odd_plans(sites: Mapping[str, Path], told: set[str], console: Console) -> None:
    """Show what the sites' logs say of odd plans, once; ``told`` keeps what was shown."""
    for name, folder in sites.items():
        with suppress(OSError):
            text = (folder / PLANNING_LOG).read_text(encoding="utf-8", errors="replace")
            for line in text.splitlines():
                _, found, sentence = line.partition(ODD)
                if found and sentence not in told:
                    told.add(sentence)
                    console.print(f"site '{name}': {ODD}{sentence}", soft_wrap=True, markup=False)


def count_cases(site: str, folder: Path) -> int:
    """Number of training cases in a raw data set; raises :class:`ConfigurationError` if it is none."""
    content, _ = read_description(folder / "dataset.json")
    for part in ("dataset.json", *(() if content and "dataset" in content else ("imagesTr", "labelsTr"))):
        if not (folder / part).exists():
            raise ConfigurationError(
                f"The folder {folder} of site '{site}' has no {part}: name a data set in nnU-Net's raw layout."
            )
    if not content or "file_ending" not in content:
        path = folder / "dataset.json"
        raise ConfigurationError(f"{path} of site '{site}' has no 'file_ending': correct it.")
    cases = list_cases(folder, content).cases
    if not cases:
        raise ConfigurationError(
            f"{folder / 'imagesTr'} of site '{site}' has no image CASE_0000{content['file_ending']}: put the training "
            "images there."
        )
    return len(cases)
