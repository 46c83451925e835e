"""The perturbed boundary loss: invariants 17 to 21 of FedOAP's notes (5), by their numbers, on nnU-Net's own losses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import IGNORED, IGNORES, MODES, Counting, base_loss, batch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import nn

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.methods.perturbed_boundary import PerturbedBoundaryLoss, with_perturbed_boundary

TAUS = st.floats(0.01, 0.99)


def perturbed(softmax: bool, ignore: int | None = None, **options: Any) -> PerturbedBoundaryLoss:
    return PerturbedBoundaryLoss(base_loss(softmax, ignore), softmax=softmax, ignore_label=ignore, **options)


def binary_batch(seed: int, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn((2, 2, 40, 40), generator=random)
    return logits, torch.randint(2, (2, 1, 40, 40), generator=random)


# ---------------------------------------------------------------------------------------------------------------- value


@MODES
@IGNORES
@pytest.mark.parametrize("dimensions", [2, 3])
def test_17_weight_zero_or_no_gradient_is_the_base_loss_bit_for_bit_at_its_cost(
    softmax: bool, ignore: int | None, dimensions: int
) -> None:
    logits, target = batch(softmax, ignore, dimensions)
    expected = base_loss(softmax, ignore)(logits, target)
    (gradient,) = torch.autograd.grad(expected, logits)
    counting = Counting(base_loss(softmax, ignore))
    loss = PerturbedBoundaryLoss(counting, weight=0.0, softmax=softmax, ignore_label=ignore)
    value = loss(logits, target)
    assert torch.equal(value, expected)
    assert torch.equal(torch.autograd.grad(value, logits)[0], gradient)
    loss.weight = 0.5
    with torch.no_grad():
        assert torch.equal(loss(logits, target), expected)
    with torch.inference_mode():
        assert torch.equal(loss(logits, target), expected)
    assert len(counting.seen) == 3
    assert not torch.equal(loss(logits, target), expected), "the weight may change at any time"
    assert len(counting.seen) == 5


@MODES
def test_17_and_e15_the_value_is_the_convex_sum_and_its_gradient_goes_through_both(softmax: bool) -> None:
    logits, target = batch(softmax)
    base, loss = base_loss(softmax), perturbed(softmax, weight=0.3, sigma=2.0)
    loss.reseed(1)
    noise = (loss.perturb(logits, target) - logits).detach()
    loss.reseed(1)
    value = loss(logits, target)
    expected = 0.7 * base(logits, target) + 0.3 * base(logits + noise, target)
    assert torch.equal(value, expected)
    assert torch.allclose(torch.autograd.grad(value, logits)[0], torch.autograd.grad(expected, logits)[0], atol=1e-8)


@MODES
@IGNORES
def test_18_without_a_clearly_wrong_voxel_it_is_the_base_loss(softmax: bool, ignore: int | None) -> None:
    logits, target = batch(softmax, ignore, scale=0.05)  # no error above 0.75 with such small logits
    loss = perturbed(softmax, ignore, sigma=10.0)
    assert not loss.selection(logits, target).any()
    assert torch.allclose(loss(logits, target), base_loss(softmax, ignore)(logits, target), rtol=1e-6)


# ------------------------------------------------------------------------------------------------------------ selection


@settings(deadline=None)
@given(TAUS, st.integers(0, 2**31))
def test_19_two_classes_are_selected_as_one_region_that_is_on_the_wrong_side(tau: float, seed: int) -> None:
    logits, labels = binary_batch(seed)
    difference = logits[:, 1:] - logits[:, :1]
    by_labels = perturbed(True, tau=tau).selection(logits, labels)
    by_region = perturbed(False, tau=tau).selection(difference, labels)
    margin = torch.where(labels == 1, -difference, difference)
    wrong = margin > math.log(tau / (1 - tau))
    clear = (margin - math.log(tau / (1 - tau))).abs() > 1e-4  # rounding decides nearer to the threshold
    assert by_labels.shape == by_region.shape == labels.shape
    assert torch.equal(by_labels[clear], wrong[clear])
    assert torch.equal(by_region[clear], wrong[clear])


def test_19_the_published_threshold_is_the_logarithm_of_three() -> None:
    difference = torch.tensor([math.log(3) - 1e-4, math.log(3) + 1e-4, 9.0, -9.0]).view(1, 1, 1, 4)
    for label, sign in ((0, 1), (1, -1)):
        target = torch.full((1, 1, 1, 4), label)
        found = perturbed(False).selection(sign * difference, target)
        assert found.flatten().tolist() == [False, True, True, False]


@MODES
@settings(deadline=None)
@given(tau=TAUS, seed=st.integers(0, 2**31))
def test_19_the_error_is_one_minus_the_probability_of_the_truth(softmax: bool, tau: float, seed: int) -> None:
    logits, target = batch(softmax, seed=seed)
    error = 1 - logits.softmax(1).gather(1, target.long()) if softmax else (logits.sigmoid() - target.float()).abs()
    clear = (error - tau).abs() > 1e-5
    found = perturbed(softmax, tau=tau).selection(logits, target)
    assert found.shape == error.shape
    assert torch.equal(found[clear], (error > tau)[clear])


@MODES
def test_20_a_tau_of_one_or_more_never_selects(softmax: bool) -> None:
    logits, target = batch(softmax, scale=1e4)
    assert perturbed(softmax, tau=0.999).selection(logits, target).any()
    assert not perturbed(softmax, tau=1.0).selection(logits, target).any()
    assert not perturbed(softmax, tau=7.0).selection(logits, target).any()


@IGNORES
@pytest.mark.parametrize("dtype", [torch.int16, torch.int64, torch.float32])
def test_21_ignored_voxels_are_never_selected(ignore: int | None, dtype: torch.dtype) -> None:
    logits, target = batch(True, ignore)
    target = target.to(dtype)
    found = perturbed(True, ignore, tau=0.0).selection(logits, target)
    assert torch.equal(found, target != IGNORED), "with tau 0 all others are"
    logits, target = batch(False, ignore)
    found = perturbed(False, ignore, tau=0.0).selection(logits, target.to(dtype))
    assert found.shape == logits.shape
    expected = torch.ones_like(found) if ignore is None else ~target[:, -1:].expand_as(found)
    assert torch.equal(found, expected)


@MODES
def test_21_logits_of_ignored_voxels_are_not_felt(softmax: bool) -> None:
    logits, target = batch(softmax, IGNORED)
    ignored = target == IGNORED if softmax else target[:, -1:]
    other = torch.where(ignored, logits + 50 * torch.randn_like(logits), logits)
    loss = perturbed(softmax, IGNORED, sigma=3.0, weight=0.5)
    loss.reseed(0)
    expected = loss(logits, target)
    loss.reseed(0)
    assert torch.allclose(loss(other, target), expected, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- noise


@MODES
def test_20_nothing_but_the_selected_is_touched(softmax: bool) -> None:
    logits, target = batch(softmax)
    loss = perturbed(softmax, sigma=1.0)
    mask, moved = loss.selection(logits, target), loss.perturb(logits, target) != logits
    assert mask.any()
    assert not mask.all()
    assert torch.equal(moved, mask.expand_as(logits))


@pytest.mark.parametrize("sigma", [0.1, 1.5])
def test_20_the_noise_has_the_deviation_sigma_on_the_sigmoids_logit(sigma: float) -> None:
    logits, labels = binary_batch(0, scale=5)
    noise = perturbed(True, sigma=sigma).perturb(logits, labels) - logits
    chosen = perturbed(True).selection(logits, labels)
    difference = (noise[:, 1:] - noise[:, :1])[chosen]
    assert len(difference) > 1000
    assert difference.std().item() == pytest.approx(sigma, rel=0.1)
    assert abs(difference.mean().item()) < 0.1 * sigma
    region = logits[:, 1:] - logits[:, :1]
    noise = perturbed(False, sigma=sigma).perturb(region, labels) - region
    assert noise[perturbed(False).selection(region, labels)].std().item() == pytest.approx(sigma, rel=0.1)


@MODES
def test_20_the_seed_alone_decides_the_noise(softmax: bool) -> None:
    logits, target = batch(softmax)
    one, same = (perturbed(softmax, sigma=5.0, weight=0.5) for _ in range(2))
    first = []
    for loss in (one, same):
        loss.reseed(41)
        first.append((loss(logits, target).item(), loss(logits, target).item()))
        torch.randn(5)  # the global generator is not involved
    assert first[0] == first[1]
    assert first[0][0] != first[0][1], "fresh noise at every step"
    one.reseed(42)
    assert one(logits, target).item() != first[0][0]
    one.reseed(41)
    assert one(logits, target).item() == first[0][0]
    given_one = perturbed(softmax, sigma=5.0, weight=0.5, generator=torch.Generator().manual_seed(41))
    assert given_one(logits, target).item() == first[0][0]


@MODES
def test_20_the_global_generator_stays_where_it_is(softmax: bool) -> None:
    state = torch.get_rng_state()
    perturbed(softmax)(*batch(softmax))
    assert torch.equal(torch.get_rng_state(), state)


# --------------------------------------------------------------------------------------- precision and deep supervision


@MODES
@IGNORES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_21_half_precision_stays_finite(softmax: bool, ignore: int | None, dtype: torch.dtype) -> None:
    logits, target = batch(softmax, ignore)
    logits = (logits.detach() * 5000).to(dtype).requires_grad_()
    loss = perturbed(softmax, ignore, weight=0.5)
    with torch.autocast("cpu", dtype):
        value = loss(logits, target)
        mask = loss.selection(logits, target)
    value.backward()
    assert value.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert mask.any()
    assert torch.equal(mask, loss.selection(logits.float(), target)), "selected in float32"


def test_21_half_precision_does_not_round_the_noise_away() -> None:
    logits = torch.full((1, 2, 50, 50), 100.0, dtype=torch.bfloat16)  # its next number is half a unit away
    logits[:, 0] = 0
    noise = perturbed(True).perturb(logits, torch.zeros(1, 1, 50, 50)) - logits.float()
    assert noise[:, 1].std().item() == pytest.approx(0.1 / math.sqrt(2), rel=0.1)


@MODES
def test_21_inside_deep_supervision_it_acts_on_every_level(softmax: bool) -> None:
    levels = [batch(softmax, seed=seed) for seed in range(3)]
    logits, targets = [level[0] for level in levels], [level[1] for level in levels]
    weights = (0.6, 0.4, 0.0)
    counting = Counting(base_loss(softmax))
    wrapper = DeepSupervisionWrapper(counting, weights)
    made: list[PerturbedBoundaryLoss] = []

    def make(base: nn.Module) -> PerturbedBoundaryLoss:
        made.append(PerturbedBoundaryLoss(base, sigma=3.0, weight=0.5, softmax=softmax))
        return made[-1]

    loss = with_perturbed_boundary(wrapper, make)
    assert loss is wrapper
    assert loss.loss is made[0]
    assert made[0].base is counting
    made[0].reseed(3)
    value = loss(logits, targets)
    assert len(counting.seen) == 4, "twice for each level that counts"
    alone = perturbed(softmax, sigma=3.0, weight=0.5)
    alone.reseed(3)
    expected = sum(weight * alone(*level) for weight, level in zip(weights[:2], levels[:2], strict=True))
    assert torch.allclose(value, expected)
    with torch.no_grad():
        assert torch.equal(loss(logits, targets), DeepSupervisionWrapper(base_loss(softmax), weights)(logits, targets))


def test_without_deep_supervision_the_loss_itself_is_wrapped() -> None:
    base = base_loss(True)
    loss = with_perturbed_boundary(base, lambda inner: PerturbedBoundaryLoss(inner, softmax=True))
    assert isinstance(loss, PerturbedBoundaryLoss)
    assert loss.base is base


@pytest.mark.parametrize("options", [{"tau": -0.1}, {"sigma": -1.0}, {"weight": 1.1}, {"tau": math.nan}])
def test_numbers_outside_their_bounds_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="at least 0, and the weight between 0 and 1"):
        perturbed(True, **options)
