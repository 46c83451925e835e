"""What came out of a simulation: Dice by nnU-Net's own validation, by lesion size, and the traffic. Source: ours."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from nnunet_fed.evaluation.foreground import foreground_dice
from nnunet_fed.evaluation.lesions import METRICS, SMALL_LESIONS, combined
from nnunet_fed.exchange.cross_site_matrix import matrix
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.labels import in_numbers

Numbers = Mapping[str, Any]
MODELS = {"final": "", "global": "global", "federated": "federated", "super": "super"}
"""Where, in the folder of a fold, the validation of each model stands."""
ALL_NOTE = "trained and validated on all its cases; not in the mean"
SIZE_NOTE = "Small: up to the volume in mm³ (2D: area in mm²) below which a fifth of the training lesions lie"


def site_summary(results: Path, labels: Numbers, fold: int | str) -> dict[str, Any]:
    """Read what a training left; ``None`` stands for what is not there.

    Args:
        results: nnU-Net's folder of the fold.
        labels: of ``dataset.json``.
        fold: the fold.
    """
    record, validation = _read(results / "federation.json"), _read(results / "validation" / "summary.json")
    lesions = _read(results / "validation" / "lesions.json")
    names = names_of(labels)
    dice = {
        model: foreground_dice(_read(results / folder / "validation" / "summary.json"))
        for model, folder in MODELS.items()
        if (results / folder / "validation" / "summary.json").is_file()
    }
    final = dice.get("final")
    if "global" in dice or "federated" in dice:  # a method that personalizes: what the site keeps is its own
        dice["personal"] = final
    else:
        dice["global"] = final
    return {
        "fold": fold,
        "train_cases": record.get("training_cases"),
        "val_cases": len(validation["metric_per_case"]) if validation else None,
        "dice": {"final": final, **dice},
        "selector": record.get("selector"),
        "cross_site": record.get("cross_site", {}).get("evaluated_here"),
        "dice_per_class": {
            names.get(key, key): _finite(metrics["Dice"]) for key, metrics in validation.get("mean", {}).items()
        }
        or None,
        **{key: lesions.get(key) for key in (SMALL_LESIONS, "lesions", *METRICS)},
        "bytes_sent": record.get("bytes_sent"),
        "bytes_received": record.get("bytes_received"),
    }


def names_of(labels: Numbers) -> dict[str, str]:
    """By nnU-Net's name of a label in its results: that of ``dataset.json``."""
    return {str(tuple(value) if isinstance(value, list) else value): name for name, value in in_numbers(labels).items()}


def summarise(study: Federation, sites: Mapping[str, Numbers], seconds: float) -> dict[str, Any]:
    """The sites' summaries, with their mean Dice and with means over the lesions of all sites.

    Both are of the sites that kept validation cases apart.
    """
    counted = [site for site in sites.values() if site["fold"] != "all"]
    of_all = combined([site for site in counted if site["lesions"]])
    return {
        "method": study.method.name,
        "rounds": study.all_rounds,
        "seed": study.seed,
        **({"folds": list(study.folds)} if study.folds else {}),
        "seconds": round(seconds, 1),
        "sites": dict(sites),
        "mean_dice": {model: _mean([site["dice"].get(model) for site in counted]) for model in _models(counted)},
        "selector": next((site["selector"] for site in sites.values() if site["selector"]), None),
        "cross_site": matrix({name: site["cross_site"] for name, site in sites.items()}, sites) or None,
        # the plans' own, hence the same at all sites
        SMALL_LESIONS: next((site[SMALL_LESIONS] for site in sites.values() if site[SMALL_LESIONS]), None),
        **{key: by_class or None for key, by_class in of_all.items()},
    }


