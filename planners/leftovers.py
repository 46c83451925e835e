"""What an earlier planning or training has left in ``nnUNet_preprocessed``, and nnU-Net would take without a word."""

from __future__ import annotations

import logging
from pathlib import Path

from nnunet_fed.datasets.folds import SPLITS, read_folds
from nnunet_fed.files import move
from nnunet_fed.planners.dataset import RawDataset

logger = logging.getLogger(__name__)


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
