"""The proximal term, and FedProx and Ditto inside nnU-Net's own training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import InProcess, same_arrays, same_training, weights
from torch import nn

from nnunet_fed.methods.proximal import Proximal
from nnunet_fed.trainers.nnUNetTrainerDitto import nnUNetTrainerDitto
from nnunet_fed.trainers.nnUNetTrainerFedAvg import nnUNetTrainerFedAvg
from nnunet_fed.trainers.nnUNetTrainerFedProx import nnUNetTrainerFedProx
from nnunet_fed.trainers.nnUNetTrainerLocal import nnUNetTrainerLocal
from nnunet_fed.trainers.parts import further_validation


def held(strength: float, start: float = 1.0, lr: float = 0.1) -> tuple[nn.Parameter, torch.optim.SGD, Proximal]:
    weight = nn.Parameter(torch.tensor([start], dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr)
    proximal = Proximal(optimizer, {"w": weight}, strength)
    proximal.hold_to({"w": weight})
    return weight, optimizer, proximal


@settings(deadline=None)  # the first step of a process takes a while on a busy machine
@given(mu=st.floats(0, 5), anchor=st.floats(-3, 3), gradients=st.lists(st.floats(-2, 2), min_size=1, max_size=5))
def test_a_step_is_the_sources(mu: float, anchor: float, gradients: list[float]) -> None:
    """w <- w - lr (g + mu (w - w_t)), as FedProx's official optimizer has it."""
    weight, optimizer, _ = held(mu, anchor)
    expected = anchor
    for gradient in gradients:
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        expected -= 0.1 * (gradient + mu * (expected - anchor))
    assert weight.item() == pytest.approx(expected, abs=1e-12)


def test_it_is_the_gradient_of_the_term_in_the_loss() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    start = {name: tensor.detach().clone() for name, tensor in ours.named_parameters()}
    optimizers = [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True) for model in (ours, theirs)]
    Proximal(optimizers[0], dict(ours.named_parameters()), 0.3).hold_to(start)
    for step in range(4):
        image = torch.full((2, 3), float(step + 1))
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            loss = (model(image) ** 2).mean()
            if model is theirs:
                loss = loss + 0.15 * sum(((t - start[n]) ** 2).sum() for n, t in model.named_parameters())
            loss.backward()
            optimizer.step()
    for name, tensor in ours.named_parameters():
        assert torch.allclose(tensor, dict(theirs.named_parameters())[name], atol=1e-6)
        assert not torch.equal(tensor, start[name])


