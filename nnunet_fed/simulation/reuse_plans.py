"""Another study on data that are planned and preprocessed already: the plans carry it, the cases are shared.

Source: ours. What planning reads of a study must be the same in both.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path

from nnunet_fed.datasets.preprocessed import complete_marker
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.files import write_json
from nnunet_fed.study.federation import PLANS_KEY, Federation
from nnunet_fed.study.labels import Sources
from nnunet_fed.study.site import Site

DATASET = 1
"""nnU-Net's number of a simulated site's own data set."""
PLANNING = (
    "sites", "planner", "geometry", "overwrite_target_spacing", "gpu_memory_target_in_gb", "preprocessor_name",
    "configuration", "method.own_channels",
)  # fmt: skip
"""Fields of a study on which plans and preprocessed data depend."""


def check_same_planning(
    earlier: Path, study: Federation, sites: Mapping[str, Path], labels: Mapping[str, Sources]
) -> None:
    """See that an earlier simulation planned what ``study`` would plan; raises :class:`ConfigurationError`.

    Args:
        earlier: its folder.
        study: the new one.
        sites: raw data set of each site. Where the earlier simulation copied them, they cannot be compared.
        labels: label map of each site that has one.
    """
    past = Federation.read(earlier / "federation.toml").with_defaults({})  # what it did not know then is neutral
    for field in PLANNING:
        before, now = (attrgetter(field)(each) for each in (past, study))
        if before != now:
            raise ConfigurationError(
                f"The simulation in {earlier} was planned with {field} = {before!r}, this one has {now!r}: "
                "plan anew, without --planned."
            )
    for site, folder in sites.items():
        for link in (earlier / "sites" / site / "nnUNet_raw").glob(f"Dataset{DATASET:03d}_*"):
            if link.is_symlink() and link.resolve() != folder.resolve():
                raise ConfigurationError(
                    f"The simulation in {earlier} was planned with the data in {link.resolve()} for site '{site}', "
                    f"this one has {folder}: plan anew, without --planned."
                )
        maps = Site.read(earlier / "sites" / site / "site.toml").labels, labels.get(site)
        in_order = [list((label_map or {}).items()) for label_map in maps]  # the order numbers the labels
        if in_order[0] != in_order[1]:
            before, now = ("no label map" if not entries else f"the label map {dict(entries)}" for entries in in_order)
            raise ConfigurationError(
                f"The simulation in {earlier} was planned with {before} for site '{site}', this one has {now}: "
                "plan anew, without --planned."
            )


def adopt(earlier: Path, folder: Path, study: Federation) -> None:
    """Make a site's ``nnUNet_preprocessed`` out of another one, with plans that carry ``study``.

    Args:
        earlier: folder of the site that has planned with one data set; its cases are linked to, not copied, and so is
            a raw data set that was built for its label map.
        folder: of the site, in which ``nnUNet_preprocessed`` is made.
        study: names the plans.

    Raises:
        ConfigurationError: there is no data set, or no plans in it.
    """
    plans_file = plans_of(earlier)
    source = plans_file.parent
    target = folder / "nnUNet_preprocessed" / source.name
    target.mkdir(parents=True)
    for entry in source.iterdir():
        if entry.is_dir():
            (target / entry.name).symlink_to(entry.resolve(), target_is_directory=True)
        elif entry != plans_file:
            shutil.copy(entry, target)
    mapped, raw = (site / "nnUNet_raw" / source.name for site in (earlier, folder))
    if mapped.is_dir() and not raw.exists():
        raw.symlink_to(mapped.resolve(), target_is_directory=True)
    plans = json.loads(plans_file.read_text(encoding="utf-8"))
    plans["plans_name"] = study.plans_name
    plans[PLANS_KEY].update(name=study.name, digest=study.digest_of_fold(study.fold), study=study.stored())
    write_json(target / f"{study.plans_name}.json", plans, indent=4)
    marker = complete_marker(target / plans["configurations"][study.configuration]["data_identifier"])
    if not marker.is_file():  # the cases of several sites, linked together
        write_json(marker, {"configuration": study.configuration}, indent=4)


def plans_of(site: Path) -> Path:
    """The plans of a site that has planned with one data set; beside them lies what is preprocessed.

    Args:
        site: its folder.

    Raises:
        ConfigurationError: there is no data set, or no plans in it.
    """
    preprocessed = site / "nnUNet_preprocessed"
    found = sorted(preprocessed.glob("Dataset*/*Plans.json"))
    if not found:
        raise ConfigurationError(f"There are no plans in {preprocessed}: name a simulation that has planned.")
    return found[0]
