"""SoftPull and the super model's rule. T numbers in the names of tests are the method notes'."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_fed.errors import ConfigurationError, DisagreementError
from nnunet_fed.exchange.communicator import Array, LocalFederation
from nnunet_fed.methods.fedsm import (
    GLOBAL,
    Pulled,
    PullSchedule,
    Route,
    best_model_gate,
    contraction,
    deviation,
    pull_round,
    route,
    scheduled_pull,
    softpull,
)
from nnunet_fed.methods.tensors import to_arrays

SEEDS = st.integers(0, 2**31)


def names(count: int) -> list[str]:
    return [f"site{number:02d}" for number in range(count)]


@st.composite
def pulls(draw: st.DrawFn) -> tuple[int, float]:
    """A number of sites, and a self-weight that suits it, its ends included."""
    sites = draw(st.integers(2, 9))
    self_weight = draw(st.floats(1 / sites, 1) | st.sampled_from([1 / sites, 1.0]))
    return sites, self_weight


def random_models(sites: int, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        site: {
            "conv": torch.randn(3, 2, generator=generator).to(dtype),
            "bias": torch.randn(2, generator=generator).to(dtype),
            "seen": torch.tensor(number),
        }
        for number, site in enumerate(names(sites))
    }


def pulled(
    models: dict[str, dict[str, torch.Tensor]],
    self_weight: float,
    schedule: PullSchedule = "constant",
    lr_ratio: float = 1.0,
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Pulled]]:
    """The models after one federated round, and what each site says of it."""
    after = {site: {name: tensor.clone() for name, tensor in model.items()} for site, model in models.items()}
    federation = LocalFederation(list(models), deadline=10)
    told = federation.run(lambda seat: pull_round(seat, "r", after[seat.site], schedule, self_weight, lr_ratio))
    return after, told


def stacked(models: dict[str, dict[str, torch.Tensor]]) -> Array:
    """All floating-point numbers, float64 of shape (sites, numbers)."""
    return np.array([torch.cat([m["conv"].ravel(), m["bias"]]).double().numpy() for m in models.values()])


def dense(sites: int, self_weight: float) -> Array:
    """The published rule as a matrix."""
    matrix = np.full((sites, sites), (1 - self_weight) / (sites - 1))
    np.fill_diagonal(matrix, self_weight)
    return matrix


# ------------------------------------------------------------------------------------------------------------- SoftPull


@given(pulls())
def test_t1_the_pull_is_doubly_stochastic_with_eigenvalues_one_and_rho(case: tuple[int, float]) -> None:
    sites, self_weight = case
    rho = contraction(self_weight, sites)
    matrix = rho * np.eye(sites) + (1 - rho) / sites
    np.testing.assert_allclose(matrix, dense(sites, self_weight), atol=1e-12)
    np.testing.assert_allclose([matrix.sum(0), matrix.sum(1)], 1, atol=1e-12)
    np.testing.assert_allclose(np.linalg.eigvalsh(matrix), [rho] * (sites - 1) + [1], atol=1e-12)


@given(st.integers(1, 9), SEEDS, st.sampled_from(["constant", "lr_coupled"]))
@settings(max_examples=20, deadline=None)
def test_t2_self_weight_one_changes_no_bit(sites: int, seed: int, schedule: PullSchedule) -> None:
    models = random_models(sites, seed)
    for model in models.values():
        model["bias"][0] = -0.0
    after, told = pulled(models, 1.0, schedule, lr_ratio=0.3)
    for site, model in models.items():
        assert [t.numpy().tobytes() for t in after[site].values()] == [t.numpy().tobytes() for t in model.values()]
        assert (told[site].rho, told[site].self_weight) == (1, 1)


def local_step(model: dict[str, torch.Tensor], site: str) -> None:
    """A step towards an optimum of this site's own."""
    for name in ("conv", "bias"):
        model[name] -= 0.1 * (model[name] - len(name) - int(site[-2:]))


def test_t2_rounds_without_pull_are_isolated_training() -> None:
    models, alone = random_models(3, 0), random_models(3, 0)
    for _ in range(5):
        for site in models:
            local_step(models[site], site)
            local_step(alone[site], site)
        models, _ = pulled(models, 1.0)
    assert all(torch.equal(models[site][name], alone[site][name]) for site in models for name in models[site])