def result_table(summary: Numbers) -> Table:
    """A row for each site, and one for the mean."""
    sites = summary["sites"]
    classes = list(dict.fromkeys(name for site in sites.values() for name in site["dice_per_class"] or ()))
    folds = [f"folds {', '.join(map(str, summary['folds']))}"] if "folds" in summary else []
    title = ", ".join([summary["method"], *folds, f"{summary['rounds']} rounds", f"seed {summary['seed']}"])
    title += f", {summary['seconds']:.0f} s"
    notes = "\n".join(
        [
            *(f"* {name}: {ALL_NOTE}" for name, site in sites.items() if site["fold"] == "all"),
            *(f"{name}: {note}" for name, site in sites.items() if (note := _undefined(site))),
        ]
    )
    table = Table(
        title=Text(title), caption=Text(notes), caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("Site")
    mean = summary["mean_dice"]
    # one column where the model that a site keeps is the global one
    models = {f"Dice, {model} model": model for model in ("personal", "global", "federated", "super") if model in mean}
    if "personal" not in mean:
        models = {"Dice": "final"}
    heads = ["Train. cases", "Val. cases", *models, *classes, "Sent", "Received"]
    for head in heads:
        table.add_column(Text(head), justify="right", overflow="fold")
    for name, site in sites.items():
        per_class = site["dice_per_class"] or {}
        table.add_row(
            f"{name} *" if site["fold"] == "all" else name,
            _count(site["train_cases"]),
            _count(site["val_cases"]),
            *(_dice(site["dice"].get(model)) for model in models.values()),
            *(_dice(per_class.get(label)) for label in classes),
            _megabytes(site["bytes_sent"]),
            _megabytes(site["bytes_received"]),
        )
    table.add_section()
    table.add_row("mean", "", "", *(_dice(mean[model]) for model in models.values()))
    return table


def lesion_table(summary: Numbers) -> Table | None:
    """A row for each site and class, and one for each class at all sites; ``None`` where no lesion was compared."""
    blocks = {f"{name} *" if site["fold"] == "all" else name: site for name, site in summary["sites"].items()}
    blocks = {name: block for name, block in [*blocks.items(), ("all sites", summary)] if block["lesions"]}
    if not blocks:
        return None
    notes = [f"* {ALL_NOTE}"] if any(name.endswith(" *") for name in blocks) else []
    table = Table(
        title="By lesion size",
        caption=Text("\n".join([SIZE_NOTE, *notes])),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("Site")
    table.add_column("Class", overflow="fold")
    heads = ["Small: up to", "Lesions small/large", "Dice small", "large", "all", "Recall small", "large"]
    for head in heads:
        table.add_column(head, justify="right")
    metrics = ("dice_small", "dice_large", "dice_lesions", "lesion_recall_small", "lesion_recall_large")
    for name, block in blocks.items():
        for label, count in block["lesions"].items():
            threshold = (block[SMALL_LESIONS] or {}).get(label)
            table.add_row(
                Text(name),
                Text(label),
                "-" if threshold is None else f"{threshold:.1f}",
                f"{count['small']}/{count['large']}",
                *(_dice(block[metric][label]) for metric in metrics),
            )
        table.add_section()
    return table


def _undefined(site: Numbers) -> str:
    """What there is no Dice of, as a sentence; empty if there is all."""
    if site["dice_per_class"] is None:  # it was not validated
        return ""
    if site["dice"]["final"] is None:
        return "no foreground in its validation cases, and none predicted: it has no Dice, and is not in the mean"
    missing = [name for name, dice in site["dice_per_class"].items() if dice is None]
    return f"nowhere in its validation: {', '.join(missing)}; its Dice is of the other classes" if missing else ""


def _models(sites: Iterable[Numbers]) -> list[str]:
    return list(dict.fromkeys(["final", *(model for site in sites for model in site["dice"])]))


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content


def _finite(value: float | None) -> float | None:
    """Without nnU-Net's NaN (a class that is nowhere), which is no JSON."""
    return value if value is not None and math.isfinite(value) else None


def _mean(values: list[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)


def _dice(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:.1f} MB"
