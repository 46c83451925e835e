"""Small data sets of sites that plan together, and planning them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.paths import nnUNet_preprocessed

from nnunet_fed.agreement.fingerprint import LocalFingerprint
from nnunet_fed.datasets.folds import FoldChoice
from nnunet_fed.exchange.communicator import LocalFederation
from nnunet_fed.planners.planning import PlanningResult, plan_and_preprocess
from nnunet_fed.study.federation import Federation

POOL, SITE_A, SITE_B, SITE_C, OTHER = 1, 11, 12, 13, 21
LABELS = {"background": 0, "organ": 1, "lesion": 2}


def write_dataset(
    raw: Path,
    number: int,
    cases: Sequence[int],
    channels: Sequence[str] = ("CT", "MRI"),
    labels: dict[str, Any] = LABELS,
    two_d: bool = False,
    shape: tuple[int, int, int] | None = None,
) -> Path:
    """Small random cases; a case's content depends on its number only. Case 3 has no foreground."""
    folder = raw / f"Dataset{number:03d}_Test"
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for case in cases:
        rng = np.random.default_rng(case)
        size = tuple(rng.integers(18, 30, 3)) if shape is None else shape
        size = size[1:] if two_d else size
        spacing = [float(step) for step in rng.choice([0.9, 1.0, 1.3], len(size))]
        segmentation = np.zeros(size, np.uint8)
        segmentation[tuple(slice(4, 12) for _ in size)] = 0 if case == 3 else 1 + case % 2
        arrays = {f"labelsTr/case_{case:03d}": segmentation}
        for channel in range(len(channels)):
            image = rng.normal(100 * channel, 20, size).astype(np.float32)
            image[:2] = 0  # something to crop
            arrays[f"imagesTr/case_{case:03d}_{channel:04d}"] = image
        for name, array in arrays.items():
            itk = sitk.GetImageFromArray(array)
            itk.SetSpacing(spacing)
            sitk.WriteImage(itk, str(folder / f"{name}.nii.gz"))
    content = {
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        "labels": labels,
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def study(sites: Sequence[str] = ("a", "b"), **changes: Any) -> Federation:
    settings = {"name": "test", "sites": list(sites), "method": {"name": "fedavg"}, "rounds": 2}
    return Federation.model_validate(settings | changes)


def plan(datasets: dict[str, int], **options: Any) -> dict[str, PlanningResult]:
    """Plan at each site, with one worker; the others wait so many seconds for one that fails."""
    configurations = options.pop("configurations", None)
    report = options.pop("report", lambda phase: None)
    folds = options.pop("folds", FoldChoice.keep)
    deadline = options.pop("deadline", 60)
    agreed = study(list(datasets), **options)
    return LocalFederation(list(datasets), deadline=deadline).run(
        lambda seat: plan_and_preprocess(seat, agreed, datasets[seat.site], configurations, 1, report, folds=folds)
    )


def read(*parts: str | int) -> Any:
    """JSON file in the preprocessed folder of a data set."""
    number, name = parts
    return json.loads((preprocessed(int(number)) / str(name)).read_text())


def preprocessed(number: int) -> Path:
    return Path(nnUNet_preprocessed) / f"Dataset{number:03d}_Test"


def few_samples(patch: pytest.MonkeyPatch) -> None:
    """A thousandth of nnU-Net's hundred million voxels a channel."""
    original = DatasetFingerprintExtractor.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.num_foreground_voxels_for_intensitystats = 10e4

    patch.setattr(DatasetFingerprintExtractor, "__init__", init)


def set_paths(patch: pytest.MonkeyPatch, folder: Path) -> Path:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        patch.setenv(name, str(folder / name))
        (folder / name).mkdir()
    return folder / "nnUNet_raw"


def pooled_fingerprint(sites: list[LocalFingerprint]) -> LocalFingerprint:
    return LocalFingerprint(
        spacings=[case for site in sites for case in site.spacings],
        shapes_after_crop=[case for site in sites for case in site.shapes_after_crop],
        relative_sizes=[case for site in sites for case in site.relative_sizes],
        intensities=[np.concatenate(channel) for channel in zip(*(site.intensities for site in sites), strict=True)],
    )
