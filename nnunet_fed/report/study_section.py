"""What was studied: settings, sites, data and the fingerprint on which the sites agreed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from nnunet_fed.agreement.fingerprint import INTENSITIES
from nnunet_fed.evaluation.lesions import SMALL_LESIONS
from nnunet_fed.exchange.keys import round_of
from nnunet_fed.report.blocks import (
    NOTHING,
    Figure,
    Paragraph,
    Section,
    Table,
    count,
    duration,
    number,
    significant,
    sizes,
    without_paths,
)
from nnunet_fed.report.charts import strips
from nnunet_fed.report.gather import Comparison, Run, SiteFiles

_LEFT_OUT = ("name", "sites", "method", "plans_name")
_AXES = ("z", "y", "x")


def study_section(run: Run) -> Section:
    """Name, method, settings, versions."""
    study = run.study
    section = Section("study", "The study")
    sites = run.site_names
    sentence = f"{study.get('name', run.name)}: {run.method} with {len(sites)} sites ({', '.join(sites)})"
    rounds = run.summary.get("rounds", study.get("rounds"))
    sentence += f", {rounds} rounds" if rounds is not None else ""
    seconds = run.summary.get("seconds")
    sentence += f"; it took {duration(seconds)}." if seconds is not None else "."
    section.blocks.append(Paragraph(sentence))
    start = study.get("pretrained") or next(
        (digest for files in run.sites.values() if (digest := files.record.get("pretrained"))), None
    )
    if start is not None:
        section.blocks.append(Paragraph(f"The training started from pretrained weights with the digest {start}."))
    section.blocks.extend(_settings(study))
    versions = {version for files in run.sites.values() for version in files.record.get("versions", {}).items()}
    if versions:
        rows = [
            [name, ", ".join(sorted(v for n, v in versions if n == name))] for name in sorted({n for n, _ in versions})
        ]
        section.blocks.append(Table("Versions that the sites worked with", ("Package", "Version"), rows, texts=2))
    return section


def _settings(study: dict[str, Any]) -> Iterator[Table]:
    rows = [[name, _value(value)] for name, value in study.get("method", {}).items() if name != "name"]
    if rows:
        yield Table("Options of the method", ("Option", "Value"), rows, texts=2)
    rows = [[name, _value(value)] for name, value in study.items() if name not in _LEFT_OUT]
    if rows:
        yield Table("Settings of the study", ("Setting", "Value"), rows, texts=2)


def comparison_study_section(comparison: Comparison) -> Section:
    """Which methods were compared, and how."""
    content = comparison.content
    methods = {name: figures.get("seeds") or [] for name, figures in content["methods"].items()}
    section = Section("study", "The study")
    section.blocks.append(
        Paragraph(
            f"{comparison.name}: {len(methods)} methods on the same sites, splits, plans and initial weights, and with "
            f"the same budget of steps: {', '.join(methods)}."
        )
    )
    rows = [[name, ", ".join(map(str, seeds)) or NOTHING] for name, seeds in methods.items()]
    section.blocks.append(Table("Methods and seeds", ("Method", "Seeds"), rows, texts=2))
    for key, caption in (("settings", "Settings"), ("versions", "Versions")):
        rows = [[str(name), text] for name, value in content.get(key, {}).items() if (text := _value(value))]
        if rows:
            section.blocks.append(Table(caption, ("Name", "Value"), rows, texts=2))
    return section


def _value(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {text}" for name, entry in value.items() if (text := _value(entry)))
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    return significant(value) if isinstance(value, float) else without_paths(str(value))


def data_section(run: Run) -> Section:
    """Sites, their cases, voxel and lesion sizes, and the harmonised fingerprint and plans."""
    section = Section("data", "Sites and their data")
    if rows := [_site_row(run, name) for name in run.site_names]:
        head = ("Site", "Training cases", "Validation cases", "Median voxel size (mm)", "Median shape (voxels)")
        note = (
            "" if any(run.sites.values()) else "A coordinator sees no images: shapes and voxel sizes stay at the sites."
        )
        if not all(row[1:] == [NOTHING] * 4 for row in rows):
            section.blocks.append(Table("Sites", head, rows, note))
    section.blocks.extend(_spacings(run.sites))
    section.blocks.extend(_lesions(run))
    section.blocks.extend(_fingerprint(run.sites))
    section.blocks.extend(_plans(run.sites))
    return section


def _site_row(run: Run, name: str) -> list[str]:
    summary, files = run.summary.get("sites", {}).get(name, {}), run.sites.get(name, SiteFiles())
    local = files.local_fingerprint
    cases = summary.get("train_cases") or files.record.get("training_cases")
    if cases is None and run.study.get("weighting") == "cases":
        cases = _weight(run, name)  # which is the number of training cases
    return [
        name,
        count(cases),
        count(summary.get("val_cases")),
        sizes(np.median(local["spacings"], axis=0).tolist()) if local.get("spacings") else NOTHING,
        sizes(np.median(local["shapes_after_crop"], axis=0).tolist()) if local.get("shapes_after_crop") else NOTHING,
    ]


def _weight(run: Run, site: str) -> int | None:
    of_rounds = (c["sites"] for c in run.training if round_of(c["key"]) is not None)
    given = [sites[site]["weight"] for sites in of_rounds if site in sites]
    return int(given[-1]) if given and given[-1] > 0 else None


def _spacings(sites: dict[str, SiteFiles]) -> Iterator[Figure | Table]:
    spacings = {
        name: np.asarray(files.local_fingerprint["spacings"], np.float64)
        for name, files in sites.items()
        if files.local_fingerprint.get("spacings")
    }
    if not spacings:
        return
    axes = _AXES[-next(iter(spacings.values())).shape[1] :]
    for place, axis in enumerate(axes):
        values = {name: of_site[:, place].tolist() for name, of_site in spacings.items()}
        yield strips(
            f"voxel size along {axis} (mm)", values, f"Voxel sizes of all cases along {axis}; the bar is the median."
        )
    rows = [
        [
            name,
            str(len(values)),
            *(f"{low:.4g} to {high:.4g}" for low, high in zip(values.min(0), values.max(0), strict=True)),
        ]
        for name, values in spacings.items()
    ]
    yield Table("Voxel sizes", ("Site", "Cases", *(f"Along {axis} (mm)" for axis in axes)), rows)


def _lesions(run: Run) -> Iterator[Figure | Table]:
    """Volumes of the lesions in the validation cases, as nnU-Net's validation left them."""
    volumes: dict[str, dict[str, list[float]]] = {}
    for name, files in run.sites.items():
        for case in files.lesions.get("cases", {}).values():
            for label, result in case.items():
                volumes.setdefault(label, {}).setdefault(name, []).extend(
                    lesion["volume"] for lesion in result["lesions"] if lesion["volume"] > 0
                )
    thresholds: dict[str, float | None] = next(
        (found for files in run.sites.values() if (found := files.lesions.get(SMALL_LESIONS))), {}
    )
    rows = []
    for label, by_site in volumes.items():
        there = {name: values for name, values in by_site.items() if values}
        if not there:
            continue
        caption = f"Volumes of the connected components of '{label}' in the validation cases; the bar is the median."
        if thresholds.get(label) is not None:
            caption += f" Small are those up to {significant(thresholds[label])} mm³."
        yield strips(f"volume of '{label}' (mm³; in 2D mm²)", there, caption, logarithmic=True)
        rows += [
            [
                label,
                name,
                str(len(values)),
                *(significant(float(np.quantile(values, q))) for q in (0, 0.25, 0.5, 0.75, 1)),
            ]
            for name, values in there.items()
        ]
    if rows:
        head = ("Class", "Site", "Lesions", "Smallest", "Lower quartile", "Median", "Upper quartile", "Largest")
        yield Table("Lesion volumes in the validation cases (mm³; in 2D mm²)", head, rows, texts=2)


