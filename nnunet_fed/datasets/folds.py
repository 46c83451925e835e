"""``splits_final.json``: the folds of a cross-validation, as nnU-Net keeps them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from nnunet_fed.datasets.findings import Finding, Severity, counted
from nnunet_fed.errors import ConfigurationError

SPLITS = "splits_final.json"
FOLDS = 5
"""Of nnU-Net's cross-validation, which needs as many cases."""
Folds = list[dict[str, list[str]]]
"""For each fold the names of the cases under ``train`` and under ``val``."""


class FoldChoice(str, Enum):
    """What becomes of folds that an earlier training has left."""

    keep = "keep"
    """No case goes from training to validation or back; the folds are only brought up to date."""
    new = "new"
    """nnU-Net makes them, or takes those that the data set brings."""


def has_folds(cases: int, *folders: Path) -> bool:
    """Whether a site can train a fold by its number: nnU-Net makes folds of enough cases, or somebody has made them.

    Args:
        cases: number of training cases.
        folders: in which the folds may lie: of the raw data set, and of what is preprocessed of it.
    """
    return cases >= FOLDS or any((folder / SPLITS).is_file() for folder in folders)


def read_folds(path: Path) -> Folds:
    """Read the file; raises :class:`ConfigurationError` if it holds no folds."""
    try:
        folds = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} is no valid JSON ({error}): correct it, or remove it.") from None
    if not isinstance(folds, list) or not all(_is_fold(fold) for fold in folds):
        raise ConfigurationError(f"{path} is no list of 'train' and 'val' cases: correct it, or remove it.")
    return [{part: fold[part] for part in ("train", "val")} for fold in folds]


def _is_fold(fold: Any) -> bool:
    parts = [fold.get(part) for part in ("train", "val")] if isinstance(fold, dict) else [None]
    return all(isinstance(part, list) and all(isinstance(case, str) for case in part) for part in parts)


def kept_folds(folds: Folds, cases: Collection[str]) -> Folds:
    """Folds for other cases, in which no case goes from training to validation or back.

    Cases that are gone are taken out. New ones are dealt out, each to the fold with the fewest validation cases; folds
    that validate some cases more than once or never are no cross-validation: these train on all new cases.

    Args:
        folds: which are.
        cases: that there are now.

    Raises:
        ConfigurationError: a fold would have no case left for training or for validation.
    """
    validated = [case for fold in folds for case in fold["val"]]
    is_partition = len(validated) == len(set(validated)) and set(validated) == cases_of(folds)
    kept = [{part: [case for case in names if case in cases] for part, names in fold.items()} for fold in folds]
    for case in sorted(set(cases) - cases_of(folds)):
        chosen = min(kept, key=lambda fold: len(fold["val"])) if is_partition else None
        for fold in kept:
            fold["val" if fold is chosen else "train"].append(case)
    for number, fold in enumerate(kept):
        for part, purpose in (("train", "training"), ("val", "validation")):
            if not fold[part]:
                raise ConfigurationError(f"fold {number} would have no case for {purpose}")
    return [{part: sorted(names) for part, names in fold.items()} for fold in kept]


def cases_of(folds: Folds) -> set[str]:
    """All that are in some fold."""
    return {case for fold in folds for part in fold.values() for case in part}


def check_folds(folder: Path, cases: Collection[str]) -> Iterator[Finding]:
    """What is wrong with the folds that a raw data set brings."""
    path = folder / SPLITS
    if not path.is_file():
        return
    try:
        folds = read_folds(path)
    except ConfigurationError as error:
        found, wanted = (
            str(error).removesuffix(": correct it, or remove it."),
            '[{"train": [CASES], "val": [CASES]}, ...]',
        )
        remedy = "Correct the file, or remove it: nnU-Net then makes five folds."
        yield Finding(Severity.error, "folds", found, wanted, remedy, file=SPLITS)
        return
    named = [case for fold in folds for part in fold.values() for case in part]
    gone, unused = sorted(set(named) - set(cases)), sorted(set(cases) - set(named))
    if gone:
        found, remedy = f"{shown(gone)} of the folds, not in the data set", "Correct the folds, or remove the file."
        yield Finding(Severity.error, "folds", found, "cases of the data set", remedy, file=SPLITS)
    if unused:
        found, remedy = f"{shown(unused)} in no fold, never to be used", "Add them to the folds, or remove"
        yield Finding(Severity.warning, "folds", found, "all cases", f"{remedy} the file.", file=SPLITS)
    empty = [f"{part} of fold {number}" for number, fold in enumerate(folds) for part in fold if not fold[part]]
    if empty:
        found, remedy = (
            f"no case in {', '.join(empty)}",
            "Put at least one case there: a training would end for want of it.",
        )
        yield Finding(Severity.error, "folds", found, "cases in both parts of a fold", remedy, file=SPLITS)
    both = sorted({case for fold in folds for case in set(fold["train"]) & set(fold["val"])})
    if both:
        found, remedy = f"{shown(both)} in 'train' and 'val' of one fold", "Leave each in one of them."
        yield Finding(Severity.warning, "folds", found, "other cases in 'train' than in 'val'", remedy, file=SPLITS)


def shown(cases: Sequence[str]) -> str:
    """Number and first names of cases, for a sentence."""
    return f"{counted(len(cases), 'case')} ({', '.join(cases[:3])}{', ...' if len(cases) > 3 else ''})"
