"""What each case scored in a comparison: a row for each method, seed, site, case and class. Source: ours."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from nnunet_fed.errors import FederationError
from nnunet_fed.evaluation.surface import evaluate_surfaces
from nnunet_fed.files import replacing, write_json

METRICS = ("dice", "hd95", "nsd", "small_dice", "large_dice")
COLUMNS = ("method", "seed", "site", "case", "class", *METRICS)
"""Of ``compare.csv``."""
CACHE = "case_scores.json"
"""In the folder of an arm."""

Origins = Mapping[str, tuple[str, str]]
"""Site and name of each case of pooled data."""


@dataclass(frozen=True)
class CaseScore:
    """What one class of one validation case scored; ``None``: undefined."""

    method: str
    seed: int
    site: str
    case: str
    label: str
    """Name of the class."""
    dice: float | None
    hd95: float | None
    """In mm."""
    nsd: float | None
    small_dice: float | None
    """Mean lesion-wise Dice of the case's small lesions; see :mod:`nnunet_fed.evaluation.lesions`."""
    large_dice: float | None


def scores_of_run(
    run: Path, method: str, seed: int, tolerance: float, console: Console, origins: Origins | None = None
) -> list[CaseScore]:
    """Score what the sites of an arm predicted in nnU-Net's validation, or take what was scored before.

    Args:
        run: folder of the arm.
        method: of the arm.
        seed: of the arm.
        tolerance: of NSD in mm.
        console: for the progress.
        origins: where the cases come from, if the arm has one site with the data of all.

    Returns:
        Rows by site, case and class. Sites that train on all their cases have none.

    Raises:
        FederationError: a case cannot be compared.
    """
    cache = run / CACHE
    if cache.is_file():
        content = json.loads(cache.read_text(encoding="utf-8"))
        if content["tolerance"] == tolerance:
            return [CaseScore(**row) for row in content["rows"]]
    found = [
        CaseScore(method, seed, *((origins or {}).get(case, (site, case))), *row)
        for site, case, *row in _scored(run, method, seed, tolerance, console)
    ]
    rows = sorted(found, key=lambda row: (row.site, row.case))
    write_json(cache, {"tolerance": tolerance, "rows": [asdict(row) for row in rows]}, indent=None)
    return rows


def write_csv(path: Path, rows: Iterable[CaseScore]) -> None:
    """Write :data:`COLUMNS`; what is undefined is empty."""
    with replacing(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([getattr(row, field.name) for field in fields(CaseScore)] for row in rows)


def _scored(run: Path, method: str, seed: int, tolerance: float, console: Console) -> Iterator[tuple[Any, ...]]:
    """Site, case, class and scores of each case in the validations of a run."""
    told = json.loads((run / "summary.json").read_text(encoding="utf-8"))["sites"]
    todo = [
        (validation, case)
        for site in sorted((run / "sites").iterdir())
        for path in sorted(site.glob("nnUNet_results/*/*/fold_*/validation/lesions.json"))
        if told[site.name]["fold"] != "all"
        for validation in [_Validation(site.name, path.parent)]
        for case in validation.lesions
    ]
    for validation, case in track(todo, f"Scoring {method}, seed {seed}", console=console):
        for label, scores in validation.scores(case, tolerance).items():
            yield validation.site, case, label, *scores


class _Validation:
    """What nnU-Net's validation left at a site."""

    def __init__(self, site: str, folder: Path):
        self.site, self.folder = site, folder
        model, results = folder.parents[1], folder.parents[2]
        plans = json.loads((model / "plans.json").read_text(encoding="utf-8"))
        configuration = plans["configurations"][model.name.rpartition("__")[2]]
        self._dataset = json.loads((model / "dataset.json").read_text(encoding="utf-8"))
        self.lesions = json.loads((folder / "lesions.json").read_text(encoding="utf-8"))["cases"]
        self._preprocessed = results.parents[1] / "nnUNet_preprocessed" / results.name
        self._cases = self._preprocessed / configuration["data_identifier"]
        self._reader = plans["image_reader_writer"]

    def scores(self, case: str, tolerance: float) -> dict[str, tuple[float | None, ...]]:
        """Of each class, in the order of :data:`METRICS`."""
        from batchgenerators.utilities.file_and_folder_operations import load_pickle
        from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

        name = f"{case}{self._dataset['file_ending']}"
        reader = recursive_find_reader_writer_by_name(self._reader)()
        try:
            reference, _ = reader.read_seg(str(self._preprocessed / "gt_segmentations" / name))
            prediction, _ = reader.read_seg(str(self.folder / name))
            # the image's own, as preprocessing read it: a label file need not have one
            spacing = load_pickle(str(self._cases / f"{case}.pkl"))["spacing"]
            found = evaluate_surfaces(reference[0], prediction[0], spacing, self._dataset["labels"], tolerance)
        except Exception as error:  # the readers raise whatever their libraries do
            raise FederationError(
                f"The prediction {self.folder / name} cannot be compared with its reference: {type(error).__name__}: "
                f"{error}. Remove the folder of this arm, and compare again."
            ) from error
        return {
            label: (scores.dice, scores.hd95, scores.nsd, *self._by_size(case, label))
            for label, scores in found.items()
        }

    def _by_size(self, case: str, label: str) -> list[float | None]:
        lesions = self.lesions[case][label]["lesions"]
        strata = [[lesion["dice"] for lesion in lesions if lesion["small"] is small] for small in (True, False)]
        return [statistics.fmean(stratum) if stratum else None for stratum in strata]
