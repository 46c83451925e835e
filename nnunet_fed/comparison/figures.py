"""What a comparison says: means with intervals, differences, fairness, and the gap that a method closes. Source: ours.

The unit is the **case**: of its classes, and of the seeds of a method, the mean is taken first, where there is a value.
A **site** is the mean of its cases, and **overall** that of the sites, each of which counts the same.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations
from typing import Any

from nnunet_fed.comparison.pooled_data import SITE as POOLED
from nnunet_fed.evaluation.case_scores import METRICS, CaseScore
from nnunet_fed.evaluation.intervals import LEVEL, RESAMPLES, Interval, deviation, interval, paired

LOCAL = "local"
ALL = ""
"""Stands for all sites, where a site's name could stand."""
INTERVAL = "percentile bootstrap over cases, within sites"
DICE, *OTHERS = METRICS
LIBRARIES = ("nnunet-fed", "nnunetv2", "torch", "numpy", "scipy", "monai")

Cases = dict[str, dict[str, float]]
"""By site, then by case: the mean over seeds and classes."""


def figures(
    settings: Mapping[str, Any],
    rows: Iterable[CaseScore],
    summaries: Mapping[str, Sequence[Mapping[str, Any]]],
    tolerance: float,
    left_out: Mapping[str, str],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """The content of ``compare.json``.

    Args:
        settings: of the comparison.
        rows: of all arms.
        summaries: by method: ``summary.json`` of each seed.
        tolerance: of NSD in mm.
        left_out: sites without validation cases, and why.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    bootstrap = {"resamples": resamples, "seed": seed}
    by_method: dict[str, list[CaseScore]] = {method: [] for method in summaries}
    for row in rows:
        by_method[row.method].append(row)
    sites = sorted({row.site for of_method in by_method.values() for row in of_method})
    cases = {
        method: {metric: _cases(of_method, metric, sites) for metric in METRICS}
        for method, of_method in by_method.items()
    }
    gap: dict[str, Interval] = {}
    local: dict[str, float] = {}
    if LOCAL in cases and POOLED in cases:
        gap = _differences(cases[POOLED][DICE], cases[LOCAL][DICE], **bootstrap)
        local = _means(cases[LOCAL][DICE])
    methods = {}
    for method, of_method in by_method.items():
        blocks = {metric: _block(of_method, metric, cases[method][metric], **bootstrap) for metric in METRICS}
        means = _means(cases[method][DICE])
        closed = {place: _closed(means.get(place), local.get(place), gap[place]) for place in gap}
        methods[method] = {
            "seeds": [summary["seed"] for summary in summaries[method]],
            DICE: blocks[DICE]["sites"],
            "overall": blocks[DICE]["overall"],
            **_fairness(means),
            "gap_closed": closed.pop(ALL, None),
            "gap_closed_by_site": closed,
            **_cost(method, summaries[method]),
            **{metric: blocks[metric] for metric in OTHERS},
        }
    how = {"interval": INTERVAL, "level": LEVEL, **bootstrap, "nsd_tolerance_mm": tolerance}
    return {
        "settings": {**settings, "statistics": how, "left_out": dict(left_out)},
        "versions": versions(),
        "methods": methods,
        "differences": [
            {"a": a, "b": b, **_contrast(cases[a], cases[b], **bootstrap)} for a, b in combinations(cases, 2)
        ],
    }


def versions() -> dict[str, str]:
    """Of Python and of what the figures rest on."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def _cases(rows: Iterable[CaseScore], metric: str, sites: Iterable[str]) -> Cases:
    values: dict[str, dict[str, dict[int, list[float]]]] = {site: {} for site in sites}
    for row in rows:
        value = getattr(row, metric)
        if value is not None:
            values[row.site].setdefault(row.case, {}).setdefault(row.seed, []).append(value)
    return {
        site: {case: statistics.fmean(map(statistics.fmean, seeds.values())) for case, seeds in of_site.items()}
        for site, of_site in values.items()
    }


def _means(cases: Cases) -> dict[str, float]:
    """Of each site that has a value, and of all of these."""
    means = {site: statistics.fmean(of_site.values()) for site, of_site in cases.items() if of_site}
    return {**means, ALL: statistics.fmean(means.values())} if means else {}


def _block(rows: Sequence[CaseScore], metric: str, cases: Cases, **bootstrap: int) -> dict[str, Any]:
    """Means with intervals over cases and deviations over seeds, of each site and overall."""
    seeds = sorted({row.seed for row in rows})
    of_seed = [_means(_cases([row for row in rows if row.seed == seed], metric, cases)) for seed in seeds]

    def entry(place: str, values: list[list[float]]) -> dict[str, Any]:
        over_seeds = deviation([means[place] for means in of_seed if place in means])
        number = sum(map(len, values))
        return {**asdict(interval(values, **bootstrap)), "sd_seeds": over_seeds, "cases": number}

    return {
        "sites": {site: entry(site, [list(of_site.values())]) for site, of_site in cases.items()},
        "overall": entry(ALL, [list(of_site.values()) for of_site in cases.values()]),
    }


def _differences(first: Cases, second: Cases, **bootstrap: int) -> dict[str, Interval]:
    """At each site, and of all."""
    at_sites = {site: paired([first[site]], [second[site]], **bootstrap) for site in first}
    return {**at_sites, ALL: paired(list(first.values()), list(second.values()), **bootstrap)}


def _contrast(first: Mapping[str, Cases], second: Mapping[str, Cases], **bootstrap: int) -> dict[str, Any]:
    """Differences in Dice overall and at each site, and in the other metrics overall."""
    found = {metric: _differences(first[metric], second[metric], **bootstrap) for metric in METRICS}
    dice = {place: asdict(difference) for place, difference in found[DICE].items()}
    others = {metric: asdict(found[metric][ALL]) for metric in OTHERS}
    return {**dice.pop(ALL), "sites": dice, **others}


def _fairness(means: Mapping[str, float]) -> dict[str, Any]:
    """The worst site, and by how much the best one is better."""
    of_sites = {site: mean for site, mean in means.items() if site != ALL}
    if not of_sites:
        return {"worst_site": None, "spread": None}
    worst = min(of_sites, key=of_sites.__getitem__)
    return {
        "worst_site": {"site": worst, "mean": of_sites[worst]},
        "spread": max(of_sites.values()) - of_sites[worst],
    }


def _closed(mean: float | None, local: float | None, gap: Interval) -> float | None:
    """Share of the gap; ``None`` unless the data show that there is one."""
    if mean is None or local is None or gap.mean is None or gap.low is None or gap.low <= 0:
        return None
    return (mean - local) / gap.mean


def _cost(method: str, summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the seeds. What a control exchanges for a common start is no traffic of a method."""
    sent = [
        sum(site[way] or 0 for site in summary["sites"].values() for way in ("bytes_sent", "bytes_received"))
        for summary in summaries
    ]
    return {
        "bytes": None if method in (LOCAL, POOLED) else statistics.fmean(sent),
        "seconds": statistics.fmean(summary["seconds"] for summary in summaries),
    }
