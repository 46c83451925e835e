"""The 17 properties of the method's notes (6.8), by their numbers; 1, 3 and 16 of whole trainings are in tests/e2e."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import nn

from nnunet_fed.exchange.communicator import LocalCommunicator, LocalFederation
from nnunet_fed.methods.fedgs import (
    HISTOGRAM_BINS,
    Floats,
    GradientScaler,
    LesionClasses,
    against_plain,
    calibrated_thresholds,
    difficulty,
    histogram_of,
    strength_in_round,
    with_gain,
)
from nnunet_fed.methods.tensors import load_arrays, shared_tensors, to_arrays
from nnunet_fed.study.methods.fedgs_options import FedGS
from nnunet_fed.trainers.nnUNetTrainerFedGS import nnUNetTrainerFedGS

TUMOUR = LesionClasses(("tumour",), (1,))


def per_class(*numbers: float) -> Floats:
    return np.array(numbers, dtype=np.float64)


def factor(target: Any, tau: float, base: float, classes: LesionClasses = TUMOUR, strength: float = 2.0) -> float:
    areas = classes.inverse_areas(target)
    return 1 + strength * float(difficulty(areas, per_class(tau), per_class(base)).mean())


def image(size: int, edge: int) -> torch.Tensor:
    """A square lesion of ``edge`` pixels in the middle of a square image."""
    target = torch.zeros(1, size, size, dtype=torch.int16)
    start = (size - edge) // 2
    target[0, start : start + edge, start : start + edge] = 1
    return target


def network(seed: int = 0) -> nn.Module:
    """Small, with tensors under several names, integer buffers, and a head that gets no gradient."""
    torch.manual_seed(seed)
    return PlainConvUNet(
        1, 3, (4, 8, 8), nn.Conv2d, 3, (1, 2, 2), 1, 2, 1, True, nn.BatchNorm2d, {}, nonlin=nn.ReLU,
        deep_supervision=True,
    )  # fmt: skip


def scaler_of(
    model: nn.Module, accumulate: bool = True, momentum: float = 0.9
) -> tuple[torch.optim.SGD, GradientScaler]:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum, weight_decay=3e-5, nesterov=momentum > 0)
    return optimizer, GradientScaler(optimizer, dict(model.named_parameters()), accumulate)


def train(model: nn.Module, factors: Sequence[float], seed: int = 1, scaled: bool = True) -> GradientScaler:
    """Some steps on random images with the deepest head left out."""
    optimizer, scaler = scaler_of(model, scaled)
    random = torch.Generator().manual_seed(seed)
    for eta in factors:
        scaler.factor = eta
        optimizer.zero_grad()
        output = model(torch.randn(2, 1, 16, 16, generator=random))
        (output[0] ** 2).mean().backward()
        optimizer.step()
    return scaler


def flat(arrays: dict[str, Any]) -> Floats:
    return np.concatenate([np.asarray(array, dtype=np.float64).ravel() for array in arrays.values()])


def parameters_of(model: nn.Module) -> dict[str, Any]:
    return {name: array.copy() for name, array in to_arrays(dict(model.named_parameters())).items()}


# ----------------------------------------------------------------------------------------------------------- difficulty


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        (100, [0, 0.245, 0.618, 0.762, 0.829, 0.911, 0.978, 0.991, 0.998, 1.000]),
        (1000, [0, 0.111, 0.310, 0.417, 0.482, 0.593, 0.762, 0.837, 0.909, 0.992]),
    ],
)
def test_8_the_sources_table(base: float, expected: list[float]) -> None:
    areas = per_class(1, 10, 50, 100, 150, 300, 1000, 2000, 5000, 1e5)[:, None]
    assert difficulty(areas, per_class(1), per_class(base)) == pytest.approx(expected, abs=5e-4)


def test_8_difficulty_at_the_base_below_the_threshold_and_without_lesion() -> None:
    tau, base = per_class(1000), per_class(1000)
    assert difficulty(per_class(1000)[:, None], tau, base)[0] == pytest.approx(0.76159, abs=1e-5)
    assert difficulty(per_class(np.nextafter(1000, 0))[:, None], tau, base)[0] == 0
    assert difficulty(per_class(np.nan)[:, None], tau, base)[0] == 0
    full = torch.ones(1, 1, 8, 8)
    assert factor(full, 1, 10) == 1, "a full patch is the easiest"
    assert factor(image(512, 10)[None], math.inf, 1000) == 1, "1: tau = inf"
    assert factor(image(512, 10)[None], 1000, 1000, strength=0) == 1, "1: lambda = 0"


@given(st.lists(st.floats(1, 1e8), min_size=2, max_size=20), st.floats(1, 1e4), st.floats(1.001, 1e4))
def test_8_difficulty_never_rises_with_the_area(areas: list[float], tau: float, base: float) -> None:
    found = difficulty(np.sort(areas)[:, None], per_class(tau), per_class(base))
    assert (np.diff(found) >= 0).all()
    assert ((found >= 0) & (found <= 1)).all()


@given(st.lists(st.integers(0, 12), min_size=1, max_size=6), st.randoms(), st.floats(0, 5))
def test_9_bounds_duplication_and_order(edges: list[int], shuffle: Any, strength: float) -> None:
    batch = torch.stack([image(16, edge) for edge in edges])
    eta = factor(batch, 2, 10, strength=strength)
    assert 1 <= eta <= 1 + strength
    order = list(range(len(edges)))
    shuffle.shuffle(order)
    assert factor(batch[order], 2, 10, strength=strength) == pytest.approx(eta, rel=1e-12)
    assert factor(torch.cat([batch, batch]), 2, 10, strength=strength) == pytest.approx(eta, rel=1e-12)


@pytest.mark.parametrize(("second", "expected"), [(0, 1.86133), (10, 2.72267), (300, 1.86133)])
def test_10_golden_values(second: int, expected: float) -> None:
    assert factor(torch.stack([image(512, 10), image(512, second)]), 1000, 1000) == pytest.approx(expected, abs=5e-6)


def test_11_ignored_voxels_are_no_part_of_the_patch() -> None:
    ignoring = LesionClasses(("tumour",), (1,), ignore=2)
    target = image(64, 4)[None]
    (whole,) = ignoring.inverse_areas(target)[0]
    target[0, 0, :32][target[0, 0, :32] == 0] = 2
    (half,) = ignoring.inverse_areas(target)[0]
    assert whole == 64 * 64 / 16
    assert half == (64 * 32 + 8) / 16
    assert factor(torch.full((2, 1, 8, 8), 2), 1, 10, ignoring) == 1


def test_12_only_the_full_resolution_matters() -> None:
    full = torch.stack([image(64, 3), image(64, 20)])
    assert factor([full, torch.ones(2, 1, 32, 32)], 10, 10) == factor(full, 10, 10) > 1


@pytest.mark.parametrize("dtype", [torch.bool, torch.int16, torch.uint8, torch.float32])
def test_13_a_region_of_one_label_is_that_label(dtype: torch.dtype) -> None:
    labels = torch.stack([image(64, 3), image(64, 20)])
    labels[:, :, 5:9, :] = 2
    regions = torch.cat([torch.zeros_like(labels, dtype=torch.bool), labels == 1, labels == 2], dim=1).to(dtype)
    as_regions = LesionClasses(("tumour",), (1,), regions=True, ignore=2)
    as_labels = LesionClasses(("tumour",), (1,), ignore=2)
    assert factor(regions, 10, 10, as_regions) == factor(labels, 10, 10, as_labels) > 1


def test_ignored_voxels_are_in_no_region() -> None:
    target = torch.zeros(1, 2, 10, 10)
    target[0, 0, 2:4, 2:4] = 1
    target[0, 1, :3] = 1
    assert LesionClasses(("whole",), (0,), regions=True, ignore=4).inverse_areas(target)[0, 0] == 70 / 2


def test_classes_of_region_based_training_are_the_channels_that_nnunet_gives_them() -> None:
    labels = {"whole": [1, 2], "background": 0, "core": [2], "edge": [1], "ignore": 3}
    dataset_json = {"labels": labels, "regions_class_order": [1, 2, 3]}
    manager = LabelManager(labels, regions_class_order=[1, 2, 3])
    for classes in (None, ("edge", "whole")):
        options = FedGS(name="fedgs", classes=classes)
        trainer = SimpleNamespace(dataset_json=dataset_json, label_manager=manager, options=options)
        found = nnUNetTrainerFedGS._lesion_classes(trainer)
        assert found.names == (classes or ("whole", "core", "edge"))
        for name, channel in zip(found.names, found.indices, strict=True):
            assert manager.foreground_regions[channel] == tuple(labels[name])
        assert (found.regions, found.ignore) == (True, 3)


def test_a_class_cut_by_the_patch_is_not_small_in_3d() -> None:
    target = torch.zeros(1, 1, 8, 8, 8)
    target[0, 0, 3, 3, 3] = 1
    assert factor(target, 2, 10) > 1
    for axis in range(3):
        for end in (0, 7):
            cut = target.clone()
            place = [3, 3, 3]
            place[axis] = end
            cut[(0, 0, *place)] = 1
            assert factor(cut, 2, 10) == 1
            assert factor(cut, 2, 10, LesionClasses(("tumour",), (1,), truncation_guard=False)) > 1
    flat_target = torch.zeros(1, 1, 8, 8)
    flat_target[0, 0, 0, 0] = 1
    assert factor(flat_target, 2, 10) > 1, "a slice is no crop"


def test_the_mean_is_over_the_classes_that_are_present() -> None:
    classes = LesionClasses(("organ", "lesion"), (1, 2))
    target = torch.zeros(2, 1, 64, 64)
    target[:, 0, 8:40, 8:40] = 1
    target[0, 0, 20, 20] = 2
    tau = base = per_class(100, 100)
    found = difficulty(classes.inverse_areas(target), tau, base)
    alone = difficulty(per_class(64 * 64)[:, None], tau[:1], base[:1])[0]
    assert found.tolist() == [alone / 2, 0]


# ----------------------------------------------------------------------------------------------------- what is uploaded


def test_4_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = GradientScaler(optimizer, {"w": weight}, accumulate=True)
    for gradient, eta in ((0.10, 1.0), (-0.04, 2.5)):
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        scaler.factor = eta
        optimizer.step()
    assert weight.item() == pytest.approx(0.94)
    assert scaler.surrogate({"w": weight})["w"].item() == pytest.approx(1.00, abs=1e-7)
    assert (scaler.steps, scaler.scaled_share, scaler.mean_factor) == (2, 0.5, 1.75)


@given(st.lists(st.floats(1, 3), min_size=1, max_size=4))
def test_5_r_is_linear_in_the_excess(factors: list[float]) -> None:
    def residual(excess: float) -> Floats:
        model = nn.Linear(3, 2).double()
        nn.init.constant_(model.weight, 0.5)
        nn.init.zeros_(model.bias)
        optimizer, scaler = scaler_of(model)
        for eta in factors:
            scaler.factor = 1 + excess * (eta - 1)
            optimizer.zero_grad()
            (model(torch.ones(1, 3, dtype=torch.float64)) ** 2).sum().backward()
            optimizer.step()
        tensors = dict(model.named_parameters())
        return flat({name: new - tensors[name].detach() for name, new in scaler.surrogate(tensors).items()})

    assert residual(2) == pytest.approx(2 * residual(1), rel=1e-5, abs=1e-6)


def test_1_and_3_a_factor_of_one_uploads_the_local_state_and_no_factor_is_felt_locally() -> None:
    plain, unscaled, scaled = network(), network(), network()
    start = parameters_of(plain)
    train(plain, [1, 1, 1], scaled=False)
    never = train(unscaled, [1, 1, 1])
    often = train(scaled, [1, 2.5, 1.7])
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, unscaled.state_dict()[name])
        assert torch.equal(tensor, scaled.state_dict()[name])
    uploaded = never.surrogate(shared_tensors(unscaled))
    assert all(torch.equal(uploaded[name], tensor) for name, tensor in shared_tensors(plain).items())
    moved = to_arrays(often.surrogate(dict(scaled.named_parameters())))
    assert any((moved[name] != array).any() for name, array in parameters_of(plain).items())
    assert any((array != parameters_of(plain)[name]).any() for name, array in start.items())


def federated(models: Sequence[nn.Module], factors: Sequence[Sequence[float]], weights: Sequence[float]) -> nn.Module:
    """One round of sites that start alike; returns the network after it."""
    sites = dict(zip("abcd", zip(models, factors, weights, strict=True), strict=False))

    def run(communicator: LocalCommunicator) -> Any:
        model, etas, weight = sites[communicator.site]
        scaler = train(model, etas, seed=ord(communicator.site))
        mean = communicator.mean("round-0000/model", to_arrays(scaler.surrogate(shared_tensors(model))), weight)
        load_arrays(shared_tensors(model), mean)
        return model

    return next(iter(LocalFederation(list(sites)).run(run).values()))


def test_2_a_constant_factor_is_a_longer_step_of_federated_averaging() -> None:
    start = flat(parameters_of(network()))
    plain = flat(parameters_of(federated([network(), network()], [[1] * 5] * 2, [1, 3])))
    longer = flat(parameters_of(federated([network(), network()], [[1.8] * 5] * 2, [1, 3])))
    assert np.linalg.norm((longer - start) - 1.8 * (plain - start)) < 1e-5 * np.linalg.norm(longer - start)


def test_6_the_mean_moves_to_the_site_with_small_lesions() -> None:
    def mean(eta: float) -> float:
        weights = []
        for gradient, factor in ((1.0, eta), (-1.0, 1.0)):
            weight = nn.Parameter(torch.tensor([0.0]))
            optimizer = torch.optim.SGD([weight], lr=0.5)
            scaler = GradientScaler(optimizer, {"w": weight}, accumulate=True)
            weight.grad, scaler.factor = torch.tensor([gradient]), factor
            optimizer.step()
            weights.append(scaler.surrogate({"w": weight})["w"].item())
        return sum(weights) / 2

    assert mean(1.0) == 0
    assert mean(2.0) == pytest.approx(-0.25)


def test_7_the_order_of_sites_is_irrelevant_and_one_site_gets_its_own_surrogate() -> None:
    etas = [[1, 2, 1.5], [2.5, 1, 1]]
    straight = federated([network(), network()], etas, [2, 1])
    model = network()
    scaler = train(model, etas[0], seed=ord("a"))
    own = {name: tensor.clone() for name, tensor in scaler.surrogate(shared_tensors(model)).items()}
    alone = federated([network()], etas[:1], [7])
    for name, tensor in shared_tensors(alone).items():
        assert torch.equal(tensor, own[name])

    other = network()
    second = train(other, etas[1], seed=ord("b")).surrogate(shared_tensors(other))
    for name, tensor in shared_tensors(straight).items():
        expected = (second[name].double() + 2 * own[name].double()) / 3
        assert torch.allclose(tensor.double(), expected, atol=1e-7)


def test_14_a_skipped_step_and_parameters_without_gradient_add_nothing() -> None:
    model = network()
    start = parameters_of(model)
    optimizer, scaler = scaler_of(model)
    amp = torch.amp.GradScaler("cpu")
    for step in range(3):
        scaler.factor = 2.0
        optimizer.zero_grad()
        loss = (model(torch.ones(1, 1, 16, 16))[0] ** 2).mean()
        amp.scale(loss).backward()
        if step == 1:
            next(tensor for tensor in model.parameters() if tensor.grad is not None).grad.fill_(math.inf)
        amp.step(optimizer)
        amp.update()
    assert scaler.steps == 2
    uploaded = to_arrays(scaler.surrogate(dict(model.named_parameters())))
    without = [name for name, tensor in model.named_parameters() if tensor.grad is None]
    assert without
    for name in without:
        assert (uploaded[name] == start[name]).all()


def test_15_every_name_of_a_tensor_agrees_and_buffers_are_left_alone() -> None:
    model = network()
    scaler = train(model, [2, 2])
    state = model.state_dict(keep_vars=True)
    uploaded = scaler.surrogate(state)
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    assert max(map(len, names.values())) > 1
    for aliases in names.values():
        assert all(torch.equal(uploaded[alias], uploaded[aliases[0]]) for alias in aliases)
    parameters = {id(tensor) for tensor in model.parameters()}
    for name, tensor in state.items():
        assert uploaded[name].dtype == tensor.dtype
        assert id(tensor) in parameters or torch.equal(uploaded[name], tensor)
    assert any(not tensor.is_floating_point() for tensor in uploaded.values())


def test_memory_is_two_sets_of_the_parameters_from_the_first_scaled_step_on() -> None:
    def held(scaler: GradientScaler) -> int:
        dictionaries = [value for value in vars(scaler).values() if isinstance(value, dict) and value]
        tensors = {id(tensor): tensor for entry in dictionaries for tensor in entry.values()}
        own = {id(tensor) for tensor in scaler.parameters.values()}
        return sum(tensor.numel() for number, tensor in tensors.items() if number not in own)

    model = network()
    assert held(train(model, [1, 1, 1])) == 0
    assert held(train(model, [1, 2, 2])) == 2 * sum(tensor.numel() for tensor in model.parameters())


def test_16_r_begins_at_zero_and_goes_on_where_it_stopped() -> None:
    model = network()
    scaler = train(model, [2, 1.5])
    state = copy.deepcopy(scaler.state_dict())
    uploaded = scaler.surrogate(shared_tensors(model))
    _, resumed = scaler_of(model)
    resumed.load_state_dict(state)
    assert all(torch.equal(tensor, uploaded[name]) for name, tensor in resumed.surrogate(shared_tensors(model)).items())
    assert (resumed.steps, resumed.mean_factor) == (2, 1.75)
    resumed.restart()
    assert (resumed.steps, resumed.mean_factor, resumed.scaled_share) == (0, 1.0, 0.0)
    assert all(
        torch.equal(t, shared_tensors(model)[name]) for name, t in resumed.surrogate(shared_tensors(model)).items()
    )


# --------------------------------------------------------------------------------------------- diagnostics and controls


@given(st.floats(0.5, 3), st.integers(0, 2**31))
def test_17_a_plain_update_of_another_length_has_no_residual(gain: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    start = {name: random.normal(size=20).astype(np.float32) for name in "ab"}
    trained = {name: array + random.normal(size=20).astype(np.float32) for name, array in start.items()}
    scalar, residual = against_plain(start, trained, with_gain(start, trained, gain))
    assert scalar == pytest.approx(gain, rel=1e-5)
    assert residual == pytest.approx(0, abs=1e-5)


def test_17_what_is_not_along_the_plain_update_is_the_residual() -> None:
    start, trained = {"w": np.zeros(2, np.float32)}, {"w": np.array([2, 0], np.float32)}
    assert against_plain(start, trained, {"w": np.array([3, 1], np.float32)}) == (1.5, 0.5)
    assert against_plain(start, start, start) == (1.0, 0.0), "finite without any step"


def test_a_gain_of_one_changes_no_bit_and_buffers_are_never_moved_on() -> None:
    model = network()
    start = parameters_of(model)
    train(model, [1, 1])
    trained = to_arrays(shared_tensors(model))
    same, longer = with_gain(start, trained, 1.0), with_gain(start, trained, 2.0)
    assert all((same[name] == array).all() and same[name].dtype == array.dtype for name, array in trained.items())
    buffers = trained.keys() - start.keys()
    assert buffers
    assert all((longer[name] == trained[name]).all() for name in buffers)
    assert flat({name: longer[name] for name in start}) == pytest.approx(
        2 * flat({name: trained[name] for name in start}) - flat(start), abs=1e-6
    )


def test_the_normaliser_divides_what_is_accumulated_but_not_what_is_counted() -> None:
    halved, plain = network(), network()
    optimizer, scaler = scaler_of(halved)
    scaler.normaliser = 2.0
    for model, opt in ((halved, optimizer), (plain, scaler_of(plain)[0])):
        (model(torch.ones(1, 1, 16, 16))[0] ** 2).mean().backward()
        scaler.factor = 2.0 if model is halved else 1.0
        opt.step()
    assert scaler.mean_factor == 2.0
    for name, tensor in scaler.surrogate(shared_tensors(halved)).items():
        assert torch.equal(tensor, shared_tensors(plain)[name]), "factor and normaliser cancel"


# ----------------------------------------------------------------------------------------------- calibration, warm-down


@given(st.lists(st.lists(st.floats(1, 1e8), max_size=30), min_size=1, max_size=4))
def test_thresholds_are_those_of_the_pooled_patches(sites: list[list[float]]) -> None:
    columns = [np.array(site, dtype=np.float64)[:, None] for site in sites]
    summed = sum((histogram_of(column) for column in columns), np.zeros((1, HISTOGRAM_BINS), np.int64))
    pooled = np.concatenate(columns)
    assert (summed == histogram_of(pooled)).all()
    (tau,) = calibrated_thresholds(summed)
    if not len(pooled):
        assert tau == math.inf
        return
    assert tau > 1
    bin_width = 10**0.1
    assert np.mean(pooled <= tau * bin_width) >= 0.8 - 1e-9
    assert np.mean(pooled < tau / bin_width) <= 0.8 + 1e-9


def test_absent_and_truncated_classes_are_not_calibrated_on() -> None:
    areas = np.array([[np.nan, 0.0], [np.nan, 100.0]])
    histogram = histogram_of(areas)
    assert histogram.sum(axis=1).tolist() == [0, 1]
    tau = calibrated_thresholds(histogram)
    assert tau[0] == math.inf
    assert 100 <= tau[1] < 100 * 10**0.1
    tau[1] = 100
    assert difficulty(areas, tau, tau).tolist() == [0, math.tanh(1)], "an infinite threshold disturbs nothing"


def test_the_strength_falls_over_the_last_rounds() -> None:
    assert [strength_in_round(2, 0.0, number, 5) for number in range(5)] == [2] * 5
    assert [strength_in_round(2, 0.4, number, 10) for number in range(10)] == [2] * 6 + [1.5, 1, 0.5, 0]
    assert strength_in_round(2, 0.1, 9, 10) == 0
