"""Small made-up runs, as simulate, compare and a coordinator leave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

SITES = ("site_a", "site_b")
DICE = {"site_a": (0.91, 0.81, 0.71), "site_b": (0.62, 0.52, 0.42)}
"""Of each site's validation cases."""


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def study(method: dict[str, Any] | None = None, sites: tuple[str, ...] = SITES) -> dict[str, Any]:
    return {
        "name": "made", "sites": list(sites), "method": method or {"name": "fedavg"}, "rounds": 3, "local_epochs": 1,
        "weighting": "cases", "initial_lr": 0.0123, "configuration": "3d_fullres",
    }  # fmt: skip


def record(method: dict[str, Any] | None = None, sites: tuple[str, ...] = SITES) -> dict[str, Any]:
    """What ``nnunet_fed status --json`` prints; the last site misses the second round."""
    collectives = []
    for place in range(3):
        there = sites[:-1] if place == 1 else sites
        given = {
            site: {
                "weight": 11.0 + number,
                "bytes": 2_000_000,
                "digest": "d",
                "at": 100.0,
                "seconds": 1.0,
                "norm": 0.25,
            }
            for number, site in enumerate(there)
        }
        opened = 1000.0 + 100 * place
        collectives.append(
            {
                "key": f"round-{place:04d}/model", "verb": "mean", "status": "closed", "opened": opened,
                "closed": opened + 7, "seconds": 7.0, "digest": "d", "bytes": 2_000_000, "error": None, "sites": given,
            }
        )  # fmt: skip
    progress = {"phase": "done", "round": 3, "rounds": 3, "epoch": 3, "loss": -0.777, "dice": 0.888}
    return {
        "study": study(method, sites), "digest": "0" * 64, "attempt": 1, "now": 2000.0, "open": [],
        "sites": {site: {"last_seen": 1.0, "standing": "left", "progress": progress} for site in sites},
        "runs": {
            "r": {
                "purpose": "training", "configuration": "3d_fullres", "trainer": "T", "attempt": 1,
                "collectives": collectives,
            }
        },
        "events": [
            {"at": 1000.0, "run": None, "site": None, "text": "attempt 1 opened"},
            {"at": 1001.0, "run": "r", "site": sites[0], "text": "failed, see /home/someone/secret/train.log now"},
        ],
    }  # fmt: skip


def make_run(folder: Path, method: dict[str, Any] | None = None, sites: tuple[str, ...] = SITES, **more: Any) -> Path:
    """A simulation of two sites, with everything but images.

    Args:
        folder: to write into.
        method: of the study.
        sites: their names.
        more: further keys of ``summary.json``.
    """
    summaries = {}
    for number, site in enumerate(sites):
        values = list(DICE.values())[number % len(DICE)]
        _write_site(folder / "sites" / site, site, number, values)
        mean = sum(values) / len(values)
        summaries[site] = {
            "fold": 0, "train_cases": 11 + number, "val_cases": 3, "dice": {"final": mean, "global": mean},
            "selector": None, "dice_per_class": {"lesion": mean}, "small_lesions": {"lesion": 12.5},
            "lesions": {"lesion": {"small": 2, "large": 3, "all": 5, "false_positives": 1}},
            "dice_small": {"lesion": 0.333}, "dice_large": {"lesion": 0.555}, "dice_lesions": {"lesion": 0.5},
            "lesion_recall_small": {"lesion": 0.5}, "lesion_recall_large": {"lesion": 1.0},
            "lesion_recall": {"lesion": 0.8}, "bytes_sent": 6_100_000, "bytes_received": 6_200_000,
        }  # fmt: skip
    name = (method or {"name": "fedavg"})["name"]
    means = [site["dice"]["final"] for site in summaries.values()]
    summary = {
        "method": name, "rounds": 3, "seed": 0, "seconds": 123.4, "sites": summaries, "selector": None,
        "mean_dice": {"final": sum(means) / len(means)}, "small_lesions": {"lesion": 12.5}, "lesions": None,
    }  # fmt: skip
    write(folder / "summary.json", {**summary, **more})
    write(folder / "record.json", record(method, sites))
    return folder


def fold_of(folder: Path, site: str) -> Path:
    return folder / "sites" / site / "nnUNet_results" / "Dataset001_X" / "T__P__3d_fullres" / "fold_0"


