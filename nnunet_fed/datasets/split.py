"""Site folders from one pooled data set in nnU-Net's raw layout, to try a federation without several hospitals.

Only the training cases are split; test images stay where they are. A list of files in ``dataset.json`` becomes
``imagesTr`` and ``labelsTr``. Source: ours.
"""

from __future__ import annotations

import csv
import hashlib
import logging
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from nnunet_fed.datasets.description import NAME, read_description
from nnunet_fed.datasets.findings import FILE, Report, require
from nnunet_fed.datasets.folds import SPLITS, read_folds
from nnunet_fed.datasets.listing import laid_out, list_cases
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.files import link, new_folder, write_json
from nnunet_fed.study.federation import SITE_NAME

logger = logging.getLogger(__name__)
NOTHING = "nothing was written"


def split_by_column(folder: Path, out: Path, column: str, limit: int | None = None) -> dict[str, list[str]]:
    """One site for each value of a column of ``cases.csv``.

    Args:
        folder: pooled data set: ``imagesTr``, ``labelsTr``, ``dataset.json`` and ``cases.csv`` with a column ``case``.
        out: new or empty folder; gets ``out/SITE`` in the same layout, as links to the original files.
        column: column whose values become site names; characters that no site name may have become ``_``.
        limit: at most so many cases per site, chosen at random with seed 0; a smaller limit keeps a subset of a
            larger one's cases.

    Returns:
        Sorted case names by site name; the sites are sorted.

    Raises:
        ConfigurationError: unusable folder, non-empty ``out``, no such column, a case without a value in it, two
            values that give the same site name, or ``limit`` below 1. Nothing is written then.
    """
    pool = _Pool.read(folder)
    table = folder / "cases.csv"
    if pool.table is None:
        raise ConfigurationError(f"{table} does not exist: write one with the columns 'case' and '{column}'.")
    if column not in pool.table.header:
        raise ConfigurationError(f"{table} has no column '{column}'; its columns are {', '.join(pool.table.header)}.")

    sites: dict[str, list[str]] = {}
    values: dict[str, str] = {}
    for case in pool.files:
        value = pool.table.rows.get(case, {}).get(column, "").strip()
        if not value:
            raise ConfigurationError(f"{table} has no '{column}' for case '{case}': add it, or remove the case.")
        site = _site_name(value, table)
        # Windows and macOS would put 'A' and 'a' into one folder
        if values.setdefault(site.casefold(), value) != value:
            raise ConfigurationError(
                f"{table}: '{values[site.casefold()]}' and '{value}' in column '{column}' give the same site name "
                f"'{site}'; rename one of them."
            )
        sites.setdefault(site, []).append(case)
    return _write(pool, out, dict(sorted(sites.items())), limit, seed=0)


def split_at_random(
    folder: Path, out: Path, sites: int, alpha: float | None = None, limit: int | None = None, seed: int = 0
) -> dict[str, list[str]]:
    """Sites ``site_1`` to ``site_N`` with cases drawn at random.

    Args:
        folder: pooled data set: ``imagesTr``, ``labelsTr``, ``dataset.json`` and, if there is one, ``cases.csv``.
        out: new or empty folder; gets ``out/SITE`` in the same layout, as links to the original files.
        sites: number of sites, at most the number of cases.
        alpha: ``None``: sizes that differ by one case at most; else sizes proportional to a draw from a symmetric
            Dirichlet distribution of this concentration (small: very unequal), with at least one case per site.
        limit: at most so many cases per site, chosen at random; a smaller limit keeps a subset of a larger one's cases.
        seed: of the assignment, of the sizes and of the choice under ``limit``; at least 0.

    Returns:
        Sorted case names by site name, in the order of the sites' numbers.

    Raises:
        ConfigurationError: unusable folder, non-empty ``out``, or a number out of its range. Nothing is written then.
    """
    pool = _Pool.read(folder)
    if not 1 <= sites <= len(pool.files):
        raise ConfigurationError(f"{folder} cannot make {sites} sites: ask for 1 to {len(pool.files)}, its cases.")
    if alpha is not None and not 0 < alpha < math.inf:
        raise ConfigurationError(f"alpha is {alpha}: use a positive number, for example 0.5.")
    if seed < 0:
        raise ConfigurationError(f"The seed is {seed}: use 0 or more.")
    shares = np.full(sites, 1 / sites) if alpha is None else np.random.default_rng(seed).dirichlet([alpha] * sites)
    # one case each, the others by share; rounding the running sum keeps the total exact
    edges = [0, *(1 + np.arange(sites) + np.rint(np.cumsum(shares) * (len(pool.files) - sites)).astype(int)).tolist()]
    cases = _shuffled(pool.files, f"assign {seed}")
    assigned = {f"site_{i}": cases[a:b] for i, (a, b) in enumerate(pairwise(edges), start=1)}
    return _write(pool, out, assigned, limit, seed)


