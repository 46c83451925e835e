"""Every method with ``torch.compile`` and with mixed precision, as nnU-Net has them on CUDA: here on the CPU.

The compiler's backend runs what it traced as it is, so that a compiled training must end with the bits of the other
one. At site a some steps overflow, which ``GradScaler`` skips.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_gcml_trainer as gcml
import torch
from in_process import CPU, STEPS, InProcess, Killed, same_arrays
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as module_of_nnunet  # noqa: N813
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from test_gcml_trainer import PLANS, Postman, postman, preprocessed  # noqa: F401 (fixtures)
from tiny import tiny_plans

from nnunet_fed.exchange.keys import MODEL, key_of, scope_of_round
from nnunet_fed.study.federation import Federation
from nnunet_fed.trainers.gossip import mutual_learning
from nnunet_fed.trainers.nnUNetTrainerDitto import nnUNetTrainerDitto
from nnunet_fed.trainers.nnUNetTrainerFedAdam import nnUNetTrainerFedAdam
from nnunet_fed.trainers.nnUNetTrainerFedAvg import nnUNetTrainerFedAvg
from nnunet_fed.trainers.nnUNetTrainerFedAvgM import nnUNetTrainerFedAvgM
from nnunet_fed.trainers.nnUNetTrainerFedGS import nnUNetTrainerFedGS
from nnunet_fed.trainers.nnUNetTrainerFedOAP import nnUNetTrainerFedOAP
from nnunet_fed.trainers.nnUNetTrainerFedProx import nnUNetTrainerFedProx
from nnunet_fed.trainers.nnUNetTrainerFedSM import nnUNetTrainerFedSM
from nnunet_fed.trainers.nnUNetTrainerGCML import nnUNetTrainerGCML
from nnunet_fed.trainers.parts.starting_anew import begin_anew
from nnunet_fed.trainers.parts.two_models import TwoModelTrainer

SCALE = 1024.0
"""Of each first ``GradScaler``; it never grows in a training as short as these."""
ROUNDS, FINETUNE_EPOCHS = 2, 2
TRAINERS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "fedavg": (nnUNetTrainerFedAvg, {}),
    "fedprox": (nnUNetTrainerFedProx, {}),
    "fedavgm": (nnUNetTrainerFedAvgM, {}),
    "fedadam": (nnUNetTrainerFedAdam, {}),
    "fedgs": (nnUNetTrainerFedGS, {"threshold": 9, "finetune_epochs": FINETUNE_EPOCHS}),
    "ditto": (nnUNetTrainerDitto, {}),
    "fedsm": (nnUNetTrainerFedSM, {"selector_steps_per_round": 1}),
    "fedoap": (nnUNetTrainerFedOAP, {"finetune_epochs": FINETUNE_EPOCHS}),
}
"""Trainer and options of each method that has rounds."""
FINETUNED = ("fedgs", "fedoap")
OVERFLOWS = {(0, 1), (1, 2), (ROUNDS, 0)}
"""Of site a's steps, those that overflow: with two models one of each, and the first one of a fine-tuning."""


class Scaler(torch.amp.GradScaler):
    """Whose next step overflows if the test says so."""

    overflows = False

    def __init__(self, device: str):
        super().__init__("cpu", init_scale=SCALE)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        if self.overflows:
            optimizer.param_groups[0]["params"][0].grad.fill_(torch.inf)
        super().unscale_(optimizer)


