"""Folders of sites, as users and planning leave them, with empty images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from serving import make_study

from nnunet_fed.study.toml import to_toml

LABELS = {"background": 0, "whole": [1, 2], "core": 2, "edge": 3}


def raw(folder: Path, cases: int = 5, channels: int = 2) -> Path:
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for case in range(cases):
        for channel in range(channels):
            (folder / "imagesTr" / f"case_{case}_{channel:04d}.nii.gz").touch()
        (folder / "labelsTr" / f"case_{case}.nii.gz").touch()
    (folder / "dataset.json").write_text(json.dumps({"file_ending": ".nii.gz", "labels": LABELS}))
    return folder


def planned(
    folder: Path, site: str, cases: list[str], folds: list[dict[str, list[str]]] | None = None, **plans: Any
) -> None:
    """What planning leaves at a site: preprocessed cases, references, plans, and the raw data."""
    place = folder / "sites" / site
    data, raw = (place / part / f"Dataset001_{site}" for part in ("nnUNet_preprocessed", "nnUNet_raw"))
    for part in (data / f"cases_{site}", data / "gt_segmentations", raw / "imagesTr", raw / "labelsTr"):
        part.mkdir(parents=True)
    for case in cases:
        for ending in (".b2nd", "_seg.b2nd", ".pkl"):
            (data / f"cases_{site}" / (case + ending)).write_text(site)
        for file in (data / "gt_segmentations", raw / "labelsTr"):
            (file / f"{case}.nii.gz").write_text(site)
        (raw / "imagesTr" / f"{case}_0000.nii.gz").write_text(site)
    content = {"labels": {"background": 0, "organ": 1}, "numTraining": len(cases), "file_ending": ".nii.gz"}
    (data / "dataset.json").write_text(json.dumps(content))
    (data / "dataset_fingerprint.json").write_text("{}")
    configurations = {"3d_fullres": {"data_identifier": f"cases_{site}"}}
    made = {"dataset_name": data.name, "image_reader_writer": "SimpleITKIO", "configurations": configurations, **plans}
    (data / "SmallPlans.json").write_text(json.dumps(made))
    if folds is not None:
        (data / "splits_final.json").write_text(json.dumps(folds))


def federation(folder: Path, *sites: str) -> Path:
    (folder / "federation.toml").write_text(to_toml(make_study(sites).model_dump(mode="json")))
    return folder
