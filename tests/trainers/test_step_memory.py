"""What a step keeps for its backward pass: reckoned without computing, against what real steps save."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DATASET, DESCRIPTION, tiny_plans, write_preprocessed

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.gossip.schedule import Version
from nnunet_fed.preflight.resources import StepMemory
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.methods import METHODS
from nnunet_fed.trainers.gossip.mutual_learning import PLAN_VARIABLE
from nnunet_fed.trainers.gossip.peer_model import PeerModel
from nnunet_fed.trainers.nnUNetTrainerFedAvg import nnUNetTrainerFedAvg
from nnunet_fed.trainers.nnUNetTrainerFedSM import nnUNetTrainerFedSM
from nnunet_fed.trainers.parts.named_trainers import method_trainer
from nnunet_fed.trainers.parts.step_memory import RESULTS, reckon

CPU = torch.device("cpu")
EDGE = 64
REGIONS = {"labels": {"background": 0, "organ": [1, 2], "lesion": 2}, "regions_class_order": [1, 2]}
IGNORED = {"labels": {**DESCRIPTION["labels"], "ignore": 3}}
OWN = [name for name in METHODS if name != "custom"]
LAST_PHASE = {"gcml": "mutual learning", "fedoap": "fine-tuning"}
OPTIONS: dict[str, dict[str, Any]] = {"fedgs": {"threshold": 2.0}, "gcml": {"ramp_steps": 0}}


def study_of(method: str, trainer: str = "nnUNetTrainer", **options: Any) -> Federation:
    table = {"name": method, **OPTIONS.get(method, {}), **options}
    study = {"name": "s", "sites": ["a", "b"], "rounds": 40, "trainer": trainer, "method": table}
    return Federation.model_validate(study)


def plans_of(study: Federation) -> dict[str, Any]:
    plans = tiny_plans(study)
    plans["configurations"]["2d"]["patch_size"] = [EDGE, EDGE]
    return plans


def reckoned(study: Federation, labels: dict[str, Any] | None = None, device: str = "cpu") -> StepMemory:
    dataset = {**DESCRIPTION, **(labels or {})}
    return reckon(method_trainer(study), plans_of(study), "2d", dataset, device)


class LiveBytes:
    """Most bytes that autograd holds at once, each storage once and no weights, of real steps."""

    def __init__(self, weights: list[torch.Tensor]):
        self.weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self.times: dict[int, int] = {}
        self.now = self.most = 0

    def pack(self, tensor: torch.Tensor) -> Any:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        held = Held(tensor)
        if place not in self.weights:
            self.now += size * (self.times.get(place, 0) == 0)
            self.times[place] = self.times.get(place, 0) + 1
            self.most = max(self.most, self.now)
            weakref.finalize(held, self.let_go, place, size)
        return held

    def let_go(self, place: int, size: int) -> None:
        self.times[place] -= 1
        self.now -= size * (self.times[place] == 0)


class Held:
    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def measured(study: Federation, folder: Path, labels: dict[str, Any] | None = None) -> int:
    """Of two of the trainer's own steps, in its last phase."""
    os.environ.update({"nnUNet_results": str(folder / "results"), "nnUNet_preprocessed": str(folder)})
    if not (folder / DATASET).exists():
        write_preprocessed(folder)
    trainer = method_trainer(study)
    made = trainer(plans_of(study), "2d", 0, {**DESCRIPTION, **(labels or {})}, CPU)
    made.initialize()
    weights = list(made.network.parameters())
    if study.method.name == "fedoap":
        made._boundary_loss.weight = made.options.perturbation_weight
    elif study.method.name == "gcml":
        facts = {"version": Version("b", {}, 0), "initial": "", "size": 0, "began": 0, "epochs_left": 1, "before": None}
        made._peer_model = PeerModel.beside(made, plan=made._plan_of_choice(), **facts)
        weights += made._peer_model.network.parameters()
    elif hasattr(made, "_global"):
        weights += made._global.network.parameters()
    if hasattr(made, "proximal"):
        made.proximal.hold_to(dict(made.bare(made.network).named_parameters()))
    shape = (EDGE, EDGE // 2)[: 2 if made.enable_deep_supervision else 1]
    if made.label_manager.has_regions:
        target = [torch.rand(2, 2, edge, edge) < 0.3 for edge in shape]
    else:
        target = [torch.randint(0, 3, (2, 1, edge, edge)).short() for edge in shape]
    given = target if made.enable_deep_supervision else target[0]
    live = LiveBytes(weights)
    with torch.autograd.graph.saved_tensors_hooks(live.pack, lambda held: held.tensor):
        for _ in range(2):
            made.train_step({"data": torch.randn(2, 1, EDGE, EDGE), "target": given})
    assert live.now == 0, "all that was saved was let go, so that the meter sees ends"
    return live.most


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nnUNet_results", "nnUNet_preprocessed", PLAN_VARIABLE):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("method", "labels"),
    [*((method, {}) for method in OWN), ("fedoap", REGIONS), ("gcml", IGNORED)],
    ids=[*OWN, "fedoap, regions", "gcml, ignored"],
)
def test_what_is_reckoned_is_what_real_steps_save(method: str, labels: dict[str, Any], tmp_path: Path) -> None:
    study = study_of(method)
    saved = reckoned(study, labels).saved_bytes
    phase = LAST_PHASE.get(method, "training")
    assert list(saved) == list(dict.fromkeys(["training", phase]))
    assert saved[phase] == pytest.approx(measured(study, tmp_path, labels), rel=0.15)


