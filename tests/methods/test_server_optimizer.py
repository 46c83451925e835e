"""FedAvgM and FedAdam: their formulas, and whole trainings of tiny sites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from in_process import InProcess, RememberingCommunicator, same_arrays, same_training, weights

from nnunet_fed.errors import DisagreementError, NoContributionError
from nnunet_fed.exchange.communicator import Array, LocalCommunicator, LocalFederation
from nnunet_fed.exchange.payload import Tensors
from nnunet_fed.methods.server_optimizer import AdamMoments, difference, with_momentum
from nnunet_fed.trainers.nnUNetTrainerFedAdam import nnUNetTrainerFedAdam
from nnunet_fed.trainers.nnUNetTrainerFedAvg import nnUNetTrainerFedAvg
from nnunet_fed.trainers.nnUNetTrainerFedAvgM import nnUNetTrainerFedAvgM


def drawn(seed: int, names: str = "wv") -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {name: random.normal(size=(3, 2)) for name in names}


@given(lr=st.floats(0.1, 2), momentum=st.floats(0, 0.99), seed=st.integers(0, 1000))
def test_the_mean_of_what_is_uploaded_is_the_sources_next_model(lr: float, momentum: float, seed: int) -> None:
    """Over three rounds: v <- beta v + d, x <- x + lr v, with d the mean of the updates."""
    shares = {"a": 0.25, "b": 0.75}
    x = global_model = drawn(seed)
    last: dict[str, Array] = {}
    velocity = {name: np.zeros_like(array) for name, array in x.items()}
    for number in range(3):
        trained = {
            site: {name: array + drawn(seed + 10 * number + place, name)[name] for name, array in x.items()}
            for place, site in enumerate(shares)
        }
        uploads = {site: with_momentum(x, trained[site], last, lr, momentum) for site in shares}
        for name in x:
            d = sum(share * (trained[site][name] - global_model[name]) for site, share in shares.items())
            velocity[name] = momentum * velocity[name] + d
        global_model = {name: array + lr * velocity[name] for name, array in global_model.items()}
        stepped = {name: sum(share * uploads[site][name] for site, share in shares.items()) for name in x}
        last, x = difference(stepped, x), stepped
        for name in x:
            np.testing.assert_allclose(x[name], global_model[name], atol=1e-9)


def test_without_momentum_the_very_tensors_are_uploaded_and_buffers_always() -> None:
    start, trained = drawn(1), {**drawn(2), "buffer": np.ones(2)}
    uploaded = with_momentum(start, trained, drawn(3), 1.0, 0.0)
    assert all(uploaded[name] is array for name, array in trained.items())
    assert with_momentum(start, trained, drawn(3), 0.5, 0.9)["buffer"] is trained["buffer"]


@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=5), st.floats(0, 0.99), st.floats(0, 0.999), st.floats(1e-4, 0.1)
)
def test_fedadams_steps_are_the_sources(updates: list[float], beta_1: float, beta_2: float, tau: float) -> None:
    moments = AdamMoments(beta_1, beta_2, tau)
    x = {"w": np.array([0.5]), "buffer": np.array([3.0])}
    moments.begin(x, ["w"])
    m, v, expected = 0.0, tau**2, 0.5
    for number, d in enumerate(updates):
        x = moments.step(x, {"w": np.array([d]), "buffer": np.array([0.25])}, 0.01, number)
        m, v = beta_1 * m + (1 - beta_1) * d, beta_2 * v + (1 - beta_2) * d**2
        expected += 0.01 * m / (v**0.5 + tau)
        assert x["w"].item() == pytest.approx(expected, abs=1e-12)
        assert x["buffer"].item() == 3.0 + 0.25 * (number + 1), "a running variance must not be scaled"
        assert moments.number == number


def test_moments_go_on_from_what_was_published_in_single_precision() -> None:
    start = {name: array.astype(np.float32) for name, array in drawn(1).items()}
    update = {name: array.astype(np.float32) for name, array in drawn(2).items()}
    first, second = (AdamMoments(0.9, 0.99, 1e-3) for _ in range(2))
    for moments in (first, second):
        moments.begin(start, start)
    model = first.step(start, update, 0.01, 0)
    assert {array.dtype for array in (*model.values(), *first.tensors().values())} == {np.dtype(np.float32)}
    second.take({name: array.copy() for name, array in first.tensors().items()}, 0)
    assert same_arrays(first.step(model, update, 0.01, 1), second.step(model, update, 0.01, 1))


# ----------------------------------------------------------------------------------------------- in nnU-Net's training

FEDAVGM = {"name": "fedavgm", "server_momentum": 0.5, "server_lr": 0.8}
FEDADAM = {"name": "fedadam"}


@pytest.fixture
def sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InProcess:
    return InProcess(tmp_path, monkeypatch)


def test_fedavgm_without_momentum_is_federated_averaging(sites: InProcess) -> None:
    plain = sites.train(nnUNetTrainerFedAvg, sites.study(method={"name": "fedavg"}))
    method = {"name": "fedavgm", "server_momentum": 0}
    for site, trainer in sites.train(nnUNetTrainerFedAvgM, sites.study(method=method)).items():
        assert same_training(trainer, plain[site])


def test_fedavgm_moves_on_as_it_moved(sites: InProcess) -> None:
    study = sites.study(method={"name": "fedavgm", "server_momentum": 0.5}, rounds=3)
    trainers = sites.train(nnUNetTrainerFedAvgM, study)
    assert same_arrays(weights(trainers["a"].network), weights(trainers["b"].network))
    means = [sites.rooms.means[key] for key in ("start/model", "round-0000/model", "round-0001/model")]
    plain = sites.train(nnUNetTrainerFedAvg, sites.study(method={"name": "fedavg"}, rounds=3))
    assert same_arrays(sites.rooms.means["round-0000/model"], means[1]), "the first round is federated averaging's"
    for name, averaged in sites.rooms.means["round-0001/model"].items():
        expected = averaged + 0.5 * (means[1][name] - means[0][name])
        np.testing.assert_allclose(means[2][name], expected, atol=1e-6)
    assert not same_training(trainers["a"], plain["a"])


def test_fedadam_steps_along_the_mean_update(sites: InProcess) -> None:
    trainers = sites.train(nnUNetTrainerFedAdam, sites.study(method=FEDADAM))
    assert same_arrays(weights(trainers["a"].network), weights(trainers["b"].network))
    means = sites.rooms.means
    assert not [key for key in means if "/state" in key], "nobody lacked the moments, so none were sent"
    moments, x = AdamMoments(0.9, 0.99, 1e-3), means["start/model"]
    moments.begin(x, x)
    for number in range(2):
        x = moments.step(x, means[f"round-{number:04d}/update"], 0.01, number)
        assert same_arrays(x, means[f"round-{number:04d}/model"])
    moved = [np.abs(array - means["start/model"][name]).max() for name, array in x.items()]
    assert max(moved) > 0


@pytest.mark.parametrize(
    ("trainer", "method", "key"),
    [
        (nnUNetTrainerFedAvgM, FEDAVGM, "model"),
        *((nnUNetTrainerFedAdam, FEDADAM, key) for key in ("update", "moments", "model")),
    ],
)
def test_a_killed_training_goes_on_to_the_same_bits(
    sites: InProcess, trainer: type[Any], method: dict[str, Any], key: str
) -> None:
    study = sites.study(method={**method, "finetune_epochs": 1}, rounds=3)
    calm = sites.train(trainer, study)
    for site, killed in sites.train_killed(trainer, study, f"round-0001/{key}").items():
        assert same_training(killed, calm[site])


# ----------------------------------------------------------------------------------------------- a site that was away


def test_a_late_site_has_the_last_step_from_two_closed_models(sites: InProcess) -> None:
    trained = sites.train(nnUNetTrainerFedAvgM, sites.study(method=FEDAVGM, rounds=2))["a"]
    rooms, last = sites.rooms, trained._last_step
    late = sites.make(nnUNetTrainerFedAvgM, trained.study)["b"]
    late.initialize()
    late.communicator = RememberingCommunicator(rooms, "b")
    for scope in ("round-0001", "round-0000", "start"):
        late.load_shared(rooms.means[f"{scope}/model"])
        late.catch_up(scope)
        if scope == "round-0001":
            assert same_arrays(late._last_step, last)
        elif scope == "round-0000":
            moved = difference(rooms.means["round-0000/model"], rooms.means["start/model"])
            assert same_arrays(late._last_step, moved)
        else:
            assert late._last_step == {}


def test_the_start_is_found_whatever_names_have_gone_since(sites: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first site had gone away before it gave its weights, and its name was taken out of the study afterwards."""
    trained = sites.train(nnUNetTrainerFedAvgM, sites.study(method=FEDAVGM, rounds=2))["a"]
    rooms = sites.rooms
    late = sites.make(nnUNetTrainerFedAvgM, trained.study)["b"]
    late.initialize()
    rooms.means["start-1/model"] = rooms.means.pop("start/model")

    def fetch(seat: RememberingCommunicator, key: str) -> dict[str, Array]:
        if key not in rooms.means:
            raise NoContributionError(key)
        return rooms.means[key]

    monkeypatch.setattr(RememberingCommunicator, "fetch", fetch)
    late.communicator = RememberingCommunicator(rooms, "b")
    late.communicator.sites = ("b",)
    late.load_shared(rooms.means["round-0000/model"])
    late.catch_up("round-0000")
    assert same_arrays(late._last_step, difference(rooms.means["round-0000/model"], rooms.means["start-1/model"]))