def test_clipping_sees_the_loss_only_and_a_skipped_step_is_not_pulled() -> None:
    weight, optimizer, proximal = held(2.0, start=0.0)
    with torch.no_grad():
        weight.fill_(10.0)
    weight.grad = torch.tensor([6.0], dtype=torch.float64)
    nn.utils.clip_grad_norm_([weight], 3.0)
    optimizer.step()
    assert weight.item() == pytest.approx(10 - 0.1 * (3 + 2.0 * 10), rel=1e-6), "a pull of 20 is not clipped to 3"

    scaler = torch.amp.GradScaler("cpu")
    before = weight.item()
    scaler.scale((weight * math.inf).sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert weight.item() == before
    proximal.release()
    weight.grad = torch.tensor([1.0], dtype=torch.float64)
    optimizer.step()
    assert weight.item() == pytest.approx(before - 0.1)


def test_what_has_no_gradient_stays_and_without_strength_nothing_is_kept() -> None:
    weight, optimizer, proximal = held(1.0)
    with torch.no_grad():
        weight.fill_(5.0)
    optimizer.step()
    assert weight.item() == 5.0
    assert proximal.state_dict().keys() == {"w"}, "a step was made: the caller may not have the start any more"
    proximal.hold_to({"w": weight})
    assert proximal.state_dict() == {}
    assert vars(held(0.0)[2])["_anchor"] == {}


# ---------------------------------------------------------------------------------------------- in nnU-Net's training


@pytest.fixture
def sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InProcess:
    return InProcess(tmp_path, monkeypatch)


def test_fedprox_without_mu_is_federated_averaging(sites: InProcess) -> None:
    plain = sites.train(nnUNetTrainerFedAvg, sites.study(method={"name": "fedavg", "finetune_epochs": 1}))
    prox = sites.train(nnUNetTrainerFedProx, sites.study(method={"name": "fedprox", "mu": 0, "finetune_epochs": 1}))
    for site, trainer in prox.items():
        assert same_training(trainer, plain[site])
    assert not same_training(prox["a"], prox["b"]), "each has fine-tuned on its own data"


def test_fedprox_holds_the_sites_near_the_global_model(sites: InProcess) -> None:
    def drift(mu: float) -> float:
        trainers = sites.train(nnUNetTrainerFedProx, sites.study(method={"name": "fedprox", "mu": mu}))
        assert same_arrays(weights(trainers["a"].network), weights(trainers["b"].network))
        start, sent = sites.rooms.means["start/model"], sites.rooms.sent["round-0000/model", "a"]
        return float(np.sqrt(sum(((sent[name] - start[name]) ** 2).sum() for name in start)))

    free, near, nearest = drift(0.0), drift(1.0), drift(10.0)
    assert nearest < near < free


@pytest.mark.parametrize("local_epochs", [1, 2])
@pytest.mark.parametrize(
    ("trainer", "method"),
    [
        (nnUNetTrainerFedProx, {"name": "fedprox", "mu": 0.5, "finetune_epochs": 1}),
        (nnUNetTrainerDitto, {"name": "ditto", "pull_strength": 0.5}),
    ],
)
def test_a_killed_training_goes_on_to_the_same_bits(
    sites: InProcess, trainer: type[Any], method: dict[str, Any], local_epochs: int
) -> None:
    study = sites.study(method=method, local_epochs=local_epochs)
    calm = sites.train(trainer, study)
    killed = sites.train_killed(trainer, study, "round-0001/model")
    for site in calm:
        assert same_training(killed[site], calm[site])
        assert same_arrays(weights(killed[site].shared_network), weights(calm[site].shared_network))


@pytest.mark.parametrize(("trainer", "name", "option"), [
    (nnUNetTrainerFedProx, "fedprox", "mu"), (nnUNetTrainerDitto, "ditto", "pull_strength"),
])  # fmt: skip
def test_within_a_round_a_checkpoint_remembers_the_rounds_start(
    sites: InProcess, trainer: type[Any], name: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nnU-Net's best checkpoint is of any epoch, and ``--c`` may begin with it."""
    trainers = sites.make(trainer, sites.study(method={"name": name, option: 0.5}, local_epochs=2, rounds=1))
    files = {site: Path(one.output_folder) / "middle.pth" for site, one in trainers.items()}
    end = trainer.on_epoch_end

    def save(one: Any) -> None:
        end(one)
        if one.current_epoch == 1:
            one.current_epoch -= 1
            one.save_checkpoint(str(Path(one.output_folder) / "middle.pth"))
            one.current_epoch += 1

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "on_epoch_end", save)
        sites.run(trainers)
    start = sites.rooms.means["start/model"]
    resumed = sites.trainer(trainer, trainers["a"].study, "a")
    resumed.load_checkpoint(str(files["a"]))
    assert resumed.current_epoch == 1
    anchor = {name: tensor.numpy() for name, tensor in resumed.proximal.state_dict().items()}
    assert same_arrays(anchor, {name: start[name] for name in anchor})
    assert not same_arrays(weights(resumed.shared_network), start)


def test_dittos_global_model_is_federated_averagings_and_the_personal_one_is_pulled_to_it(sites: InProcess) -> None:
    plain = sites.train(nnUNetTrainerFedAvg, sites.study(method={"name": "fedavg"}))
    alone = sites.train(nnUNetTrainerLocal, sites.study(method={"name": "local"}))
    common = weights(plain["a"].network)

    def ditto(strength: float) -> dict[str, Any]:
        return sites.train(nnUNetTrainerDitto, sites.study(method={"name": "ditto", "pull_strength": strength}))

    distances = []
    for strength in (0.0, 1.0, 5.0):
        trained = ditto(strength)
        assert same_arrays(weights(trained["a"].shared_network), common)
        personal, pulled_to = weights(trained["a"].network), sites.rooms.means["round-0000/model"]
        distances.append(sum(float(((personal[name] - pulled_to[name]) ** 2).sum()) for name in common))
        if strength == 0:
            assert same_training(trained["a"], alone["a"])
            assert same_training(trained["b"], alone["b"])
    assert distances[0] > distances[1] > distances[2] > 0


def test_dittos_files_are_the_personal_model_and_the_global_one(
    sites: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    (trainer, _) = sites.train(nnUNetTrainerDitto, sites.study(method={"name": "ditto"})).values()
    folder = Path(trainer.output_folder)
    for name, network in (("final", trainer.network), ("global", trainer.shared_network)):
        saved = torch.load(folder / f"checkpoint_{name}.pth", weights_only=False)
        assert saved["trainer_name"] == "nnUNetTrainer"
        assert all(torch.equal(tensor, saved["network_weights"][key]) for key, tensor in network.state_dict().items())
    assert not same_arrays(weights(trainer.network), weights(trainer.shared_network))

    validated = []

    def look(one: Any, cases: Any, save_probabilities: bool) -> None:
        validated.append((Path(one.output_folder), one.network))

    monkeypatch.setattr(further_validation, "predict_cases", look)
    monkeypatch.setattr(further_validation, "evaluate_lesions", lambda one: None)
    trainer.validate_global(False)
    assert validated == [(folder / "global", trainer._global.network)]