def test_of_a_base_trainer_that_the_study_names(tmp_path: Path) -> None:
    study = study_of("fedoap", "nnUNetTrainerNoDeepSupervision")
    saved = reckoned(study).saved_bytes
    assert saved["fine-tuning"] == pytest.approx(measured(study, tmp_path), rel=0.15)


def test_two_graphs_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of("gcml")
    one = reckoned(study).saved_bytes
    monkeypatch.setenv(PLAN_VARIABLE, "simultaneous")
    both = reckoned(study).saved_bytes
    assert both["mutual learning"] > 1.6 * one["mutual learning"]
    assert both["mutual learning"] == pytest.approx(measured(study, tmp_path), rel=0.15)


def test_what_a_method_adds() -> None:
    plain = reckoned(study_of("fedavg"))
    whole, without = (reckoned(study_of("fedoap", adapter=adapter)) for adapter in ("res3", "none"))
    assert whole.plain_bytes == without.plain_bytes == plain.plain_bytes == plain.saved_bytes["training"]
    assert whole.parameters > without.parameters > plain.parameters
    assert whole.saved_bytes["training"] > 1.2 * without.saved_bytes["training"] > 1.2 * plain.saved_bytes["training"]
    assert without.saved_bytes["fine-tuning"] > 1.05 * without.saved_bytes["training"]
    assert list(reckoned(study_of("fedoap", finetune_epochs=0)).saved_bytes) == ["training"]


@pytest.mark.parametrize(("method", "labels"), [("fedavg", {}), ("fedoap", REGIONS), ("gcml", IGNORED)])
def test_mixed_precision_is_reckoned_without_a_gpu(method: str, labels: dict[str, Any]) -> None:
    study = study_of(method)
    full, half = reckoned(study, labels).saved_bytes, reckoned(study, labels, "cuda").saved_bytes
    assert all(0.5 * full[phase] < half[phase] < full[phase] for phase in full), "the network's, not the loss's"
    assert not torch.is_autocast_enabled("cuda")


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    plans = plans_of(study_of("fedavg"))
    before = dict(plans)
    reckon(nnUNetTrainerFedAvg, plans, "2d", DESCRIPTION, "cpu")
    assert list(tmp_path.iterdir()) == []
    assert plans == before
    assert os.environ[RESULTS] == str(tmp_path)


def test_what_cannot_be_reckoned_is_said() -> None:
    class Asks(nnUNetTrainerFedAvg):
        def _build_loss(self) -> Any:
            return lambda outputs, targets: outputs[0].detach().numpy().sum()

    with pytest.raises(ConfigurationError, match="Asks does not run on tensors without values"):
        reckon(Asks, plans_of(study_of("fedavg")), "2d", DESCRIPTION, "cpu")
    with pytest.raises(ConfigurationError, match="is of the method 'fedavg'"):
        reckon(nnUNetTrainerFedSM, plans_of(study_of("fedavg")), "2d", DESCRIPTION, "cpu")
