"""What stock ``nnUNetv2_train`` says when a federated training cannot start: one sentence, no traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import PLANS, Planned
from nnunetv2.run.run_training import run_training
from serving import Served

from nnunet_fed.errors import RefusedError
from nnunet_fed.simulation.simulate import plugin_folder
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.methods import METHODS

pytestmark = pytest.mark.e2e

Serve = Callable[[Federation], Served]


@pytest.fixture
def site(planned: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a site whose plans are those of ``planned.study``; its site.toml names a port where nobody listens."""
    for what in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{what}", str(tmp_path / what))
    monkeypatch.setenv("nnUNet_extTrainer", str(plugin_folder()))
    monkeypatch.setenv("nnUNet_fed_site", str(tmp_path / "site.toml"))
    planned.restudy("site_a", planned.study, tmp_path / "preprocessed")
    point(tmp_path, "127.0.0.1:9")
    return tmp_path


def point(folder: Path, address: str) -> None:
    text = f'name = "site_a"\ncoordinator = "{address}"\ninsecure = true\nconnect_minutes = 0.01\n'
    (folder / "site.toml").write_text(text)


def refusal(method: str = "fedavg", pretrained: Path | None = None) -> str:
    file = None if pretrained is None else str(pretrained)
    with pytest.raises(SystemExit) as refused:
        run_training("1", "3d_fullres", 0, METHODS[method].own_trainer(), PLANS, file, device=torch.device("cpu"))
    assert isinstance(refused.value.code, str)
    assert refused.value.__cause__ is None
    return refused.value.code


def test_no_site_file(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_fed_site")
    assert "nnUNet_fed_site is not set" in refusal()
    monkeypatch.setenv("nnUNet_fed_site", str(site / "nowhere.toml"))
    assert "nowhere.toml cannot be read" in refusal()


def test_no_coordinator(site: Path) -> None:
    assert refusal().startswith("Error: The coordinator at 127.0.0.1:9 does not answer")


def test_pretrained_weights_that_cannot_be_used(site: Path, planned: Planned) -> None:
    """Before a coordinator is looked for; this one does not answer."""
    file = site / "pretrained.pth"
    assert refusal(pretrained=file) == (
        f"Error: The pretrained weights in {file} cannot be read: No such file or directory. Name a checkpoint of "
        "nnU-Net."
    )
    weights = {"encoder.stages.0.0.convs.0.conv.weight": torch.zeros(3)}
    torch.save({"network_weights": weights}, file)
    for method in ("fedavg", "fedoap"):
        study = Federation.model_validate({**planned.study.model_dump(), "method": {"name": method}})
        shutil.rmtree(site / "preprocessed")
        planned.restudy("site_a", study, site / "preprocessed")
        told = refusal(method=method, pretrained=file)
        assert "conv.weight' has the shape (3,) there and (8, 1, 3, 3, 3) here (and " in told
    digest = "0" * 64
    study = Federation.model_validate({**planned.study.model_dump(), "pretrained": digest})
    shutil.rmtree(site / "preprocessed")
    planned.restudy("site_a", study, site / "preprocessed")
    assert f"digest {digest}, and those that this command names have " in refusal(pretrained=file)
    assert f"digest {digest}, and this command names none: add -pretrained_weights FILE." in refusal()


def test_plans_of_another_federation(site: Path, planned: Planned, serve: Serve) -> None:
    other = Federation.model_validate({**planned.study.model_dump(), "rounds": 77})
    point(site, serve(other).server.address)
    assert "plans at site 'site_a' belong to another study" in refusal()


def test_plans_without_a_federation(site: Path) -> None:
    (plans_file,) = (site / "preprocessed").glob(f"*/{PLANS}.json")
    plans = json.loads(plans_file.read_text())
    del plans["federation"]
    plans_file.write_text(json.dumps(plans))
    assert "were not made for a federation" in refusal()


def test_debug_shows_the_error_itself(
    site: Path, planned: Planned, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_fed_debug", "1")
    other = Federation.model_validate({**planned.study.model_dump(), "sites": ("x", "y")})
    point(site, serve(other).server.address)
    with pytest.raises(RefusedError, match="not in the study"):
        run_training("1", "3d_fullres", 0, "nnUNetTrainerFedAvg", PLANS, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"classes": ["tumour"]}, "names the class tumour in 'classes', but dataset.json has organ, lesion."),
        ({"classes": ["lesion"], "threshold": {"organ": 5.0}}, "has 'threshold' for organ, but the lesion classes are"),
        ({"log_base": {"lesion": 5.0}}, "has 'log_base' for lesion, but the lesion classes are organ, lesion"),
    ],
)
def test_classes_that_the_data_set_does_not_have(
    site: Path, planned: Planned, options: dict[str, Any], expected: str
) -> None:
    study = Federation.model_validate({**planned.study.model_dump(), "method": {"name": "fedgs", **options}})
    shutil.rmtree(site / "preprocessed")
    planned.restudy("site_a", study, site / "preprocessed")
    assert expected in refusal(method="fedgs")
