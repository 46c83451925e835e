"""What an earlier planning or training has left, and nnU-Net would take or overwrite without a word."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from nnunet_fed.datasets.folds import SPLITS, read_folds
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.files import move
from nnunet_fed.planners.dataset import RawDataset
from nnunet_fed.study.federation import PLANS_KEY, STOCK_TRAINER, Federation

logger = logging.getLogger(__name__)
_RESULTS = "nnUNet_results"


def require_no_other_results(dataset: RawDataset, planner: Any, study: Federation) -> None:
    """See that no results of these plans' name belong to a study with another base trainer.

    nnU-Net names the folder of the results by the command's trainer and the plans, and both would be the same.

    Args:
        dataset: this site's.
        planner: class of the study's planner.
        study: whose results would go there.

    Raises:
        ConfigurationError: such results are there.
    """
    name, results = study.plans_name or planner.defaults["plans_name"], os.environ.get(_RESULTS)
    if not results:
        return
    for path in sorted((Path(results) / dataset.name).glob(f"*__{name}__*/plans.json")):
        try:
            carried = json.loads(path.read_text(encoding="utf-8")).get(PLANS_KEY, {}).get("study")
        except (OSError, ValueError):  # they are not read here, and whoever predicts with them is told
            continue
        there = None if carried is None else carried.get("trainer", STOCK_TRAINER)
        if there not in (None, study.trainer):
            raise ConfigurationError(
                f"{path.parent} holds results of the study '{carried.get('name')}', whose base trainer is {there}, and "
                f"the study '{study.name}' builds on {study.trainer}: its results would go into the same folder. Set "
                "another 'plans_name' in federation.toml, or move that folder away."
            )


def drop_newer_references(dataset: RawDataset) -> None:
    """Remove copied references that are newer than the raw ones, which nnU-Net would keep."""
    for case, files in dataset.cases.items():
        copy = dataset.preprocessed / "gt_segmentations" / f"{case}{dataset.json['file_ending']}"
        if copy.is_file() and copy.stat().st_mtime > Path(files["label"]).stat().st_mtime:
            copy.unlink()


def set_old_folds_aside(dataset: RawDataset) -> None:
    """Let nnU-Net make folds anew where those of an earlier training are of other cases.

    It would train on the old ones without a word, and fail on a case that is gone. Folds that the raw data set brings
    are the site's own, and stay.
    """
    path = dataset.preprocessed / SPLITS
    if not path.is_file() or (dataset.folder / SPLITS).is_file():
        return
    folds = read_folds(path)
    cases = {case for fold in folds for part in fold.values() for case in part}
    added, removed = sorted(set(dataset.cases) - cases), sorted(cases - set(dataset.cases))
    if added or removed:
        aside = path.with_suffix(".previous.json")
        logger.warning(
            "%s is of other cases than the data set has now (%d added, %d removed). It is kept as %s, and the next "
            "training makes folds anew; what was trained before has seen other folds.",
            path, len(added), len(removed), aside.name,
        )  # fmt: skip
        move(path, aside)
