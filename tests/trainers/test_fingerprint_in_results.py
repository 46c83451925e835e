"""What nnU-Net keeps of the fingerprint: stock planning beside finds the site's own, and no model tells of a case."""

from __future__ import annotations

import json
import zipfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from in_process import InProcess
from left_behind import Site01, quick_nnunet, train_together
from nnunetv2.model_sharing.model_export import export_pretrained_model
from serving import Served
from tiny import DATASET
from version_0_1 import CONFIGURATION, PLANS, SITES, STUDIES, LeftBehind

from nnunet_fed.agreement.fingerprint_files import COMMON, OWN, OWN_OF_0_1, put_own_in_place
from nnunet_fed.study.federation import Federation
from nnunet_fed.trainers.nnUNetTrainerFedAvg import nnUNetTrainerFedAvg

OF_A_CASE = ("0.98765", "4321")
SINGLE_CASES = {"spacings": [[0.98765, 1.0, 1.0]] * 3, "shapes_after_crop": [[4321, 20, 20]] * 3}


def assert_tells_of_no_case(texts: dict[str, bytes]) -> None:
    for name, text in texts.items():
        assert not [number for number in OF_A_CASE if number.encode() in text], name


def test_a_folder_that_version_0_1_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The export tells of no single case, whoever has written the fingerprint beside the preprocessed cases."""
    quick_nnunet(monkeypatch)
    monkeypatch.delenv("nnUNet_fed_skip_validation")
    left = LeftBehind("fedavg", tmp_path / "study")
    study = Federation.read(left.study_file)
    sites = [Site01(left, name, "fedavg", monkeypatch) for name in SITES]
    first, second = (next((left.site(name) / "nnUNet_preprocessed").glob("Dataset*")) for name in SITES)
    common, local = (json.loads((first / name).read_text()) for name in (OWN, OWN_OF_0_1))
    assert common != local
    (second / OWN_OF_0_1).write_text(json.dumps(SINGLE_CASES))
    (second / OWN).write_text(json.dumps(SINGLE_CASES))  # stock nnU-Net has extracted it again

    with ExitStack() as stack:
        train_together(sites, Served(study, left.state, stack), monkeypatch)

    assert json.loads((first / OWN).read_text()) == local, "from which stock nnU-Net plans"
    assert json.loads((first / COMMON).read_text()) == common
    assert not (first / OWN_OF_0_1).exists()
    assert json.loads((second / OWN).read_text()) == SINGLE_CASES
    assert not (second / COMMON).exists()
    for site, dataset in zip(sites, (first, second), strict=True):
        told = json.loads((site.fold.parent / OWN).read_text())
        assert [len(told[name]) for name in ("spacings", "shapes_after_crop")] == [1, 1]
        for variable, folder in left.paths(site.name).items():
            monkeypatch.setenv(variable, folder)
        (site.fold / "progress.png").touch()  # which these tests do not draw
        exported = tmp_path / f"{site.name}.zip"
        facts = STUDIES["fedavg"]
        export_pretrained_model(
            dataset.name, str(exported), (CONFIGURATION,), facts["trainer"], PLANS, (facts["fold"],)
        )
        with zipfile.ZipFile(exported) as packed:
            texts = {name: packed.read(name) for name in packed.namelist()}
        assert any(name.endswith(OWN) for name in texts)
        assert_tells_of_no_case(texts)
        assert_tells_of_no_case({path.name: path.read_bytes() for path in site.fold.parent.glob("**/*.json")})


@pytest.mark.parametrize("there", [True, False], ids=["single cases", "none"])
def test_results_are_clean_whatever_lies_beside_the_cases(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = InProcess(tmp_path, monkeypatch)
    for site in sites.cases:
        fingerprint = tmp_path / site / "preprocessed" / DATASET / OWN
        fingerprint.write_text(json.dumps(SINGLE_CASES))
        if not there:
            fingerprint.unlink()
    for trainer in sites.train(nnUNetTrainerFedAvg, sites.study(method={"name": "fedavg"})).values():
        results = Path(trainer.output_folder_base)
        assert json.loads((results / OWN).read_text())["spacings"] == [[1.0, 1.0, 1.0]]
        assert_tells_of_no_case({path.name: path.read_bytes() for path in results.glob("**/*.json")})
        assert Path(trainer.preprocessed_dataset_folder_base).name == DATASET


def test_folders_of_this_version_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / OWN).write_text("own")
    (tmp_path / COMMON).write_text("common")
    put_own_in_place(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {OWN: "own", COMMON: "common"}
