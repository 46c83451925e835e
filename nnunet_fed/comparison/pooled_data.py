"""The sites' preprocessed data as one data set: for plain nnU-Net on all data together, the upper reference.

It is laid out as a simulation of one site that has planned, with the harmonised plans, so that training on it is what
training at a site is. Cases are links, not copies. Source: ours.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_fed.agreement.fingerprint_files import OWN, common_file
from nnunet_fed.datasets.folds import FOLDS, SPLITS
from nnunet_fed.datasets.listing import laid_out, list_cases
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.files import link, write_json, write_text
from nnunet_fed.simulation.reuse_plans import plans_of
from nnunet_fed.simulation.simulate import Place
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.toml import to_toml

SITE = "pooled"
"""Name of the one site."""
DATA, CASES = "data", "cases.json"
"""Its raw data set, and of which site each of its cases is, below the folder."""
NOBODY = "127.0.0.1:9"
"""Address in the ``site.toml`` of a site that trains nowhere: each training is given its own."""

Fold = Mapping[str, list[str]]
"""Names of the cases under ``train`` and under ``val``."""


@dataclass(frozen=True)
class Planned:
    """What a site has planned and preprocessed."""

    site: str
    folder: Path
    """The data set in ``nnUNet_preprocessed``."""
    raw: Path
    dataset: dict[str, Any]
    """``dataset.json``."""
    plans: dict[str, Any]
    cases: tuple[str, ...]
    """Sorted."""
    folds: tuple[Fold, ...]
    """None: the site has too few cases for a cross-validation, and trains on all of them."""

    @classmethod
    def read(cls, site: str, folder: Path) -> Planned:
        """Read a site's folder of a simulation; raises :class:`ConfigurationError` where it has not planned."""
        plans = plans_of(folder)
        dataset = json.loads((plans.parent / "dataset.json").read_text(encoding="utf-8"))
        ending, splits = dataset["file_ending"], plans.parent / SPLITS
        references = (plans.parent / "gt_segmentations").glob(f"*{ending}")
        return cls(
            site,
            plans.parent,
            folder / "nnUNet_raw" / plans.parent.name,
            dataset,
            json.loads(plans.read_text(encoding="utf-8")),
            tuple(sorted(path.name.removesuffix(ending) for path in references)),
            tuple(json.loads(splits.read_text(encoding="utf-8"))) if splits.is_file() else (),
        )


def fix_folds(site: Path) -> None:
    """Write the folds that nnU-Net would make when it trains, so that every training finds the same ones.

    Args:
        site: folder of a site that has planned. One with fewer cases than folds, or with its own folds, is left alone.
    """
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    planned = Planned.read("", site)
    if not planned.folds and len(planned.cases) >= FOLDS:
        folds = generate_crossval_split(list(planned.cases), seed=12345, n_splits=FOLDS)  # nnU-Net's own seed
        own = [{kind: [str(case) for case in fold[kind]] for kind in ("train", "val")} for fold in folds]
        write_json(planned.folder / SPLITS, own, indent=4)


def pool(planned: Path, out: Path, study: Federation) -> None:
    """Make one data set out of those of all sites.

    Writes ``out/sites/pooled`` and ``out/federation.toml``, as a simulation does, the raw data set ``out/data`` and
    ``out/cases.json``. Its folds are the unions of the sites'; of a site without folds all cases are for training.

    Args:
        planned: folder of a simulation of the sites that has planned.
        out: a new folder.
        study: of one site, :data:`SITE`; names plans and configuration.

    Raises:
        ConfigurationError: the sites' files have different formats.
    """
    names_of_sites = Federation.read(planned / "federation.toml").sites
    sites = [Planned.read(site, planned / "sites" / site) for site in names_of_sites]
    first = sites[0]
    for site in sites:
        formats = [(each.dataset["file_ending"], each.plans["image_reader_writer"]) for each in (first, site)]
        if formats[0] != formats[1]:
            raise ConfigurationError(
                f"The sites '{first.site}' and '{site.site}' keep their images in different formats: {formats[0]} and "
                f"{formats[1]}. nnU-Net wants one in a data set: leave out the method 'pooled', or convert the images."
            )
    names = pooled_names({site.site: site.cases for site in sites})
    folds = pooled_folds({site.site: site.folds for site in sites}, names)
    dataset = {key: value for key, value in first.dataset.items() if key != "dataset"} | {"numTraining": len(names)}

    raw = out / DATA
    for part in ("imagesTr", "labelsTr"):
        (raw / part).mkdir(parents=True)
    place = Place(SITE, raw, out / "sites" / SITE, study.trained_folds)
    place.make(NOBODY, {})
    preprocessed = place.folder / "nnUNet_preprocessed" / place.dataset
    write_json(raw / "dataset.json", dataset, indent=4)
    for path in (preprocessed / "dataset.json", preprocessed / SPLITS, raw / SPLITS):
        path.parent.mkdir(exist_ok=True)
        write_json(path, folds if path.name == SPLITS else dataset, indent=4)
    write_json(preprocessed / f"{study.plans_name}.json", {**first.plans, "dataset_name": place.dataset}, indent=4)
    link(common_file(first.folder), preprocessed / OWN)
    identifiers = [site.plans["configurations"][study.configuration]["data_identifier"] for site in sites]
    for site, identifier in zip(sites, identifiers, strict=True):
        own = {case: names[site.site, case] for case in site.cases}
        ending = re.escape(site.dataset["file_ending"])
        _link_cases(site.folder / identifier, preprocessed / identifiers[0], own, r"(?:_seg)?\.\w+")
        _link_cases(site.folder / "gt_segmentations", preprocessed / "gt_segmentations", own, ending)
        for case, files in list_cases(site.raw, site.dataset).cases.items():
            for source, target in laid_out(case, files, site.dataset["file_ending"], own[case]):
                link(source, raw / target)
    write_json(out / CASES, {name: list(origin) for origin, name in names.items()}, indent=4)
    write_text(out / "federation.toml", to_toml(study.model_dump(mode="json")))


def pooled_names(cases: Mapping[str, tuple[str, ...]]) -> dict[tuple[str, str], str]:
    """Names of all sites' cases together, by site and case: their own, or ``SITE@CASE`` if two sites share one."""
    clash = max(Counter(case for of_site in cases.values() for case in of_site).values()) > 1
    return {(site, case): f"{site}@{case}" if clash else case for site, of_site in cases.items() for case in of_site}


def pooled_folds(folds: Mapping[str, tuple[Fold, ...]], names: Mapping[tuple[str, str], str]) -> list[Fold]:
    """Unions of the sites' folds, as many as all sites with folds have; a site without is trained on.

    Args:
        folds: by site.
        names: of :func:`pooled_names`.
    """
    number = min((len(of_site) for of_site in folds.values() if of_site), default=0)
    undivided = [name for (site, _), name in names.items() if not folds[site]]
    return [
        {
            kind: sorted(
                [names[site, case] for site, of_site in folds.items() if of_site for case in of_site[fold][kind]]
                + (undivided if kind == "train" else [])
            )
            for kind in ("train", "val")
        }
        for fold in range(number)
    ]


def _link_cases(source: Path, target: Path, names: Mapping[str, str], rest: str) -> None:
    """Link the files of the cases under their new names; ``rest`` is what follows a case's name."""
    target.mkdir(exist_ok=True)
    pattern = re.compile(rf"(.+?)({rest})")
    for file in source.iterdir():
        match = pattern.fullmatch(file.name)
        if match is not None and match[1] in names:
            link(file, target / (names[match[1]] + match[2]))
