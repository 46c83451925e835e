"""What an earlier planning or training has left, and nnU-Net would take or overwrite without a word."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from nnunet_fed.datasets.folds import SPLITS, FoldChoice, Folds, cases_of, kept_folds, read_folds, shown
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.files import move, write_json
from nnunet_fed.planners.dataset import RawDataset, file_states
from nnunet_fed.planners.mapping import PROVENANCE

logger = logging.getLogger(__name__)
PLANNED_CASES = "planned_cases.json"
"""Beside the plans: the cases that were planned with, and of each file size and time."""


def drop_newer_references(dataset: RawDataset) -> None:
    """Remove copied references that are newer than the raw ones, which nnU-Net would keep."""
    for case, files in dataset.cases.items():
        copy = dataset.preprocessed / "gt_segmentations" / f"{case}{dataset.json['file_ending']}"
        if copy.is_file() and copy.stat().st_mtime > Path(files["label"]).stat().st_mtime:
            copy.unlink()


def tell_changed_cases(dataset: RawDataset) -> None:
    """Say which cases were added, removed or changed since the last planning, if there was one."""
    try:
        before: dict[str, Any] = json.loads((dataset.preprocessed / PLANNED_CASES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    now = _states(dataset)
    changes = {
        "added": sorted(now.keys() - before.keys()),
        "removed": sorted(before.keys() - now.keys()),
        "changed": sorted(case for case in now.keys() & before.keys() if now[case] != before[case]),
    }
    if any(changes.values()):
        told = ", ".join(f"{shown(cases)} {what}" for what, cases in changes.items() if cases)
        logger.warning("Since the last planning of %s with %d cases: %s.", dataset.name, len(before), told)


def note_cases(dataset: RawDataset) -> None:
    """Keep what :func:`tell_changed_cases` compares with."""
    write_json(dataset.preprocessed / PLANNED_CASES, _states(dataset), indent=None)


def _states(dataset: RawDataset) -> dict[str, Any]:
    states: dict[str, Any] = file_states(dataset.cases)
    if PROVENANCE not in dataset.json:
        return states
    # the label files of a mapped data set are all written anew when one is: their times tell nothing
    return {case: [*images, label[:-1]] for case, (*images, label) in states.items()}


def look_at_old_folds(dataset: RawDataset, choice: FoldChoice) -> None:
    """See before anything is sent that the folds can be what they are to be; with ``new`` set the old ones aside.

    Raises:
        ConfigurationError: they cannot be kept, or are not those that the data set brings.
    """
    path, brought = dataset.preprocessed / SPLITS, dataset.folder / SPLITS
    if not path.is_file():
        return
    if choice is FoldChoice.new:
        aside = _aside(path)
        move(path, aside)
        logger.warning("%s is kept as %s; folds are made anew: start trainings without --c.", path, aside.name)
    elif brought.is_file():
        if read_folds(brought) != read_folds(path):  # nnU-Net would end with an AssertionError
            raise ConfigurationError(
                f"The folds in {brought} are not those in {path}, with which earlier trainings were made. Give "
                "--folds new if the former are right; cases that were trained on may then be validated on."
            )
    else:
        _kept(path, dataset)


def bring_folds_up_to_date(dataset: RawDataset) -> None:
    """Let the folds of an earlier training have the cases that there are now, once these are preprocessed.

    nnU-Net would never train on new ones without a word, and fail on one that is gone. Folds that the raw data set
    brings are the site's own, and stay.
    """
    path = dataset.preprocessed / SPLITS
    if not path.is_file() or (dataset.folder / SPLITS).is_file():
        return
    before, kept = read_folds(path), _kept(path, dataset)
    added = sorted(set(dataset.cases) - cases_of(before))
    removed = sorted(cases_of(before) - set(dataset.cases))
    if not added and not removed:
        return
    aside = _aside(path)
    told = []
    if added:
        where = {fold for fold, content in enumerate(kept) if set(added) & set(content["val"])}
        validated = f" (validated in fold {', '.join(map(str, sorted(where)))})" if where else ""
        told.append(f"{shown(added)} added to the folds{validated}")
    if removed:
        told.append(f"{shown(removed)} taken out")
    move(path, aside)
    write_json(path, kept, indent=4)
    logger.warning(
        "%s: %s. No other case changes its fold. The file as it was is kept as %s; '--folds new' makes folds anew.",
        path, ", ".join(told), aside.name,
    )  # fmt: skip


def _aside(path: Path) -> Path:
    return path.with_suffix(".previous.json")


def _kept(path: Path, dataset: RawDataset) -> Folds:
    try:
        return kept_folds(read_folds(path), dataset.cases)
    except ConfigurationError as error:
        if str(path) in str(error):
            raise
        raise ConfigurationError(
            f"{path} is of other cases than {dataset.name} has now: {error}. Nothing was sent. Give --folds new: folds "
            "are made anew then, in which cases that were trained on before may be validated on."
        ) from None