def agree(numbers: dict[str, int], absent: str = "", **changes: Any) -> dict[str, Any]:
    """Sites whose moments are after the given rounds agree on the newest; returns them with what they said."""

    class OneGone(LocalCommunicator):
        def mean(self, key: str, tensors: Tensors, weight: float, exact: bool = False) -> dict[str, Array]:
            if self.site == absent:
                weight, tensors = 0.0, {}
            return super().mean(key, tensors, weight, exact)

    federation = LocalFederation(list(numbers))

    def run(seat: LocalCommunicator) -> Any:
        trainer = object.__new__(nnUNetTrainerFedAdam)
        trainer.communicator = OneGone(federation, seat.site)
        moments = trainer.moments = AdamMoments(0.9, 0.99, 1e-3)
        start = {"w": np.zeros(2, np.float32)}
        moments.begin(start, ["w"])
        for number in range(numbers[seat.site] + 1):
            moments.step(start, {"w": np.full(2, 0.1 + changes.get(seat.site, 0), np.float32)}, 0.01, number)
        return trainer._agree_on_moments("round-0009"), moments

    return federation.run(run)


def test_a_site_without_the_newest_moments_takes_them_from_the_first_that_has_them() -> None:
    agreed = agree({"a": -1, "b": 4, "c": 4, "d": 2})
    assert [sources for sources, _ in agreed.values()] == [["b", "c"]] * 4
    for _, moments in agreed.values():
        assert moments.number == 4
        assert same_arrays(moments.tensors(), agreed["c"][1].tensors())