def test_t3_self_weight_one_over_k_is_federated_averaging_with_equal_weights() -> None:
    models = {site: {"conv": torch.ones(3, 2), "bias": torch.ones(2)} for site in names(3)}
    averaged = {name: torch.ones_like(tensor) for name, tensor in models["site00"].items()}
    for _ in range(4):
        for site, model in models.items():
            local_step(model, site)
        models, told = pulled(models, 1 / 3)

        def fedavg_round(seat: Any) -> dict[str, Array]:
            copy = {name: tensor.clone() for name, tensor in averaged.items()}  # noqa: B023 (called at once)
            local_step(copy, seat.site)
            answer: dict[str, Array] = seat.mean("r/model", to_arrays(copy), 1)
            return answer

        answers = LocalFederation(names(3)).run(fedavg_round)
        averaged = {name: torch.from_numpy(array) for name, array in answers["site00"].items()}
        for model in models.values():
            assert all(torch.equal(model[name], averaged[name]) for name in averaged)
    assert {(said.rho, said.deviation) for said in told.values()} == {(0, 0)}


@given(pulls(), SEEDS)
@settings(max_examples=40, deadline=None)
def test_t4_t5_t7_the_mean_stays_and_deviations_shrink_by_rho(case: tuple[int, float], seed: int) -> None:
    sites, self_weight = case
    models = random_models(sites, seed)
    after, told = pulled(models, self_weight)
    before, now, rho = stacked(models), stacked(after), contraction(self_weight, sites)
    np.testing.assert_allclose(now, dense(sites, self_weight) @ before, atol=2e-6)  # T7
    np.testing.assert_allclose(now.sum(0), before.sum(0), atol=1e-5)  # T4
    np.testing.assert_allclose(now - now.mean(0), rho * (before - before.mean(0)), atol=2e-6)  # T5
    for one, other in itertools.combinations(range(sites), 2):
        distance = np.linalg.norm(before[one] - before[other])
        np.testing.assert_allclose(np.linalg.norm(now[one] - now[other]), rho * distance, atol=1e-5)
    mean = now.mean(0)
    expected = math.sqrt(np.sum((now - mean) ** 2) / (sites * np.sum(mean**2)))
    for said in told.values():
        assert said.deviation == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert (said.rho, said.sites) == (rho, sites)


@given(pulls(), SEEDS)
@settings(max_examples=20, deadline=None)
def test_t6_equal_models_stay_bit_for_bit(case: tuple[int, float], seed: int) -> None:
    sites, self_weight = case
    model = random_models(1, seed)["site00"]
    after, _ = pulled(dict.fromkeys(names(sites), model), self_weight)
    assert all(torch.equal(moved[name], model[name]) for moved in after.values() for name in model)


def test_t6_it_does_not_matter_which_site_has_which_model() -> None:
    models = random_models(4, 3, torch.float64)
    order = ["site02", "site00", "site03", "site01"]
    swapped, _ = pulled({site: models[other] for site, other in zip(names(4), order, strict=True)}, 0.6)
    after, _ = pulled(models, 0.6)
    for site, other in zip(names(4), order, strict=True):
        torch.testing.assert_close(swapped[site]["conv"], after[other]["conv"], rtol=0, atol=1e-14)


SITES, ETA, SELF_WEIGHT = 6, 0.1, 0.7


def optima(seed: int = 0) -> Array:
    """Of the sites' quadratic losses |w - optimum|^2 / 2."""
    return np.random.default_rng(seed).normal(size=(SITES, 50))


def apart(models: Array) -> float:
    return float(np.linalg.norm(models - models.mean(0)))


def pull_quadratics(models: Array, rho: float) -> Array:
    mean = {"w": models.mean(0)}
    tensors = torch.from_numpy(models.copy())
    for tensor in tensors:
        softpull({"w": tensor}, mean, rho)
    return tensors.numpy()


