"""What a site would have planned alone, what the federation plans, and which data made the difference. Source: ours."""

from __future__ import annotations

import copy
import io
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from rich.table import Table

from nnunet_fed.agreement.fingerprint import INTENSITIES, LocalFingerprint, fingerprint_of

logger = logging.getLogger(__name__)
_STDOUT = threading.Lock()
_VOXELS, _SHAPES = "voxel sizes of all cases", "shapes and voxel sizes of all cases"
_INTENSITIES = ("mean", "std", "percentile_00_5", "percentile_99_5")
"""What CT normalization reads; other schemes look at one case at a time."""


@dataclass(frozen=True)
class Row:
    """One property of the data or the plans."""

    name: str
    alone: str
    federated: str
    cause: str
    """Data that made the difference; empty where there is none."""


def explain(
    planner: Any, local: LocalFingerprint, plans: Mapping[str, Any], overwrite_target_spacing: Sequence[float] | None
) -> tuple[Row, ...]:
    """Plan once more from this site's cases only, and compare. Nothing is written.

    An explanation is no reason to fail: what goes wrong is logged.

    Args:
        planner: the planner that made the plans.
        local: fingerprint of this site's cases.
        plans: the federation's.
        overwrite_target_spacing: of the study.

    Returns:
        Rows of a table; none if something went wrong.
    """
    try:
        alone = _plan_alone(planner, local, overwrite_target_spacing)
        cases = str(len(local.spacings)), str(planner.dataset_json["numTraining"])
        return (_row("training cases", *cases, ""), *_rows(alone, plans))
    except Exception as error:  # whatever nnU-Net's planner says of a single site's data
        logger.warning("What this site would have planned alone is not known: %s: %s", type(error).__name__, error)
        return ()


def explanation_table(rows: Sequence[Row]) -> Table:
    """The rows for a reader; what differs is bold."""
    table = Table(title="What this site would have planned alone, and what the federation plans")
    for name in ("", "this site alone", "federation", "because of"):
        table.add_column(name)
    for row in rows:
        differs = row.alone != row.federated
        table.add_row(row.name, row.alone, row.federated, row.cause, style="bold" if differs else None)
    return table


def _plan_alone(planner: Any, local: LocalFingerprint, overwrite_target_spacing: Sequence[float] | None) -> Any:
    alone = copy.copy(planner)
    alone.dataset_fingerprint = fingerprint_of(local)
    alone.dataset_json = {**planner.dataset_json, "numTraining": len(local.spacings)}
    alone.overwrite_target_spacing = overwrite_target_spacing
    alone.original_medians = None
    alone.save_plans = recursive_fix_for_json_export  # and no file
    with _STDOUT, redirect_stdout(io.StringIO()):  # nnU-Net prints its plans, which are not those that count
        return alone.plan_experiment()


def _rows(alone: Mapping[str, Any], plans: Mapping[str, Any]) -> Iterator[Row]:
    for name, key in (("voxel size", "spacing"), ("shape", "shape")):
        entry = f"original_median_{key}_after_transp"
        yield _row(f"median {name}", _text(alone[entry]), _text(plans[entry]), _SHAPES if key == "shape" else _VOXELS)
    mine, common = (_described(content) for content in (alone, plans))
    for name, cause in dict.fromkeys([*common, *mine]):
        yield _row(name, mine.get((name, cause), "-"), common.get((name, cause), "-"), cause)


def _row(name: str, alone: str, federated: str, cause: str) -> Row:
    return Row(name, alone, federated, cause if alone != federated else "")


def _described(plans: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """What plans say, by the name of the row and its cause."""
    described: dict[tuple[str, str], str] = {}
    for name, configuration in plans["configurations"].items():
        if "inherits_from" in configuration:
            continue
        stages = configuration["architecture"]["arch_kwargs"]["n_stages"]
        described |= {
            (f"{name}: voxel size", _VOXELS): _text(configuration["spacing"]),
            (f"{name}: median shape", _SHAPES): _text(configuration["median_image_size_in_voxels"]),
            (f"{name}: patch size", _SHAPES): _text(configuration["patch_size"]),
            (f"{name}: batch size", "patch size; number of cases"): str(configuration["batch_size"]),
            (f"{name}: stages", "patch size"): str(stages),
        }
    described |= _normalization(plans)
    return described


def _normalization(plans: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    configuration = plans["configurations"]["2d"]  # there always is; the schemes are the same in all
    described = {}
    for channel, scheme in enumerate(configuration["normalization_schemes"]):
        masked = ", inside the mask" if configuration["use_mask_for_norm"][channel] else ""
        described[f"channel {channel}: normalization", "share of the image kept by cropping"] = scheme + masked
        if scheme == "CTNormalization":
            properties = plans[INTENSITIES][str(channel)]
            for key in _INTENSITIES:
                described[f"channel {channel}: {key}", "foreground intensities of all cases"] = _text(properties[key])
    return described


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return " x ".join(map(_text, value)) if isinstance(value, Sequence) else str(value)