def _fingerprint(sites: dict[str, SiteFiles]) -> Iterator[Table]:
    """Intensities at each site and of all together."""
    blocks = {name: files.local_fingerprint for name, files in sites.items() if files.local_fingerprint}
    common = next((files.fingerprint for files in sites.values() if files.fingerprint), None)
    if common is None:
        return
    blocks["all sites"] = common
    keys = {
        "mean": "Mean",
        "std": "Std. deviation",
        "percentile_00_5": "0.5 %",
        "median": "Median",
        "percentile_99_5": "99.5 %",
    }
    rows = [
        [name, channel, *(significant(properties.get(key)) for key in keys)]
        for channel in common.get(INTENSITIES, {})
        for name, block in blocks.items()
        if (properties := block.get(INTENSITIES, {}).get(channel))
    ]
    if rows:
        note = "Agreed on by sums alone; the last row is what all sites plan with."
        yield Table(
            "Harmonised fingerprint: foreground intensities", ("Site", "Channel", *keys.values()), rows, note, 2
        )


def _plans(sites: dict[str, SiteFiles]) -> Iterator[Table]:
    plans = next((files.plans for files in sites.values() if files.plans), None)
    if plans is None:
        return
    rows = [
        [
            name, sizes(c["spacing"]), sizes(c["median_image_size_in_voxels"]), sizes(c["patch_size"]),
            str(c["batch_size"]), str(c["architecture"]["arch_kwargs"]["n_stages"]),
            ", ".join(c["normalization_schemes"]),
        ]
        for name, c in plans.get("configurations", {}).items()
        if "inherits_from" not in c
    ]  # fmt: skip
    head = ("Configuration", "Voxel size (mm)", "Median shape", "Patch", "Batch", "Stages", "Normalization")
    yield Table("Plans, the same at all sites", head, rows)
    small = plans.get("federation", {}).get(SMALL_LESIONS) or {}
    if any(value is not None for value in small.values()):
        rows = [[label, number(value, 1)] for label, value in small.items()]
        note = "A fifth of the training lesions of all sites are at most so large."
        yield Table("Small lesions", ("Class", "Up to (mm³; in 2D mm²)"), rows, note)