def test_t8_pulling_weights_personalizes_and_pulling_differences_would_not_pull() -> None:
    rho, targets = contraction(SELF_WEIGHT, SITES), optima()
    weights, of_differences = np.zeros_like(targets), np.zeros_like(targets)
    for _ in range(500):
        weights = pull_quadratics(weights - ETA * (weights - targets), rho)
        of_differences = of_differences + pull_quadratics(-ETA * (of_differences - targets), rho)
    assert apart(weights) / apart(targets) == pytest.approx(ETA * rho / (1 - rho * (1 - ETA)), rel=1e-6)
    assert apart(weights) / apart(targets) == pytest.approx(0.151, abs=5e-4)
    assert apart(of_differences) / apart(targets) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("self_weight", [0.0, 0.7, 1.0])
def test_t9_one_site_stays_as_it_is(self_weight: float) -> None:
    models = random_models(1, 0)
    after, told = pulled(models, self_weight, "lr_coupled", lr_ratio=0.5)
    assert all(torch.equal(after["site00"][name], tensor) for name, tensor in models["site00"].items())
    assert told["site00"] == Pulled(1.0, 1.0, 1, 0.0)


@pytest.mark.parametrize(
    ("self_weight", "sites"), [(0.3, 3), (0.1, 6), (1.1, 3), (-0.1, 1), (math.nan, 3), (0.7, 0), (0.49999, 2)]
)
def test_t9_self_weights_that_do_not_suit_the_number_of_sites(self_weight: float, sites: int) -> None:
    with pytest.raises(ConfigurationError, match="softpull_self_weight|at least one site"):
        contraction(self_weight, sites)


@given(st.integers(2, 200))
def test_t9_the_ends_of_the_domain_are_inside(sites: int) -> None:
    assert contraction(1 / sites, sites) == pytest.approx(0, abs=1e-12)
    assert contraction(1 / sites, sites) >= 0
    assert contraction(1, sites) == 1


def test_t10_only_the_sites_of_the_round_are_pulled() -> None:
    models = random_models(4, 1)
    present = {site: models[site] for site in ("site00", "site02", "site03")}
    after, told = pulled(present, 0.7)
    assert {said.sites for said in told.values()} == {3}
    assert told["site00"].rho == pytest.approx((0.7 * 3 - 1) / 2)
    np.testing.assert_allclose(stacked(after).sum(0), stacked(present).sum(0), atol=1e-5)


