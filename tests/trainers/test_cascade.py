"""The stages of a cascade at the sites: who predicts for the next stage, and who may begin it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process import CPU, InProcess, same_arrays, weights
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny import DATASET, DESCRIPTION, tiny_cascade

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.study.federation import Federation
from nnunet_fed.trainers import nnUNetTrainerFedSM
from nnunet_fed.trainers.nnUNetTrainerDitto import nnUNetTrainerDitto
from nnunet_fed.trainers.nnUNetTrainerFedAdam import nnUNetTrainerFedAdam
from nnunet_fed.trainers.nnUNetTrainerFedAvg import nnUNetTrainerFedAvg
from nnunet_fed.trainers.nnUNetTrainerFedAvgM import nnUNetTrainerFedAvgM
from nnunet_fed.trainers.nnUNetTrainerFedGS import nnUNetTrainerFedGS
from nnunet_fed.trainers.nnUNetTrainerFedOAP import nnUNetTrainerFedOAP
from nnunet_fed.trainers.nnUNetTrainerFedProx import nnUNetTrainerFedProx
from nnunet_fed.trainers.nnUNetTrainerLocal import nnUNetTrainerLocal
from nnunet_fed.trainers.parts import further_validation, study_trainer
from nnunet_fed.trainers.parts.sentences import DEBUG_VARIABLE
from nnunet_fed.trainers.parts.study_trainer import SKIP_VALIDATION_VARIABLE

FIRST, SECOND = "3d_lowres", "3d_cascade_fullres"
CHANNELS = 3
"""Of the second stage: the image, and organ and lesion of the first stage."""
FEDSM = nnUNetTrainerFedSM.nnUNetTrainerFedSM
METHODS: list[tuple[type[Any], dict[str, Any]]] = [
    (nnUNetTrainerLocal, {"name": "local"}),
    (nnUNetTrainerFedAvg, {"name": "fedavg"}),
    (nnUNetTrainerFedAvg, {"name": "fedavg", "finetune_epochs": 1}),
    (nnUNetTrainerFedProx, {"name": "fedprox"}),
    (nnUNetTrainerFedAvgM, {"name": "fedavgm"}),
    (nnUNetTrainerFedAdam, {"name": "fedadam"}),
    (nnUNetTrainerDitto, {"name": "ditto"}),
    (FEDSM, {"name": "fedsm", "selector_header_features": False}),
    (nnUNetTrainerFedGS, {"name": "fedgs", "threshold": 10}),
    (nnUNetTrainerFedOAP, {"name": "fedoap", "finetune_epochs": 1}),
]


class Cascade(InProcess):
    """Tiny sites that train one stage after the other, into the same results."""

    configuration, fold = FIRST, "all"
    plans = staticmethod(tiny_cascade)

    def study(self, **settings: Any) -> Federation:
        brief = {"method": {"name": "fedavg"}, "rounds": 1, "iterations_per_epoch": 1}
        return super().study(**{**brief, **settings})

    def trainer(self, trainer: type[Any], study: Any, site: str) -> Any:
        self._patch.setenv("nnUNet_preprocessed", str(self._folder / site / "preprocessed"))
        self._patch.setenv("nnUNet_results", str(self._folder / site / "results"))
        return trainer(self.plans(study), self.configuration, self.fold, DESCRIPTION, CPU)

    def stage(self, trainer: type[Any], study: Any, configuration: str, fold: Any = "all") -> dict[str, Any]:
        self.configuration, self.fold = configuration, fold
        trainers = self.make(trainer, study)
        self.run(trainers, validate=True)
        return trainers

    def predicted(self, trainer: type[Any], site: str) -> Path:
        model = f"{trainer.__name__}__nnUNetFedPlans__{FIRST}"
        return self._folder / site / "results" / DATASET / model / "predicted_next_stage" / SECOND

    def preprocessed(self, site: str) -> Path:
        return self._folder / site / "preprocessed" / DATASET


class Predictions:
    """Stands for nnU-Net's validation: writes for the next stage as that does, and knows which network did."""

    def __init__(self) -> None:
        self.by: dict[tuple[str, str], float] = {}
        self.next_stages: list[Any] = []

    def __call__(self, trainer: Any, save_probabilities: bool = False) -> None:
        self.next_stages.append(trainer.configuration_manager.next_stage_names)
        validation = Path(trainer.output_folder) / "validation"
        validation.mkdir(parents=True, exist_ok=True)
        (validation / "summary.json").write_text(json.dumps({"foreground_mean": {"Dice": 0.5}}))
        _, cases = trainer.do_split()
        for name in trainer.configuration_manager.next_stage_names or ():
            folder = Path(trainer.output_folder_base) / "predicted_next_stage" / name
            folder.mkdir(parents=True, exist_ok=True)
            for case in cases:
                data, *_ = trainer.dataset_class(trainer.preprocessed_dataset_folder, [case]).load_case(case)
                nnUNetDatasetBlosc2.save_seg(np.ones(data.shape[1:], np.uint8), str(folder / case))
                self.by[trainer.preprocessed_dataset_folder, case] = score(trainer)


