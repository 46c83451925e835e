"""How well the models do: Dice by site, model and class, by lesion size, and of each model at each site."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from nnunet_fed.evaluation.lesions import SMALL_LESIONS
from nnunet_fed.report.blocks import (
    NOTHING,
    Paragraph,
    Section,
    Table,
    count,
    interval,
    number,
)
from nnunet_fed.report.charts import intervals, matrix
from nnunet_fed.report.gather import Run, models_of

RESAMPLES = 2000
COVERAGE = 0.95
MODEL_NAMES = {
    "final": "deployed model", "personal": "personal model", "global": "global model",
    "federated": "after the rounds", "super": "super model",
}  # fmt: skip
_INTERVALS = (
    f"Intervals are percentiles of a bootstrap over a site's validation cases ({COVERAGE:.0%}). They say how much the "
    "mean depends on which cases there are, and nothing of other seeds; with few cases they are too narrow."
)


def case_dice(validation: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Dice by case and class, out of nnU-Net's ``summary.json``; NaN where a class is neither there nor predicted."""
    return {
        _case(entry): {label: _float(metrics.get("Dice")) for label, metrics in entry["metrics"].items()}
        for entry in validation.get("metric_per_case", [])
    }


def _case(entry: Mapping[str, Any]) -> str:
    """Name of a case: that of its file, up to the ending."""
    return str(entry["prediction_file"]).replace("\\", "/").rpartition("/")[2].partition(".")[0]


def _float(value: float | None) -> float:
    return math.nan if value is None else float(value)


def bootstrap_interval(cases: Mapping[str, Mapping[str, float]]) -> tuple[float | None, float | None]:
    """Percentile interval of nnU-Net's mean Dice (over cases, then over classes), by resampling the cases.

    Args:
        cases: Dice by case and class.

    Returns:
        Both ends; ``None`` with fewer than two cases.
    """
    values = np.array([list(case.values()) for case in cases.values()], np.float64)
    if len(values) < 2:
        return None, None
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    sample = values[drawn]
    there = np.isfinite(sample)
    with np.errstate(invalid="ignore"):  # a class may be in none of the drawn cases
        by_class = np.where(there, sample, 0).sum(1) / there.sum(1)
        known = np.isfinite(by_class)
        means = np.where(known, by_class, 0).sum(1) / known.sum(1)
    means = means[np.isfinite(means)]
    if not len(means):
        return None, None
    low, high = np.quantile(means, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)


def dice_section(run: Run) -> Section:
    """Dice of each site's models, with intervals; by class; and by lesion size."""
    section = Section("dice", "Dice")
    summary, rows = run.summary, []
    for name, site in summary.get("sites", {}).items():
        for model in models_of(summary):
            value = site["dice"].get(model)
            if value is not None:
                files = run.sites.get(name)
                stored = {} if files is None else files.validation.get("final" if model == "personal" else model, {})
                rows.append((name, MODEL_NAMES.get(model, model), value, *bootstrap_interval(case_dice(stored))))
    sites = summary.get("sites", {})
    without = [name for name, site in sites.items() if site["val_cases"] and site["dice"]["final"] is None]
    if not rows and not without:
        return section
    if rows:
        section.blocks.append(intervals("Dice", rows, "Mean Dice of each site's validation cases. " + _INTERVALS))
    table = [[name, model, number(value), interval(low, high)] for name, model, value, low, high in rows]
    table += [[name, MODEL_NAMES["final"], NOTHING, NOTHING] for name in without]
    for model, value in summary.get("mean_dice", {}).items():
        if model in models_of(summary):
            table.append(["mean over sites", MODEL_NAMES.get(model, model), number(value), NOTHING])
    note = ""
    if without:
        note = (
            f"{', '.join(without)}: no foreground in the validation cases, and none predicted; such a site has no Dice "
            "and is not in the mean."
        )
    section.blocks.append(Table("Dice by site and model", ("Site", "Model", "Dice", "Interval"), table, note, 2))
    section.blocks.extend(_by_class(summary))
    section.blocks.extend(_by_size(summary))
    return section


def _by_class(summary: Mapping[str, Any]) -> Iterator[Table]:
    sites = summary["sites"]
    classes = list(dict.fromkeys(label for site in sites.values() for label in site.get("dice_per_class") or ()))
    if len(classes) > 1:
        rows = [
            [name, *(number((site.get("dice_per_class") or {}).get(c)) for c in classes)]
            for name, site in sites.items()
        ]
        yield Table("Dice by class, of the model that each site deploys", ("Site", *classes), rows)


def _by_size(summary: Mapping[str, Any]) -> Iterator[Table]:
    blocks = {name: site for name, site in [*summary["sites"].items(), ("all sites", summary)] if site.get("lesions")}
    rows = []
    for name, block in blocks.items():
        for label, counts in block["lesions"].items():
            metrics = ("dice_small", "dice_large", "lesion_recall_small", "lesion_recall_large")
            limit = (block.get(SMALL_LESIONS) or {}).get(label)
            rows.append(
                [
                    name, label, number(limit, 1), f"{counts['small']} / {counts['large']}",
                    *(number((block.get(metric) or {}).get(label)) for metric in metrics),
                    count(counts.get("false_positives")),
                ]
            )  # fmt: skip
    if rows:
        head = (
            "Site",
            "Class",
            "Small: up to (mm³)",
            "Small / large",
            "Dice small",
            "large",
            "Recall small",
            "large",
            "False",
        )
        note = (
            "Lesions are connected components; recall is the share that the prediction touches; false ones touch none."
        )
        yield Table("By lesion size", head, rows, note, 2)


def cross_site_section(name: str, crossed: Mapping[str, Any] | None) -> Section:
    """Each site's model at each site.

    Args:
        name: of the run.
        crossed: Dice by the model's site, then by the site at which it was evaluated.
    """
    section = Section("cross-site", "Each model at each site")
    if not crossed:
        return section
    models = list(crossed)
    places = list(dict.fromkeys(place for row in crossed.values() for place in row))
    values = [[_dice_of(crossed[model].get(place)) for place in places] for model in models]
    section.blocks.append(Paragraph("Models travelled, data did not: each site's model was evaluated at each site."))
    labels = ("model of", "evaluated at")
    section.blocks.append(
        matrix("Dice", models, places, values, labels, f"Mean Dice of each site's model at each site ({name}).")
    )
    rows = [[model, *map(number, row)] for model, row in zip(models, values, strict=True)]
    section.blocks.append(Table("Dice of the model in the row at the site in the column", ("Model of", *places), rows))
    return section


def _dice_of(entry: Any) -> float | None:
    return None if entry is None else float(entry)
