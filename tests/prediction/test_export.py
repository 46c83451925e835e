"""A trained model as one file: without a validation, for nnU-Net's own command and prediction."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from at_coordinator import AtCoordinator
from in_process import CPU
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.model_sharing import model_export, model_import
from typer.testing import CliRunner

from nnunet_fed.cli.app import app
from nnunet_fed.errors import ConfigurationError, FederationError
from nnunet_fed.prediction.export import export_model
from nnunet_fed.prediction.predictor import SuperModelPredictor
from nnunet_fed.trainers.nnUNetTrainerFedAvg import nnUNetTrainerFedAvg
from nnunet_fed.trainers.nnUNetTrainerFedSM import nnUNetTrainerFedSM

METHODS: dict[type[Any], dict[str, Any]] = {
    nnUNetTrainerFedAvg: {"name": "fedavg"},
    nnUNetTrainerFedSM: {"name": "fedsm", "selector_patches": 2, "selector_min_accuracy": 0.0},
}


def trained(trainer: type[Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model folder of a site whose training ended, and which was not validated."""
    sites = AtCoordinator(folder, monkeypatch)
    sites.go(trainer, sites.study(rounds=1, method=METHODS[trainer]))
    model = sites.results("a").parent
    assert not list(model.glob("*/validation"))
    return model


@pytest.mark.parametrize("trainer", METHODS)
def test_a_model_without_validation_is_installed_elsewhere_and_predicts(
    trainer: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(trainer, tmp_path / "study", monkeypatch)
    # should stock nnU-Net ever want none, ours has one reason less to be
    monkeypatch.setattr(model_export, "get_output_folder", lambda *_: str(model))
    monkeypatch.setattr(model_export, "maybe_convert_to_dataset_name", lambda name: name)
    monkeypatch.setattr(model_export, "nnUNet_results", str(model.parents[1]))
    with pytest.raises(FileNotFoundError):
        model_export.export_pretrained_model("D", str(tmp_path / "stock.zip"), ("2d",), folds=(0,))
    done = CliRunner().invoke(app, ["export", "-m", str(model), "-o", str(tmp_path / "model.zip")])
    assert done.exit_code == 0, done.output
    assert "nnUNetv2_install_pretrained_model_from_zip" in done.output
    monkeypatch.setattr(model_import, "nnUNet_results", str(tmp_path / "elsewhere"))
    model_import.install_model_from_zip_file(str(tmp_path / "model.zip"))
    installed = tmp_path / "elsewhere" / model.parent.name / model.name
    files = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    own = {"plans.json", "dataset.json", "fold_0/checkpoint_final.pth"}
    assert files >= own
    options = {"use_mirroring": False, "device": CPU, "perform_everything_on_device": False, "allow_tqdm": False}
    if trainer is nnUNetTrainerFedSM:
        assert "fedsm_bundle.json" in files
        SuperModelPredictor(gamma=None, force=None, **options).initialize_from_trained_model_folder(str(installed))
    else:
        assert files == own
    predictor = nnUNetPredictor(**options)
    predictor.initialize_from_trained_model_folder(str(installed), ("0",), "checkpoint_final.pth")
    logits = predictor.predict_logits_from_preprocessed_data(torch.zeros(1, 1, 20, 20))
    assert logits.shape == (3, 1, 20, 20)
    assert np.isfinite(logits.numpy()).all()


def made(folder: Path) -> Path:
    model = folder / "results" / "Dataset001_X" / "T__P__2d"
    for fold in ("0", "all"):
        (model / f"fold_{fold}").mkdir(parents=True)
        (model / f"fold_{fold}" / "checkpoint_final.pth").write_text(fold)
    (model / "fold_1").mkdir()
    for name in ("plans.json", "dataset.json"):
        (model / name).write_text("{}")
    return model


def test_folds_and_checkpoints_are_chosen(tmp_path: Path) -> None:
    model, out = made(tmp_path), tmp_path / "model.zip"
    own = ["Dataset001_X/T__P__2d/plans.json", "Dataset001_X/T__P__2d/dataset.json"]
    final = "Dataset001_X/T__P__2d/fold_{}/checkpoint_final.pth"
    assert export_model(model, out) == [*own, final.format(0), final.format("all")]
    assert export_model(model, out, ["all"]) == [*own, final.format("all")]
    with zipfile.ZipFile(out) as archive:
        assert archive.namelist() == [*own, final.format("all")]
        assert archive.read(final.format("all")) == b"all"
    before = out.read_bytes()
    for wanted, checkpoints, message in (
        (["1"], ["checkpoint_final.pth"], r"lacks fold_1/checkpoint_final.pth: copy it again, or choose folds with -f"),
        (
            None,
            ["checkpoint_global.pth"],
            r"No fold in .* has a checkpoint_global.pth: .* another checkpoint with -chk",
        ),
        (["0"], ["checkpoint_final.pth", "x.pth"], r"lacks fold_0/x.pth"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            export_model(model, out, wanted, checkpoints)
    assert out.read_bytes() == before, "nothing half-written"
    with pytest.raises(FederationError, match="cannot be written"):
        export_model(model, tmp_path / "nowhere" / "model.zip", ["all"])