def score(trainer: Any) -> float:
    return float(sum(np.abs(array).sum() for array in weights(trainer.bare(trainer.network)).values()))


@pytest.fixture
def sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cascade:
    sites = Cascade(tmp_path, monkeypatch, {"a": 5, "b": 6})
    monkeypatch.delenv(SKIP_VALIDATION_VARIABLE)
    monkeypatch.setenv(DEBUG_VARIABLE, "1")  # errors as they are
    for module in (study_trainer, further_validation):
        monkeypatch.setattr(module, "evaluate_lesions", lambda trainer: None)
    monkeypatch.setattr(
        nnUNetTrainerFedSM, "validate_global_and_super", lambda trainer, save: trainer.validate_global(save)
    )
    return sites


@pytest.fixture
def predictions(sites: Cascade, monkeypatch: pytest.MonkeyPatch) -> Predictions:
    predictions = Predictions()
    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", lambda *given: predictions(*given))
    return predictions


@pytest.mark.parametrize(("trainer", "method"), METHODS)
def test_the_deployed_model_predicts_for_the_next_stage_which_trains_on_it(
    sites: Cascade, predictions: Predictions, monkeypatch: pytest.MonkeyPatch, trainer: type[Any], method: Any
) -> None:
    cross_site = method["name"] in ("fedavg", "ditto")  # other sites' models are validated, too, and predict nothing
    study = sites.study(method=method, configuration=SECOND, fold="all", cross_site=cross_site)
    first = sites.stage(trainer, study, FIRST)
    assert len(predictions.by) == sum(sites.cases.values())
    for (folder, case), by in predictions.by.items():
        site = next(part for part in Path(folder).parts if part in sites.cases)
        assert by == score(first[site])
        assert (sites.predicted(trainer, site) / f"{case}.b2nd").is_file()

    steps: list[torch.Tensor] = []
    step = nnUNetTrainer.train_step
    monkeypatch.setattr(
        nnUNetTrainer, "train_step", lambda self, batch: (steps.append(batch["data"]), step(self, batch))[1]
    )
    second = sites.stage(trainer, study, SECOND)
    assert {len(data[0]) for data in steps} == {CHANNELS}
    assert all(data[:, 1:].any() for data in steps), "the first stage has predicted an organ everywhere"
    a, b = (weights(one.shared_network) for one in second.values())
    assert next(iter(a.values())).shape[1] == CHANNELS
    if method["name"] not in ("local", "fedoap") and "finetune_epochs" not in method:
        assert same_arrays(a, b)


def write_folds(sites: Cascade) -> None:
    for site, number in sites.cases.items():
        names = [f"case_{case}" for case in range(number)]
        folds = [{"train": [case for case in names if case != own], "val": [own]} for own in names]
        (sites.preprocessed(site) / "splits_final.json").write_text(json.dumps(folds))


def test_a_second_stage_is_refused_until_all_folds_have_predicted(sites: Cascade, predictions: Predictions) -> None:
    write_folds(sites)
    study = sites.study(configuration=SECOND)
    for fold in (0, 3):
        sites.stage(nnUNetTrainerFedAvg, study.model_copy(update={"fold": fold}), FIRST, fold)
    with pytest.raises(ConfigurationError) as caught:
        sites.stage(nnUNetTrainerFedAvg, study, SECOND, 0)
    assert (
        "3d_cascade_fullres trains on what 3d_lowres predicts, and of 3 of this site's 5 cases "
        "(case_1, case_2, case_4) there is no prediction"
    ) in str(caught.value)
    assert (
        f"First train fold 1, 2, 4 of 3d_lowres with the other sites ('nnUNetv2_train {DATASET} 3d_lowres 1 "
        "-tr nnUNetTrainerFedAvg -p nnUNetFedPlans')"
    ) in str(caught.value)
    assert not sites.rooms.sent
    sites.stage(nnUNetTrainerFedAvg, study.model_copy(update={"fold": "all"}), FIRST)
    sites.stage(nnUNetTrainerFedAvg, study, SECOND, 0)