def test_t10_the_self_weight_is_checked_against_the_sites_of_the_round() -> None:
    pulled(random_models(4, 1), 0.3)
    with pytest.raises(ConfigurationError, match=r"0\.3, but with 3 sites in the round .* 1/3 = 0\.3333"):
        pulled(random_models(3, 1), 0.3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_t11_dtypes_stay_and_whole_numbers_stay_untouched(dtype: torch.dtype) -> None:
    models = random_models(3, 2, dtype)
    after, _ = pulled(models, 0.5)
    for site, model in after.items():
        assert model["conv"].dtype == dtype
        assert torch.equal(model["seen"], models[site]["seen"])
        assert not torch.equal(model["conv"], models[site]["conv"])


@pytest.mark.parametrize(
    "mean", [{}, {"w": np.zeros(3), "v": np.zeros(1)}, {"v": np.zeros(3)}, {"w": np.zeros((3, 1))}]
)
@pytest.mark.parametrize("rho", [0.5, 1.0])
def test_t11_other_tensors_are_refused_before_any_is_changed(mean: dict[str, Array], rho: float) -> None:
    own = {"w": torch.ones(3)}
    with pytest.raises(DisagreementError, match="mean"):
        softpull(own, mean, rho)
    assert torch.equal(own["w"], torch.ones(3))


def test_networks_are_pulled_in_place_under_their_optimizer() -> None:
    layer = torch.nn.Linear(2, 1)
    weight = layer.weight
    softpull(dict(layer.named_parameters()), {"weight": np.zeros((1, 2), np.float32), "bias": np.zeros(1)}, 0.0)
    assert layer.weight is weight
    assert not weight.any()
    assert weight.requires_grad


def test_the_deviation_of_models_around_zero_is_a_number() -> None:
    zeros = {"w": torch.zeros(2)}
    answers = LocalFederation("ab").run(lambda seat: deviation(seat, "r/d", zeros, {"w": np.zeros(2, np.float32)}))
    assert set(answers.values()) == {0.0}


# ------------------------------------------------------------------------------------------------------------- schedule


@given(pulls(), st.floats(1e-4, 1))
def test_t18_the_coupled_pull_keeps_its_strength_relative_to_the_step(case: tuple[int, float], ratio: float) -> None:
    sites, self_weight = case
    start = scheduled_pull("lr_coupled", self_weight, sites, 1.0)
    later = scheduled_pull("lr_coupled", self_weight, sites, ratio)
    assert start.self_weight == pytest.approx(self_weight)
    assert scheduled_pull("constant", self_weight, sites, ratio) == scheduled_pull("constant", self_weight, sites, 1)
    assert contraction(min(1.0, max(1 / sites, later.self_weight)), sites) == pytest.approx(later.rho, abs=1e-9)
    if start.rho > 1e-3:
        strength = (1 - start.rho) / start.rho
        assert (1 - later.rho) / (later.rho * ratio) == pytest.approx(strength, rel=1e-6, abs=1e-9)
    else:
        assert later.rho >= start.rho
    assert scheduled_pull("lr_coupled", self_weight, sites, 0.0).rho == (0 if start.rho == 0 else 1)


@pytest.mark.parametrize("ratio", [-0.1, math.nan, math.inf])
def test_ratios_that_are_none(ratio: float) -> None:
    with pytest.raises(ConfigurationError, match="ratio of learning rates"):
        scheduled_pull("lr_coupled", 0.7, 3, ratio)


@pytest.mark.parametrize(("schedule", "low", "high"), [("constant", 0.0, 0.01), ("lr_coupled", 0.14, 0.16)])
def test_t18_a_decaying_learning_rate_ends_personalization_unless_the_pull_follows(
    schedule: PullSchedule, low: float, high: float
) -> None:
    targets, rounds = optima(), 1000
    models = np.zeros_like(targets)
    for number in range(rounds):
        ratio = (1 - number / rounds) ** 0.9
        models = pull_quadratics(
            models - ETA * ratio * (models - targets), scheduled_pull(schedule, SELF_WEIGHT, SITES, ratio).rho
        )
    assert low < apart(models) / apart(targets) < high


# ------------------------------------------------------------------------------------------------------------- the rule

PROBABILITIES = st.lists(st.floats(-30, 30), min_size=1, max_size=6).map(
    lambda logits: dict(zip("abcdef", torch.softmax(torch.tensor(logits).double(), 0).tolist(), strict=False))
)


@given(PROBABILITIES)
def test_t15_gamma_one_is_always_global_and_gamma_zero_never(probabilities: dict[str, float]) -> None:
    assert route(probabilities, 1.0) == Route(GLOBAL, "below_gamma")
    likeliest = max(probabilities, key=lambda site: probabilities[site])
    assert route(probabilities, 0.0) == Route(likeliest, "personal")


@given(PROBABILITIES, st.floats(0, 1))
def test_t15_strictly_above_gamma(probabilities: dict[str, float], gamma: float) -> None:
    top = max(probabilities.values())
    assert (route(probabilities, gamma).choice == GLOBAL) == (top <= gamma)
    assert route(probabilities, top).choice == GLOBAL


@pytest.mark.parametrize("gamma", [-0.1, 1.1, math.nan])
def test_thresholds_that_are_none(gamma: float) -> None:
    with pytest.raises(ConfigurationError, match="gamma is .* between 0"):
        route({"a": 1.0}, gamma)


def test_what_else_sends_a_case_to_the_global_model() -> None:
    sure = {"a": 0.96, "b": 0.04}
    assert route(sure, 0.9, trusted=False) == Route(GLOBAL, "gate")
    assert route(sure, 0.9, global_instead=("a",)) == Route(GLOBAL, "best_model_gate")
    assert route(sure, 0.9, available=("b",)) == Route(GLOBAL, "not_shared")
    assert route(sure, 0.9, global_instead=("b",), available=("a",)) == Route("a", "personal")
    assert route(sure, 0.97, global_instead=("a",), available=()) == Route(GLOBAL, "below_gamma")


def test_sites_whose_own_model_is_not_better_are_served_by_the_global_one() -> None:
    personal = {"a": 0.8, "b": 0.7, "c": 0.6, "d": math.nan}
    assert best_model_gate(personal, {"a": 0.7, "b": 0.7, "c": 0.9, "d": 0.5}) == {"b", "c", "d"}
    with pytest.raises(DisagreementError, match="not of the same sites: a and b"):
        best_model_gate({"a": 1.0}, {"b": 1.0})
