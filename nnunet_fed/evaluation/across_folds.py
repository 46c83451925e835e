"""What a site's folds say together: of the cases of all validations, as ``nnUNetv2_find_best_configuration`` counts.

Source: ours.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nnunet_fed.evaluation.lesions import METRICS, SMALL_LESIONS, combined
from nnunet_fed.evaluation.summary import MODELS, Numbers, names_of, site_summary
from nnunet_fed.study.federation import Fold

BACKGROUND = "0"


def summary_across_folds(folders: Mapping[Fold, Path], labels: Numbers, all_cases: bool) -> dict[str, Any]:
    """The summary of a site that has trained several folds.

    Args:
        folders: nnU-Net's folder of each fold.
        labels: of ``dataset.json``.
        all_cases: the site has trained each of them on all its cases.

    Returns:
        As :func:`site_summary`, of the cases of all validations together; with each fold's own under ``folds``. Bytes
        are sums, training cases are told where they are the same in all folds.
    """
    of_folds = {fold: site_summary(path, labels, "all" if all_cases else fold) for fold, path in folders.items()}
    together = [site for site in of_folds.values() if site["lesions"]]
    dice: dict[str, float | None] = {}
    per_class: dict[str, float | None] | None = None
    for model in dict.fromkeys(model for site in of_folds.values() for model in site["dice"]):
        files = [path / MODELS[model] / "validation" / "summary.json" for path in folders.values() if model in MODELS]
        if files and all(file.is_file() for file in files):
            by_label = pooled_dice(json.loads(file.read_text(encoding="utf-8")) for file in files)
            dice[model] = _mean(value for label, value in by_label.items() if label != BACKGROUND)
            if model == "final":
                names = names_of(labels)
                per_class = {names.get(label, label): value for label, value in by_label.items()}
    final = dice.get("final")
    personalizes = any("personal" in site["dice"] for site in of_folds.values())
    train_cases = {site["train_cases"] for site in of_folds.values()}
    return {
        "fold": "all" if all_cases else list(of_folds),
        "train_cases": train_cases.pop() if len(train_cases) == 1 else None,
        "val_cases": _sum(site["val_cases"] for site in of_folds.values()),
        "dice": {"final": final, **dice, "personal" if personalizes else "global": final},
        "selector": None,
        "cross_site": _cross_site([site["cross_site"] for site in of_folds.values()]),
        "dice_per_class": per_class,
        SMALL_LESIONS: next((site[SMALL_LESIONS] for site in together), None),
        **(dict.fromkeys(("lesions", *METRICS)) | (combined(together) if together else {})),
        "bytes_sent": _sum(site["bytes_sent"] for site in of_folds.values()),
        "bytes_received": _sum(site["bytes_received"] for site in of_folds.values()),
        "folds": {str(fold): site for fold, site in of_folds.items()},
    }


def pooled_dice(summaries: Iterable[Numbers]) -> dict[str, float | None]:
    """Mean Dice over the cases of several of nnU-Net's ``summary.json``, by its name of the label."""
    values: dict[str, list[float]] = defaultdict(list)
    for summary in summaries:
        for case in summary["metric_per_case"]:
            for label, metrics in case["metrics"].items():
                values[label].append(metrics["Dice"])
    return {label: _mean(of_label) for label, of_label in values.items()}


def _cross_site(columns: list[Mapping[str, Any] | None]) -> dict[str, float | None] | None:
    known = [column for column in columns if column]
    models = dict.fromkeys(model for column in known for model in column)
    return {model: _mean(column.get(model) for column in known) for model in models} or None


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.fmean(there) if there else None


def _sum(values: Iterable[int | None]) -> int | None:
    there = [value for value in values if value is not None]
    return sum(there) if there else None