def test_the_next_source_steps_in_and_without_one_it_is_said() -> None:
    assert {moments.number for _, moments in agree({"a": -1, "b": 4, "c": 4}, absent="b").values()} == {4}
    with pytest.raises(NoContributionError, match="have all gone away"):
        agree({"a": -1, "b": 4}, absent="b")


def test_moments_that_should_be_equal_and_are_not_end_the_training() -> None:
    with pytest.raises(DisagreementError, match=r"moments of FedAdam differ after the same rounds \(a: .*, b: "):
        agree({"a": 1, "b": 1}, b=0.5)


def test_fedadam_goes_on_when_nobody_publishes_the_model(sites: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    calm = sites.train(nnUNetTrainerFedAdam, sites.study(method=FEDADAM))

    class Unpublished(RememberingCommunicator):
        def mean(self, key: str, tensors: Tensors, weight: float, exact: bool = False) -> dict[str, Array]:
            result = super().mean(key, tensors, weight, exact)
            if key == "round-0000/model":
                raise NoContributionError(key)
            return result

    monkeypatch.setattr("in_process.RememberingCommunicator", Unpublished)
    for site, trainer in sites.train(nnUNetTrainerFedAdam, sites.study(method=FEDADAM)).items():
        assert same_training(trainer, calm[site])
