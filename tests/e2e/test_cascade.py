"""nnU-Net's cascade in a federation of real processes: trained stage by stage, predicted by stock nnU-Net."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from harness import PLANS, command, environment, run
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunet_fed.datasets.phantom import write_phantom

pytestmark = pytest.mark.e2e

FIRST, SECOND = "3d_lowres", "3d_cascade_fullres"


def test_both_stages_are_trained_together_and_predict_without_us(tmp_path: Path) -> None:
    phantom, out = tmp_path / "phantom", tmp_path / "out"
    write_phantom(phantom, sites=2, cases=1, test_cases=1, coarse=1.32)
    sites = [word for name in ("site_a", "site_b") for word in ("--site", f"{name}={phantom / name}")]
    words = [sys.executable, "-m", "nnunet_fed", "simulate", *sites, "--out", out, "--config", SECOND, "--fold", "all"]
    words += ["--gpu-memory", "0.003", "--rounds", "1", "--iterations", "3", "--val-iterations", "1"]
    run([*words, "--lr", "0.05", "--momentum", "0.9"], environment(), tmp_path / "log", tmp_path / "printed")

    record = json.loads((out / "record.json").read_text())
    trained = [one["configuration"] for one in record["runs"].values() if one["purpose"] == "training"]
    assert trained == [FIRST, SECOND], "two trainings at one coordinator"
    summary = json.loads((out / "summary.json").read_text())
    assert all(site["dice"]["final"] > 0 for site in summary["sites"].values())

    def model(site: str, stage: str) -> Path:
        (found,) = out.glob(f"sites/{site}/nnUNet_results/*/nnUNetTrainerFedAvg__{PLANS}__{stage}")
        return found

    def weights(site: str, stage: str) -> dict[str, torch.Tensor]:
        checkpoint: dict[str, Any] = torch.load(
            model(site, stage) / "fold_all/checkpoint_final.pth", weights_only=False
        )
        loaded: dict[str, torch.Tensor] = checkpoint["network_weights"]
        return loaded

    for stage, channels in ((FIRST, 1), (SECOND, 3)):
        a, b = (weights(site, stage) for site in ("site_a", "site_b"))
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert next(iter(a.values())).shape[1] == channels, "the image, and organ and lesion of the first stage"
    for site in ("site_a", "site_b"):
        before = model(site, FIRST) / "predicted_next_stage" / SECOND
        (cases,) = out.glob(f"sites/{site}/nnUNet_preprocessed/*/nnUNetFed_3d_fullres_????????")
        dataset = nnUNetDatasetBlosc2(str(cases), folder_with_segs_from_previous_stage=str(before))
        assert len(dataset.identifiers) == 1
        for case in dataset.identifiers:
            data, _, predicted, _ = dataset.load_case(case)
            assert predicted.shape == data.shape[1:]

    folder = out / "sites" / "site_a"
    stock = environment(**{f"nnUNet_{what}": folder / f"nnUNet_{what}" for what in ("raw", "preprocessed", "results")})
    images = phantom / "test" / "imagesTs"

    def predict(stage: str, *rest: Any) -> Path:
        predicted = tmp_path / stage
        words = [command("nnUNetv2_predict"), "-i", images, "-o", predicted, "-d", 1, "-c", stage, "-f", "all"]
        words += ["-tr", "nnUNetTrainerFedAvg", "-p", PLANS, "-device", "cpu", "--disable_tta", *rest]
        run(words, stock, tmp_path / f"{stage}.log")
        return predicted

    coarse = predict(FIRST)
    fine = predict(SECOND, "-prev_stage_predictions", coarse)
    for image in images.iterdir():
        case = image.name.replace("_0000", "")
        one, other = (sitk.GetArrayFromImage(sitk.ReadImage(str(path / case))) for path in (coarse, fine))
        assert one.shape == other.shape == sitk.GetArrayFromImage(sitk.ReadImage(str(image))).shape
        assert not np.array_equal(one, other)