def _write_site(place: Path, site: str, number: int, dice: tuple[float, ...]) -> None:
    fold = fold_of(place.parent.parent, site)
    cases = [
        {
            "metrics": {"1": {"Dice": value}}, "prediction_file": f"/secret/place/case_{index}.nii.gz",
            "reference_file": f"/secret/place/gt/case_{index}.nii.gz",
        }
        for index, value in enumerate(dice)
    ]  # fmt: skip
    write(
        fold / "validation" / "summary.json", {"metric_per_case": cases, "mean": {"1": {"Dice": float(np.mean(dice))}}}
    )
    lesions = [
        {"volume": 10.0 * (index + 1) + number, "small": False, "detected": True, "dice": 0.5} for index in range(3)
    ]
    by_case = {"case_0": {"lesion": {"lesions": lesions, "false_positives": 0}}}
    write(fold / "validation" / "lesions.json", {"small_lesions": {"lesion": 12.5}, "cases": by_case})
    rounds = [
        {
            "scope": f"round-{place:04d}", "weights": {site: 11.0}, "bytes_sent": 2_000_000,
            "bytes_received": 2_000_000, "seconds": 0.5, "at": 1.0, "diagnostics": {},
        }
        for place in range(3)
    ]  # fmt: skip
    versions = {"nnunetv2": "2.8.1"}
    write(fold / "federation.json", {"rounds": rounds, "events": [], "versions": versions, "training_cases": 11})
    lines = []
    for epoch in range(3):
        said = (
            f"Epoch {epoch}", f"train_loss {-0.1 * epoch - 0.01 * number:.4f}", f"val_loss {-0.2 * epoch:.4f}",
            f"Pseudo dice [np.float32({0.3 + 0.2 * epoch:.4f}), np.float32(nan)]", "Epoch time: 2.5 s",
        )  # fmt: skip
        lines += [f"2026-01-01 10:00:0{epoch}.000000: {text} " for text in said]
    write(fold / "training_log_2026_1_1_10_00_00.txt", "\n".join(lines))
    prepared = place / "nnUNet_preprocessed" / "Dataset001_X"
    intensities = dict.fromkeys(("mean", "std", "percentile_00_5", "median", "percentile_99_5"), 100.0 + number)
    local = {
        "spacings": [[2.5, 1.25 + 0.1 * number, 1.25]] * 14, "shapes_after_crop": [[30, 40, 41]] * 14,
        "foreground_intensity_properties_per_channel": {"0": intensities},
    }  # fmt: skip
    write(prepared / "dataset_fingerprint.json", local)
    common = {"foreground_intensity_properties_per_channel": {"0": {**intensities, "mean": 101.75}}}
    write(prepared / "dataset_fingerprint_federation.json", common)
    write(prepared / "dataset.json", {"labels": {"background": 0, "lesion": 1}})
    configuration = {
        "spacing": [2.5, 1.3, 1.25], "median_image_size_in_voxels": [30, 40, 41], "patch_size": [24, 32, 32],
        "batch_size": 2, "architecture": {"arch_kwargs": {"n_stages": 5}},
        "normalization_schemes": ["ZScoreNormalization"],
    }  # fmt: skip
    plans = {"configurations": {"3d_fullres": configuration}, "federation": {"small_lesions": {"lesion": 12.5}}}
    write(prepared / "nnUNetFedPlans.json", plans)


def amend(path: Path, **more: Any) -> None:
    write(path, {**json.loads(path.read_text(encoding="utf-8")), **more})


def make_comparison(folder: Path) -> Path:
    """Two methods with two seeds each, the runs of the first seed in place."""
    methods = {}
    for method, shift in (("local", 0.0), ("fedavg", 0.1)):
        make_run(folder / "runs" / f"{method}-3", {"name": method})
        sites = {
            site: {"mean": 0.5 + shift + 0.01 * number, "low": 0.4 + shift, "high": 0.6 + shift, "sd_seeds": 0.017}
            for number, site in enumerate(SITES)
        }
        methods[method] = {
            "seeds": [3, 4], "dice": sites,
            "overall": {"mean": 0.505 + shift, "low": 0.4, "high": 0.6, "sd_seeds": 0.01},
            "worst_site": {"site": "site_a", "mean": 0.5 + shift}, "spread": 0.0123, "gap_closed": shift * 8,
            "gap_closed_by_site": {}, "bytes": 12_300_000 if shift else None, "seconds": 600.0,
        }  # fmt: skip
    difference = {"a": "local", "b": "fedavg", "mean": -0.1021, "low": -0.1511, "high": -0.0531}
    settings = {
        "rounds": 3, "sites": {"site_a": "/home/someone/secret/site_a"}, "labels": [],
        "options": {"local": {}, "fedavg": {"finetune_epochs": 1}},
    }  # fmt: skip
    content = {"settings": settings, "versions": {"torch": "9.8.7"}, "methods": methods, "differences": [difference]}
    write(folder / "compare.json", content)
    rows = ["method,seed,site,case,class,dice,hd95,nsd,small_dice,large_dice"]
    rows += [
        "fedavg,3,site_a,case_0,lesion,0.611,4.25,0.722,,0.633",
        "fedavg,4,site_a,case_0,lesion,0.611,,0.722,,0.633",
    ]
    write(folder / "compare.csv", "\n".join(rows) + "\n")
    return folder


def write_images(folder: Path, site: str = SITES[0]) -> None:
    """Image, reference and prediction of each validation case of a site."""
    import SimpleITK

    place, random = folder / "sites" / site, np.random.default_rng(0)
    for index in range(3):
        reference = np.zeros((6, 40, 44), np.uint8)
        reference[3, 10:20, 10:24] = 1
        voxels = {
            place / "nnUNet_raw" / "Dataset001_X" / "imagesTr" / f"case_{index}_0000.nii.gz": (
                reference * 100 + random.normal(0, 9, reference.shape)
            ).astype(np.float32),
            place / "nnUNet_preprocessed" / "Dataset001_X" / "gt_segmentations" / f"case_{index}.nii.gz": reference,
            fold_of(folder, site) / "validation" / f"case_{index}.nii.gz": np.roll(reference, index, axis=2),
        }
        for path, array in voxels.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(path))