@dataclass
class Steps:
    """Puts itself around each step of nnU-Net's, which a method with two models makes twice for a batch."""

    overflows: set[tuple[int, int]] = field(default_factory=lambda: OVERFLOWS)
    """Epoch and number within it."""
    kill_at: tuple[int, int] | None = None
    seen: list[tuple[str, int, bool]] = field(default_factory=list)
    """Of each step: site, epoch, and whether the weights moved."""
    counted: dict[tuple[str, int], int] = field(default_factory=dict)
    """Steps that FedGS has counted at the end of an epoch, by site."""

    def around(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def train_step(trainer: Any, batch: Any) -> Any:
            epoch, counts = trainer.current_epoch, trainer.__dict__.setdefault("steps_of_epochs", {})
            number = counts.get(epoch, 0)
            counts[epoch] = number + 1
            if (epoch, number) == self.kill_at:
                raise Killed
            site = trainer.own_site().name
            scaler = trainer.grad_scaler
            before = [parameter.detach().clone() for parameter in trainer.network.parameters()]
            scaler.overflows = site == "a" and (epoch, number) in self.overflows
            result = step(trainer, batch)
            scaler.overflows = False
            if isinstance(trainer, nnUNetTrainerFedGS):
                self.counted[site, epoch] = trainer.scaler.steps
            after = list(trainer.network.parameters())
            self.seen.append((site, epoch, any(not torch.equal(*pair) for pair in zip(before, after, strict=True))))
            return result

        return train_step


def mixed() -> torch.autocast:
    """What nnU-Net has on CUDA only."""
    return torch.autocast("cpu", torch.float16)


class OnOneMachine(InProcess):
    """Sites that train in mixed precision."""

    def trainer(self, trainer: type[Any], study: Federation, site: str) -> Any:
        one = super().trainer(trainer, study, site)
        one.grad_scaler = torch.amp.GradScaler(CPU.type)
        return one

    def resumed(self, trainer: type[Any], study: Federation) -> dict[str, Any]:
        """New processes of a training that was killed."""
        made = {site: self.trainer(trainer, study, site) for site in self.cases}
        for one in made.values():
            one.load_checkpoint(str(Path(one.output_folder) / "checkpoint_latest.pth"))
        return made

    def train_killed_twice(self, trainer: type[Any], study: Federation, steps: Steps, late: bool) -> dict[str, Any]:
        """Killed before the last exchange, and if ``late`` once more in the second epoch of the fine-tuning."""
        trainers = self.make(trainer, study)
        self.rooms.kill_before = key_of(scope_of_round(ROUNDS - 1), MODEL)
        with pytest.raises(Killed):
            self.run(trainers)
        self.rooms.kill_before = None
        if late:
            steps.kill_at = (ROUNDS + 1, 1)
            with pytest.raises(Killed):
                self.run(self.resumed(trainer, study))
            steps.kill_at = None
        trainers = self.resumed(trainer, study)
        self.run(trainers)
        return trainers


def compiled(patch: pytest.MonkeyPatch) -> None:
    """Let nnU-Net compile, as it does on CUDA; torch raises where it would go on without, after too many times."""
    compile_, run = torch.compile, nnUNetTrainer.run_training

    def run_training(trainer: Any) -> None:
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # of this thread
            run(trainer)

    torch._dynamo.reset()
    patch.setattr(nnUNetTrainer, "run_training", run_training)
    patch.setattr(nnUNetTrainer, "_do_i_compile", lambda trainer: True)
    patch.setattr(torch, "compile", lambda module: compile_(module, backend="eager"))


def in_mixed_precision(patch: pytest.MonkeyPatch) -> Steps:
    """Let nnU-Net's steps be as on CUDA; returns what watches them."""
    patch.setattr(module_of_nnunet, "dummy_context", mixed)
    patch.setattr(mutual_learning, "nullcontext", mixed)
    patch.setattr(torch.amp, "GradScaler", Scaler)
    steps = Steps()
    patch.setattr(nnUNetTrainer, "train_step", steps.around(nnUNetTrainer.train_step))
    return steps


@dataclass
class Trained:
    """A whole training of a method."""

    sites: dict[str, Any]
    sent: dict[tuple[str, str], dict[str, Any]]
    steps: Steps


@pytest.fixture(scope="module", params=TRAINERS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Trained, Trained]:
    """A method, trained as it is, and compiled, killed and continued."""
    method: str = request.param
    trainer, options = TRAINERS[method]
    trained = []
    for kills in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            sites = OnOneMachine(tmp_path_factory.mktemp(method), patch)
            study = sites.study(method={"name": method, **options}, rounds=ROUNDS)
            steps = in_mixed_precision(patch)
            if kills:
                compiled(patch)
                trainers = sites.train_killed_twice(trainer, study, steps, late=method in FINETUNED)
            else:
                trainers = sites.train(trainer, study)
            trained.append(Trained(trainers, sites.rooms.sent, steps))
    return method, trained[0], trained[1]


def scalers(trainer: Any) -> list[dict[str, Any]]:
    """The states of the scalers of a trainer's models."""
    own = [trainer.grad_scaler]
    if isinstance(trainer, TwoModelTrainer):
        own.append(trainer._global.grad_scaler)
    return [scaler.state_dict() for scaler in own]


def same(one: Any, other: Any) -> bool:
    """Bit by bit, of what a checkpoint holds."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return bool(np.array_equal(one, other)) or (one != one and other != other)


def state(trainer: Any) -> dict[str, Any]:
    """All that goes on in a training."""
    logs = trainer.logger.get_checkpoint()
    return {
        "network": trainer.bare(trainer.network).state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "scalers": scalers(trainer),
        "method": trainer.method_state(),
        "log": {name: logs[name] for name in ("train_losses", "val_losses", "mean_fg_dice", "lrs")},
    }


def test_compiled_and_continued_trainings_send_and_keep_the_same_bits(both: tuple[str, Trained, Trained]) -> None:
    _, plain, other = both
    assert plain.sent.keys() == other.sent.keys()
    assert all(same_arrays(plain.sent[key], other.sent[key]) for key in plain.sent)
    for site, trainer in plain.sites.items():
        theirs = state(other.sites[site])
        assert [name for name, value in state(trainer).items() if not same(value, theirs[name])] == []


def test_a_step_that_overflows_is_skipped_and_counts_for_its_own_model_only(both: tuple[str, Trained, Trained]) -> None:
    method, plain, _ = both
    models = 2 if method in ("ditto", "fedsm") else 1
    finetuned = FINETUNE_EPOCHS if method in FINETUNED else 0
    for site, trainer in plain.sites.items():
        moved = [moved for name, _, moved in plain.steps.seen if name == site]
        assert len(moved) == STEPS * models * (ROUNDS + finetuned)
        skipped = 0 if site == "b" else 3 if finetuned else 2
        assert moved.count(False) == skipped
        # the fine-tuning begins with a scaler of its own; of two models each has skipped one step
        halved = 0 if site == "b" else 1 if finetuned or models == 2 else 2
        assert [found["scale"] for found in scalers(trainer)] == [SCALE / 2**halved] * models
    if method == "fedgs":
        rounds = {(site, epoch): steps for (site, epoch), steps in plain.steps.counted.items() if epoch < ROUNDS}
        assert rounds == {("a", 0): STEPS - 1, ("b", 0): STEPS, ("a", 1): STEPS - 1, ("b", 1): STEPS}
    assert all(trainer.current_epoch == ROUNDS + finetuned for trainer in plain.sites.values())


def test_stock_nnunet_loads_what_a_compiled_training_has_written(both: tuple[str, Trained, Trained]) -> None:
    method, _, other = both
    for trainer in other.sites.values():
        for path in Path(trainer.output_folder).glob("checkpoint_*.pth"):
            saved = torch.load(path, weights_only=False)
            manager = PlansManager(tiny_plans(trainer.study))
            kind = TRAINERS[method][0] if method == "fedoap" else nnUNetTrainer
            network = kind.build_network_architecture(manager, manager.get_configuration("2d"), 1, 3)
            network.load_state_dict(saved["network_weights"])
            assert "_orig_mod" not in str([*saved["network_weights"], saved.get("federation", "")])


def test_a_site_that_starts_anew_has_fresh_scalers_of_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = OnOneMachine(tmp_path, monkeypatch)
    trainer = sites.trainer(nnUNetTrainerDitto, sites.study(method={"name": "ditto"}), "a")
    trainer.initialize()
    trainer.grad_scaler.load_state_dict({**trainer.grad_scaler.state_dict(), "scale": 4.0})
    begin_anew(trainer)
    assert [found["scale"] for found in scalers(trainer)] == [torch.amp.GradScaler(CPU.type).get_scale()] * 2


@PLANS
def test_gcml_compiled_and_continued_in_a_phase_trains_and_posts_the_same_bits(
    postman: Postman,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    plan: str,
) -> None:
    make = gcml.make

    def in_mixed(wanted: Federation) -> Any:
        trainer = make(wanted)
        trainer.grad_scaler = torch.amp.GradScaler(CPU.type)
        return trainer

    monkeypatch.setattr(gcml, "make", in_mixed)
    monkeypatch.setenv(mutual_learning.PLAN_VARIABLE, plan)
    in_phase: list[tuple[float, float]] = []
    keep = nnUNetTrainerGCML._keep_one

    def note_scales(trainer: Any, peer_model: Any) -> None:
        in_phase.append((trainer.grad_scaler.get_scale(), peer_model.grad_scaler.get_scale()))
        keep(trainer, peer_model)

    monkeypatch.setattr(nnUNetTrainerGCML, "_keep_one", note_scales)
    arrays = gcml.foreign()
    steps = in_mixed_precision(monkeypatch)
    steps.overflows = {(0, 1), (1, 2), (2, 1)}
    wanted = gcml.study(rounds=4, mutual_epochs=2, keep="best")
    gcml.brings(postman, arrays)
    calm = gcml.train(wanted)
    # before the phase one of the own model; in the phase one of either
    assert [moved for _, _, moved in steps.seen].count(False) == 3
    assert in_phase == [(SCALE / 4, SCALE / 4)], "the incoming model begins with the site's scale"
    letters = [letter.digest for letter, _ in postman.posted]
    postman.posted.clear()

    compiled(monkeypatch)
    path = gcml.killed_at(monkeypatch, 2, wanted)
    resumed = in_mixed(wanted)
    resumed.load_checkpoint(str(path))
    assert resumed._peer_model is not None
    resumed.run_training()
    resumed.perform_actual_validation()
    resumed.network = resumed.bare(resumed.network)
    assert gcml.differences(resumed, calm) == []
    assert in_phase[1:] == in_phase[:1]
    assert resumed.grad_scaler.state_dict() == calm.grad_scaler.state_dict()
    assert [letter.digest for letter, _ in postman.posted] == letters
    for path in Path(resumed.output_folder).glob("checkpoint_*.pth"):
        saved = torch.load(path, weights_only=False)
        assert "_orig_mod" not in str([*saved["network_weights"], saved["federation"]])
