"""Which cases a site trains on in a fold: never its own of that fold, whatever its folds are called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DATASET, DESCRIPTION, tiny_plans, write_preprocessed

from nnunet_fed.leases import take
from nnunet_fed.study.federation import Federation, Fold
from nnunet_fed.study.site import SITE_FILE_VARIABLE
from nnunet_fed.trainers.nnUNetTrainerFedAvg import nnUNetTrainerFedAvg
from nnunet_fed.trainers.nnUNetTrainerFedSM import nnUNetTrainerFedSM

FOLDS = (0, 1, 2, 3, 4)
CASES = {"a": 5, "b": 7, "c": 3}
SITES = {"a": "", "b": "folds = { 0 = 1, 1 = 2, 2 = 3, 3 = 4, 4 = 0 }", "c": 'fold = "all"'}
"""What stands in site.toml: the study's folds, others, and all cases in each."""


class Sites:
    """Trainers of the sites, which have preprocessed and nothing else; nnU-Net makes the folds."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch):
        self._folder, self._patch = folder, patch
        for site, number in CASES.items():
            write_preprocessed(folder / site, number)
            (self.splits(site)).unlink()
            text = f'name = "{site}"\ncoordinator = "127.0.0.1:1"\ninsecure = true\n{SITES[site]}\n'
            (folder / f"{site}.toml").write_text(text)

    def splits(self, site: str) -> Path:
        return self._folder / site / DATASET / "splits_final.json"

    def trainer(self, site: str, fold: Fold, trainer: Any = nnUNetTrainerFedAvg) -> Any:
        variables = {
            "nnUNet_raw": self._folder, "nnUNet_preprocessed": self._folder / site,
            "nnUNet_results": self._folder / f"{site}_out", SITE_FILE_VARIABLE: self._folder / f"{site}.toml",
        }  # fmt: skip
        for name, value in variables.items():
            self._patch.setenv(name, str(value))
        method = {"name": trainer.method}
        study = Federation(name="s", sites=tuple(CASES), rounds=1, folds=FOLDS, method=method)  # type: ignore[arg-type]
        return trainer(tiny_plans(study), "2d", fold, DESCRIPTION, torch.device("cpu"))


@pytest.fixture
def sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sites:
    return Sites(tmp_path, monkeypatch)


@pytest.mark.parametrize("kind", [nnUNetTrainerFedAvg, nnUNetTrainerFedSM])
def test_no_site_trains_on_its_own_cases_of_the_fold(sites: Sites, kind: Any) -> None:
    """Every case is kept for validation once; nnU-Net and FedSM's selector have the same cases."""
    for site in ("a", "b"):
        kept: list[str] = []
        for fold in FOLDS:
            trainer = sites.trainer(site, fold, kind)
            training, validation = (set(data.identifiers) for data in trainer.get_tr_and_val_datasets())
            own = json.loads(sites.splits(site).read_text())[fold]
            assert (training, validation) == (set(own["train"]), set(own["val"]))
            assert training
            assert not training & validation
            assert trainer._training_cases == len(training)
            assert trainer.fold_of_study() == (fold if site == "a" else (fold - 1) % 5)
            kept += validation
        assert sorted(kept) == sorted(f"case_{number}" for number in range(CASES[site]))


def test_a_site_with_too_few_cases_trains_each_fold_on_all_of_them(sites: Sites) -> None:
    """Also when it goes on, and when it only validates, whatever site.toml says then."""
    folders = set()
    for fold in (0, 3):
        trainer = sites.trainer("c", fold)
        training, validation = trainer.get_tr_and_val_datasets()
        assert set(training.identifiers) == set(validation.identifiers) == {"case_0", "case_1", "case_2"}
        assert (trainer.fold, trainer.fold_of_study()) == (fold, fold)
        folders.add(trainer.output_folder)
    assert len(folders) == 2
    assert not sites.splits("c").exists()
    state = trainer.training_state()
    (sites._folder / "c.toml").unlink()
    resumed = sites.trainer("c", 3)
    resumed._resumed = state
    assert len(resumed.do_split()[0]) == 3
    resumed = sites.trainer("a", 3)
    (sites._folder / "a.toml").write_text('name = "a"\ncoordinator = "127.0.0.1:1"\ninsecure = true\nfold = "all"\n')
    resumed._resumed = {"random": None}  # of version 0.1
    assert len(resumed.do_split()[0]) == 4


def test_folds_that_are_being_made_are_waited_for(sites: Sites) -> None:
    """Two trainings that start at once, as of two folds: nnU-Net does not write the file at once."""
    sites.splits("a").write_text("[{")
    lease = take(sites.splits("a").with_suffix(".lock"), "")
    trainer = sites.trainer("a", 0)

    def made(*_: Any) -> None:
        sites.splits("a").write_text(json.dumps([{"train": ["case_1"], "val": ["case_0"]}]))
        lease.release()

    sites._patch.setattr("nnunet_fed.leases.PATIENCE_SECONDS", 60.0)
    sites._patch.setattr("filelock.BaseFileLock.acquire", _after(made))
    assert trainer.do_split() == (["case_1"], ["case_0"])


def _after(act: Any) -> Any:
    from filelock import BaseFileLock

    acquire = BaseFileLock.acquire

    def wait(lock: Any, *given: Any, **named: Any) -> Any:
        act()
        return acquire(lock, *given, **named)

    return wait
