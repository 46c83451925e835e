"""How the methods of a comparison do: Dice by site and method, what they cost, and how they differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from nnunet_fed.report.blocks import NOTHING, Figure, Section, Table, duration, interval, megabytes, number
from nnunet_fed.report.charts import intervals
from nnunet_fed.report.gather import Comparison

_OVERALL = "overall"
_PAIRED = "Paired over cases; an interval that leaves out 0 tells the two apart."


def comparison_section(comparison: Comparison) -> Section:
    """Dice of each method at each site, what the methods cost, and how they differ."""
    section = Section("dice", "Dice by site and method")
    methods = comparison.content["methods"]
    sites = list(dict.fromkeys(site for figures in methods.values() for site in figures.get("dice", {})))
    rows, table = [], []
    for site in [*sites, _OVERALL]:
        for method, figures in methods.items():
            dice = (figures.get(_OVERALL) if site == _OVERALL else figures.get("dice", {}).get(site)) or {}
            if dice.get("mean") is not None:
                rows.append((site, method, dice["mean"], dice.get("low"), dice.get("high")))
                spread = number(dice.get("sd_seeds"))
                table.append([site, method, number(dice["mean"]), interval(dice.get("low"), dice.get("high")), spread])
    if rows:
        caption = "Mean Dice of the validation cases, with the bootstrap interval over cases that 'compare' computed."
        section.blocks.append(intervals("Dice", rows, caption))
        head = ("Site", "Method", "Dice", "Interval", "Std. deviation over seeds")
        section.blocks.append(Table("Dice by site and method", head, table, texts=2))
    section.blocks.append(_overview(methods))
    section.blocks.extend(_differences(comparison.content.get("differences") or []))
    section.blocks.extend(_strata(comparison.cases))
    return section


def _overview(methods: Mapping[str, Any]) -> Table:
    rows = []
    for method, figures in methods.items():
        overall, worst = figures.get(_OVERALL) or {}, figures.get("worst_site") or {}
        rows.append(
            [
                method, str(worst.get("site", NOTHING)), number(overall.get("mean")), number(worst.get("mean")),
                number(figures.get("spread")), number(figures.get("gap_closed"), 2), megabytes(figures.get("bytes")),
                duration(figures.get("seconds")),
            ]
        )  # fmt: skip
    head = (
        "Method",
        "Worst site",
        "Dice overall",
        "at the worst site",
        "Spread of sites",
        "Gap closed",
        "Traffic",
        "Time",
    )
    note = "Gap closed: the share of the way from training alone (0) to training on all data together (1)."
    return Table("Methods", head, rows, note, 2)


def _differences(differences: list[dict[str, Any]]) -> Iterator[Figure | Table]:
    rows = [
        (f"{entry['a']} \N{MINUS SIGN} {entry['b']}", "difference", entry["mean"], entry.get("low"), entry.get("high"))
        for entry in differences
        if entry.get("mean") is not None
    ]
    if rows:
        yield intervals("difference in Dice", rows, _PAIRED, zero=True)
        table = [[pair, number(mean), interval(low, high)] for pair, _, mean, low, high in rows]
        yield Table("Differences between methods", ("Pair", "Difference in Dice", "Interval"), table)


def _strata(cases: list[dict[str, str]]) -> Iterator[Table]:
    """Means over the rows of ``compare.csv``."""
    keys = {"dice": "Dice", "hd95": "HD95 (mm)", "nsd": "NSD", "small_dice": "Dice small", "large_dice": "Dice large"}
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in cases:
        groups.setdefault((row.get("class", ""), row.get("method", "")), []).append(row)
    rows = [
        [label, method, str(len(found)), *(number(_mean([row.get(key) for row in found])) for key in keys)]
        for (label, method), found in sorted(groups.items())
    ]
    if rows:
        note = "Means over cases, sites and seeds, of the cases for which there is a value."
        yield Table("By class and method", ("Class", "Method", "Cases, each seed", *keys.values()), rows, note, 2)


def _mean(texts: list[str | None]) -> float | None:
    values = [value for text in texts if text and math.isfinite(value := float(text))]
    return sum(values) / len(values) if values else None