@dataclass(frozen=True)
class _Table:
    header: list[str]
    rows: dict[str, dict[str, str]]
    """By case."""

    @classmethod
    def read(cls, path: Path) -> _Table:
        try:
            reader = csv.DictReader(StringIO(path.read_text(encoding="utf-8-sig")))
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"{path} is no UTF-8 text: {error}. Save it as UTF-8.") from None
        header = list(reader.fieldnames or [])
        if "case" not in header:
            raise ConfigurationError(f"{path} has no column 'case'; its columns are {', '.join(header) or 'none'}.")
        rows: dict[str, dict[str, str]] = {}
        for row in reader:
            if None in row or None in row.values():
                raise ConfigurationError(
                    f"{path}, line {reader.line_num}: the row needs {len(header)} cells, as the first line has."
                )
            if row["case"] in rows:
                raise ConfigurationError(f"{path} has case '{row['case']}' twice: remove one of the two rows.")
            rows[row["case"]] = row
        return cls(header, rows)

    def write(self, path: Path, cases: Iterable[str]) -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self.header, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows[case] for case in cases if case in self.rows)


@dataclass(frozen=True)
class _Pool:
    folder: Path
    dataset: dict[str, Any]
    files: dict[str, list[tuple[Path, str]]]
    """By case: images, label and TIFF's spacing files, each with its place in the site's folder; sorted by case."""
    table: _Table | None
    folds: list[dict[str, list[str]]] | None
    """Of ``splits_final.json``."""

    @classmethod
    def read(cls, folder: Path) -> _Pool:
        dataset, findings = read_description(folder / NAME)
        require([Report(str(folder), folder, tuple(findings), 0)], NOTHING)
        if not dataset or not isinstance(dataset.get("file_ending"), str):
            raise ConfigurationError(f"{folder / NAME} has no 'file_ending': add it, for example '.nii.gz'.")
        listing = list_cases(folder, {key: value for key, value in dataset.items() if key != "numTraining"})
        require([Report(str(folder), folder, tuple(listing.findings), len(listing.cases))], NOTHING)
        ending = dataset["file_ending"]
        files = {case: list(laid_out(case, listing.cases[case], ending)) for case in sorted(listing.cases)}
        table, splits = folder / "cases.csv", folder / SPLITS
        return cls(
            folder,
            {key: value for key, value in dataset.items() if key != "dataset"},
            files,
            _Table.read(table) if table.is_file() else None,
            read_folds(splits) if splits.is_file() else None,
        )


def _site_name(value: str, table: Path) -> str:
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", value).lstrip("_.-")[:63]
    if not SITE_NAME.fullmatch(name):
        raise ConfigurationError(f"{table}: '{value}' gives no site name: use letters or digits.")
    return name


def _shuffled(cases: Iterable[str], salt: str) -> list[str]:
    """Random order by hash: the same with every version of Python and numpy, and with cases added or removed."""
    return sorted(cases, key=lambda case: hashlib.sha256(f"{salt}/{case}".encode()).digest())


def _write(pool: _Pool, out: Path, sites: dict[str, list[str]], limit: int | None, seed: int) -> dict[str, list[str]]:
    if limit is not None and limit < 1:
        raise ConfigurationError(f"The limit is {limit}: use at least 1 case per site.")
    new_folder(out, FILE)
    chosen = {site: sorted(_shuffled(cases, f"limit {seed}")[:limit]) for site, cases in sites.items()}
    for site, cases in chosen.items():
        for subset in ("imagesTr", "labelsTr"):
            (out / site / subset).mkdir(parents=True)
        write_json(out / site / "dataset.json", {**pool.dataset, "numTraining": len(cases)}, indent=4)
        if pool.table is not None:
            pool.table.write(out / site / "cases.csv", cases)
        if pool.folds is not None:
            _write_folds(out / site / SPLITS, pool.folds, set(cases))
    files = [(site, file) for site, cases in chosen.items() for case in cases for file in pool.files[case]]
    for site, (source, place) in track(files, description="Splitting"):
        link(source, out / site / place)
    return chosen


def _write_folds(path: Path, folds: list[dict[str, list[str]]], cases: set[str]) -> None:
    own = [{part: [case for case in names if case in cases] for part, names in fold.items()} for fold in folds]
    if all(fold["train"] and fold["val"] for fold in own):
        write_json(path, own, indent=4)
    else:
        logger.warning("%s is left out: a fold has no training or no validation case of this site.", path)