@pytest.mark.parametrize("method", [nnUNetTrainerFedAvg, nnUNetTrainerLocal, nnUNetTrainerDitto])
def test_each_method_reads_its_own_first_stage(sites: Cascade, predictions: Predictions, method: type[Any]) -> None:
    other = nnUNetTrainerFedProx
    sites.stage(other, sites.study(method={"name": "fedprox"}, fold="all"), FIRST)
    with pytest.raises(ConfigurationError, match=rf"{method.__name__}__nnUNetFedPlans__{FIRST}"):
        sites.stage(method, sites.study(method={"name": method.method}, fold="all"), SECOND)
    assert not sites.rooms.sent
    (only,) = {path.parent.parent.parent.name for path in sites.predicted(other, "a").glob("*")}
    assert only.startswith("nnUNetTrainerFedProx__")


@pytest.mark.parametrize("damage", ["lost", "half a file", "older plans"])
def test_a_prediction_that_does_not_fit_is_told_also_when_only_validating(
    sites: Cascade, predictions: Predictions, damage: str
) -> None:
    study = sites.study(fold="all")
    sites.stage(nnUNetTrainerFedAvg, study, FIRST)
    done = sites.stage(nnUNetTrainerFedAvg, study, SECOND)
    for site in sites.cases:
        file = sites.predicted(nnUNetTrainerFedAvg, site) / "case_2.b2nd"
        content = file.read_bytes()
        file.unlink()
        if damage == "half a file":
            file.write_bytes(content[: len(content) // 2])
        elif damage == "older plans":
            nnUNetDatasetBlosc2.save_seg(np.ones((3, 10, 10), np.uint8), str(file.with_suffix("")))
    expected = r"of 1 of this site's [56] cases \(case_2\).*First train fold all of 3d_lowres.*with --val\.$"
    with pytest.raises(ConfigurationError, match=expected):
        sites.stage(nnUNetTrainerFedAvg, study, SECOND)
    assert not sites.rooms.sent
    only_validating = sites.trainer(nnUNetTrainerFedAvg, study, "a")
    only_validating.load_checkpoint(str(Path(done["a"].output_folder) / "checkpoint_final.pth"))
    with pytest.raises(ConfigurationError, match=expected):
        only_validating.perform_actual_validation()


@pytest.mark.parametrize("there", ["nothing", "an empty folder"])
def test_without_the_next_stages_cases_the_first_stage_is_validated_all_the_same(
    sites: Cascade, predictions: Predictions, there: str
) -> None:
    def plans(study: Any) -> dict[str, Any]:
        made = tiny_cascade(study)
        made["configurations"]["2d"]["data_identifier"] = "fullres"
        return made

    sites.plans = plans  # type: ignore[method-assign, assignment]
    for site in sites.cases:
        if there == "an empty folder":
            (sites.preprocessed(site) / "fullres").mkdir()
    study = sites.study(fold="all")
    first = sites.stage(nnUNetTrainerFedAvg, study, FIRST)
    assert predictions.next_stages == [None, None]
    log = Path(first["a"].log_file).read_text()
    assert "2d is not preprocessed here, so nothing is predicted for 3d_cascade_fullres" in log
    assert f"nnUNetv2_preprocess -d {DATASET} -plans_name nnUNetFedPlans -c 2d" in log
    assert first["a"].configuration_manager.next_stage_names == [SECOND], "the plans say so still"

    for site in sites.cases:
        shutil.copytree(sites.preprocessed(site) / "tiny", sites.preprocessed(site) / "fullres", dirs_exist_ok=True)
        again = sites.trainer(nnUNetTrainerFedAvg, study, site)
        again.load_checkpoint(str(Path(first[site].output_folder) / "checkpoint_final.pth"))
        again.perform_actual_validation()  # what nnU-Net makes of --val
    assert len(predictions.by) == sum(sites.cases.values())
    sites.stage(nnUNetTrainerFedAvg, study, SECOND)
