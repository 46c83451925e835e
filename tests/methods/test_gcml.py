"""GCML's objective: invariants 1 to 11 and 13 to 16 of its notes (6), by their numbers, on nnU-Net's own losses."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import CLASSES, IGNORED, IGNORES, MODES, Counting, base_loss, batch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import nn
from torch.nn.functional import kl_div

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.methods.gcml import (
    Contrast,
    ContrastName,
    MutualLoss,
    Plan,
    divergence,
    execution_plan,
    ramped_weight,
)

NAMES: tuple[ContrastName, ...] = get_args(ContrastName)
CONTRASTS = pytest.mark.parametrize("name", NAMES)
PLANS = pytest.mark.parametrize("plan", get_args(Plan))
SEEDS = st.integers(0, 2**31)
SCALES = st.floats(0.01, 30)


def pair(
    softmax: bool, ignore: int | None = None, dimensions: int = 2, seed: int = 0, scale: float = 3.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A teacher and a student that are often wrong and differ, and their target."""
    student, target = batch(softmax, ignore, dimensions, seed, scale)
    teacher, _ = batch(softmax, ignore, dimensions, seed + 1, scale)
    return teacher.detach(), student, target


def gradient_of(value: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    (gradient,) = torch.autograd.grad(value, student)
    return gradient


def right_logits(target: torch.Tensor, softmax: bool, size: float = 4.0) -> torch.Tensor:
    """Logits that are right everywhere."""
    if softmax:
        hot = nn.functional.one_hot(target[:, 0].long(), CLASSES).movedim(-1, 1).float()
        return size * hot
    return size * (2 * target.float() - 1)


# ----------------------------------------------------------------------------------------------- an independent reading

Floats = npt.NDArray[np.float64]


def plainly(
    contrast: Contrast, teacher: torch.Tensor, student: torch.Tensor, target: torch.Tensor, class_mean: bool = True
) -> float:
    """The notes' 1.4 and 5.2 in float64, by boolean indexing, without anything that makes it fast or stable."""
    t, s = (logits.detach().double().numpy() / contrast.temperature for logits in (teacher, student))
    y = target.numpy()
    if not contrast.softmax:
        ignored = np.zeros_like(y[:, 0], dtype=bool) if contrast.ignore_label is None else y[:, -1] != 0
        values = []
        for region in range(t.shape[1]):
            p, q = 1 / (1 + np.exp(-t[:, region])), 1 / (1 + np.exp(-s[:, region]))
            d = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
            labels = y[:, region].astype(int)
            values.append(of_sets(contrast, d, (p > 0.5) * 1, (q > 0.5) * 1, labels, ~ignored, classes=None))
        return float(np.mean(values))
    p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (t, s))
    labels = y[:, 0].astype(int)
    valid = np.ones_like(labels, dtype=bool) if contrast.ignore_label is None else labels != contrast.ignore_label
    d = (p * np.log(p / q)).sum(1)
    return of_sets(contrast, d, p.argmax(1), q.argmax(1), labels, valid, classes=CLASSES if class_mean else None)


def of_sets(
    contrast: Contrast, d: Floats, teacher: Any, student: Any, labels: Any, valid: Any, classes: int | None
) -> float:
    def mean(values: Floats, where: Any) -> float:
        where = where & valid
        groups = [where] if classes is None else [where & (labels == label) for label in range(classes)]
        means = [values[group].mean() for group in groups if group.any()]
        return float(np.mean(means)) if means else 0.0

    hinge = np.maximum(0, contrast.margin - d)
    if contrast.contrast == "full":
        return mean(d, valid)
    if contrast.contrast == "region":
        return mean(d, labels != 0)
    if contrast.contrast == "foreground_background":
        weight = contrast.background_weight
        return mean(d, labels != 0) + abs(weight) * mean(d if weight > 0 else hinge, labels == 0)
    roi = labels != 0
    if contrast.roi == "union":
        roi = roi | (teacher != 0) | (student != 0)
    same = teacher == (labels if contrast.contrast == "correctness" else student)
    return mean(d, roi & same) + contrast.contrast_weight * mean(hinge, roi & ~same)


@MODES
@IGNORES
@CONTRASTS
@pytest.mark.parametrize("dimensions", [2, 3])
def test_every_contrast_is_that_of_the_notes(
    softmax: bool, ignore: int | None, name: ContrastName, dimensions: int
) -> None:
    teacher, student, target = pair(softmax, ignore, dimensions)
    for options in (
        {},
        {"contrast_weight": 0.7, "margin": 5.0, "roi": "reference", "temperature": 2.5, "background_weight": -0.4},
    ):
        contrast = Contrast(softmax, name, ignore_label=ignore, **options)  # type: ignore[arg-type]
        value = contrast(teacher, student, target)
        assert value.dtype == torch.float32
        assert value.shape == ()
        assert value.item() == pytest.approx(plainly(contrast, teacher, student, target), rel=1e-5)


@CONTRASTS
def test_the_class_mean_can_be_switched_off_and_is_off_for_two_classes(name: ContrastName) -> None:
    teacher, student, target = pair(True)
    contrast = Contrast(True, name, class_mean=False)
    value = contrast(teacher, student, target).item()
    assert value == pytest.approx(plainly(contrast, teacher, student, target, class_mean=False), rel=1e-5)
    assert value != pytest.approx(Contrast(True, name)(teacher, student, target).item(), rel=1e-3)
    two = (teacher[:, :2], student[:, :2], target.clamp(max=1))
    expected = Contrast(True, name, class_mean=False)(*two)
    assert torch.equal(Contrast(True, name)(*two), expected)


def test_with_the_class_mean_a_small_class_weighs_as_much_as_a_large_one() -> None:
    target = torch.ones(1, 1, 10, 10)
    target[..., :1] = 2
    teacher = right_logits(target, True)
    student = torch.where(target == 2, torch.zeros_like(teacher), teacher)  # wrong about the small class alone
    balanced = Contrast(True)(teacher, student, target).item()
    assert balanced == pytest.approx(5 * Contrast(True, class_mean=False)(teacher, student, target).item(), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- divergence


@MODES
@settings(deadline=None)
@given(seed=SEEDS, scale=SCALES)
def test_1_the_divergence_is_not_negative_and_equal_logits_have_exactly_none(
    softmax: bool, seed: int, scale: float
) -> None:
    teacher, student, _ = pair(softmax, seed=seed, scale=scale)
    assert divergence(teacher, student, softmax=softmax).min() > -1e-5
    value = divergence(student, student, softmax=softmax)
    assert torch.count_nonzero(value) == 0
    assert torch.count_nonzero(gradient_of(value.sum(), student)) == 0


@MODES
@CONTRASTS
@IGNORES
def test_1_equal_logits_have_no_gradient_and_the_value_of_the_flat_hinge(
    softmax: bool, name: ContrastName, ignore: int | None
) -> None:
    _, student, target = pair(softmax, ignore)
    value = Contrast(softmax, name, contrast_weight=0.3, margin=1.5, ignore_label=ignore)(student, student, target)
    assert value.item() == pytest.approx(0.45 if name == "correctness" else 0, abs=1e-6)
    assert torch.count_nonzero(gradient_of(value, student)) == 0


@MODES
@settings(deadline=None)
@given(seed=SEEDS, scale=st.floats(0.01, 10))
def test_2_the_gradient_is_the_difference_of_the_probabilities(softmax: bool, seed: int, scale: float) -> None:
    teacher, student, _ = pair(softmax, seed=seed, scale=scale)

    def probability(logits: torch.Tensor) -> torch.Tensor:
        logits = logits.double()
        return logits.softmax(1) if softmax else logits.sigmoid()

    gradient = gradient_of(divergence(teacher, student, softmax=softmax).sum(), student)
    expected = probability(student) - probability(teacher)
    assert (gradient - expected).abs().max() < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_2_value_and_gradient_are_those_of_torch_at_any_temperature(temperature: float) -> None:
    teacher, student, _ = pair(True)
    value = divergence(teacher, student, softmax=True, temperature=temperature)
    logs = [(logits.double() / temperature).log_softmax(1) for logits in (student, teacher)]
    expected = kl_div(*logs, reduction="none", log_target=True).sum(1)
    assert torch.allclose(value.double(), expected, atol=1e-6)
    random = torch.randn(value.shape)
    found, wanted = (gradient_of((random * each).sum(), student) for each in (value, expected))
    assert torch.allclose(found, wanted, atol=1e-6)


@settings(deadline=None)
@given(seed=SEEDS, scale=st.floats(0.1, 8), shift=st.floats(-8, 8))
def test_3_constants_do_not_matter_and_two_classes_are_one_region(seed: int, scale: float, shift: float) -> None:
    teacher, student, _ = pair(True, seed=seed, scale=scale)
    value = divergence(teacher, student, softmax=True)
    constant = shift * torch.randn(2, 1, *teacher.shape[2:], generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(divergence(teacher + constant, student, softmax=True), value, atol=1e-4)
    assert torch.allclose(divergence(teacher, student + constant, softmax=True), value, atol=1e-4)
    two = divergence(teacher[:, :2], student[:, :2], softmax=True)
    difference = [logits[:, 1:2] - logits[:, :1] for logits in (teacher, student)]
    assert torch.allclose(divergence(*difference, softmax=False)[:, 0], two, atol=1e-4)


@CONTRASTS
def test_3_two_classes_and_one_region_have_the_same_contrast(name: ContrastName) -> None:
    teacher, student, target = pair(True)
    target = target.clamp(max=1)
    regions = [logits[:, 1:2] - logits[:, :1] for logits in (teacher, student)]
    expected = Contrast(True, name)(teacher[:, :2], student[:, :2], target)
    assert torch.allclose(Contrast(False, name)(*regions, target), expected, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------- contrast


@MODES
def test_5_a_teacher_that_is_right_only_attracts_and_one_that_is_wrong_only_repels(softmax: bool) -> None:
    _, student, target = pair(softmax)
    teacher = right_logits(target, softmax)
    expected = Contrast(softmax, contrast_weight=0)(teacher, student, target)
    assert expected > 0
    assert torch.equal(Contrast(softmax, contrast_weight=5)(teacher, student, target), expected)
    teacher = teacher.roll(1, 1) if softmax else -teacher
    assert Contrast(softmax, contrast_weight=0)(teacher, student, target) == 0
    assert 0 < Contrast(softmax, contrast_weight=5, margin=3)(teacher, student, target) <= 15


@MODES
@IGNORES
@settings(deadline=None)
@given(seed=SEEDS, scale=SCALES, weight=st.floats(0, 10), margin=st.floats(0.1, 10))
def test_6_the_repulsion_lies_between_zero_and_gamma_m(
    softmax: bool, ignore: int | None, seed: int, scale: float, weight: float, margin: float
) -> None:
    teacher, student, target = pair(softmax, ignore, seed=seed, scale=scale)
    for name in ("correctness", "agreement"):
        attraction = Contrast(softmax, name, 0, ignore_label=ignore)(teacher, student, target).item()
        value = Contrast(softmax, name, weight, margin, ignore_label=ignore)(teacher, student, target).item()
        rounding = 1e-4 * (1 + value)
        assert attraction >= -1e-5
        assert -rounding <= value - attraction <= weight * margin + rounding


@MODES
def test_6_without_gamma_it_does_not_matter_how_wrong_the_teacher_is(softmax: bool) -> None:
    teacher, student, target = pair(softmax)
    wrong = (teacher.argmax(1, keepdim=True) if softmax else teacher > 0) != target
    other = torch.where(wrong, 7 * teacher, teacher)
    contrast = Contrast(softmax, contrast_weight=0)
    values = [contrast(logits, student, target) for logits in (teacher, other)]
    assert torch.equal(*values)
    gradients = [gradient_of(value, student) for value in values]
    assert torch.equal(*gradients)
    assert torch.count_nonzero(gradients[0] * wrong) == 0
    assert not torch.equal(Contrast(softmax)(other, student, target), Contrast(softmax)(teacher, student, target))


@MODES
@CONTRASTS
@IGNORES
def test_7_it_is_a_mean_a_patch_tiled_twice_has_the_same(softmax: bool, name: ContrastName, ignore: int | None) -> None:
    tensors = pair(softmax, ignore, 3)
    contrast = Contrast(softmax, name, ignore_label=ignore)
    expected = contrast(*tensors)
    for axis in range(2, 5):
        assert torch.allclose(contrast(*(torch.cat([each, each], axis) for each in tensors)), expected, rtol=1e-5)


@MODES
@CONTRASTS
def test_7_easy_background_does_not_dilute_it(softmax: bool, name: ContrastName) -> None:
    teacher, student, target = pair(softmax)
    easy = torch.full_like(teacher, -3.0)
    if softmax:
        easy[:, 0] = 3.0
    contrast = Contrast(softmax, name, margin=9.0)
    expected = contrast(teacher, student, target)
    more = [torch.cat(both, 3) for both in ((teacher, easy), (student, 1.5 * easy), (target, torch.zeros_like(target)))]
    assert torch.allclose(contrast(*more), expected, rtol=1e-5) == (name in ("region", "correctness", "agreement"))


@MODES
@CONTRASTS
def test_8_ignored_voxels_are_not_felt(softmax: bool, name: ContrastName) -> None:
    teacher, student, target = pair(softmax, IGNORED)
    ignored = target == IGNORED if softmax else target[:, -1:]
    contrast = Contrast(softmax, name, ignore_label=IGNORED)
    value = contrast(teacher, student, target)
    gradient = gradient_of(value, student)
    assert torch.count_nonzero(gradient) > 0
    assert torch.count_nonzero(gradient * ignored) == 0
    noise = [torch.where(ignored, 50 * torch.randn_like(teacher), logits) for logits in (teacher, student)]
    other = contrast(*noise, target)
    assert torch.equal(other, value)
    assert torch.equal(gradient_of(other, student), gradient)
    nothing = torch.full_like(target, IGNORED) if softmax else torch.ones_like(target)
    assert contrast(teacher, student, nothing) == 0


@MODES
@CONTRASTS
@pytest.mark.parametrize("dtype", [torch.int16, torch.int64, torch.float32])
def test_8_the_type_of_the_target_does_not_matter(softmax: bool, name: ContrastName, dtype: torch.dtype) -> None:
    teacher, student, target = pair(softmax, IGNORED)
    contrast = Contrast(softmax, name, ignore_label=IGNORED)
    assert torch.equal(contrast(teacher, student, target.to(dtype)), contrast(teacher, student, target))


@MODES
@pytest.mark.parametrize("name", ["region", "correctness", "agreement"])
def test_8_nothing_but_background_gives_zero(softmax: bool, name: ContrastName) -> None:
    teacher, student, target = pair(softmax)
    background = torch.full_like(teacher, -3.0)
    if softmax:
        background[:, 0] = 3.0
    student = (2 * background).requires_grad_()
    value = Contrast(softmax, name)(background, student, torch.zeros_like(target))
    assert value == 0
    assert torch.count_nonzero(gradient_of(value, student)) == 0


@MODES
@CONTRASTS
@IGNORES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_9_half_precision_stays_finite_and_is_computed_in_float32(
    softmax: bool, name: ContrastName, ignore: int | None, dtype: torch.dtype
) -> None:
    teacher, student, target = pair(softmax, ignore)
    teacher, student = (60 * logits.detach().sign().to(dtype) for logits in (teacher, student))
    student.requires_grad_()
    contrast = Contrast(softmax, name, ignore_label=ignore)
    with torch.autocast("cpu", dtype):
        value = contrast(teacher, student, target)
    value.backward()
    assert value.isfinite()
    assert value > 1 or name == "agreement"
    assert student.grad is not None
    assert student.grad.dtype == dtype
    assert student.grad.isfinite().all()
    assert torch.equal(value, contrast(teacher.float(), student.float(), target))


def test_9_the_divergence_of_opposite_logits_is_their_distance() -> None:
    teacher = torch.tensor([30.0, -30.0], dtype=torch.float16).view(1, 2, 1, 1)
    assert divergence(teacher, -teacher, softmax=True).item() == pytest.approx(60)
    assert divergence(teacher, -teacher, softmax=False).flatten().tolist() == pytest.approx([30, 30])


@CONTRASTS
@IGNORES
def test_10_regions_do_not_interact(name: ContrastName, ignore: int | None) -> None:
    teacher, student, target = pair(False, ignore)
    contrast = Contrast(False, name, ignore_label=ignore)
    value = contrast(teacher, student, target)
    order = torch.tensor([2, 0, 1])
    target_order = order if ignore is None else torch.tensor([2, 0, 1, 3])
    permuted = contrast(teacher[:, order], student[:, order], target[:, target_order])
    assert torch.allclose(permuted, value, rtol=1e-6)
    gradient = gradient_of(value, student)
    changed, other_target = teacher.clone(), target.clone()
    changed[:, 0] *= -3
    other_target[:, 0] = ~other_target[:, 0]
    other = gradient_of(contrast(changed, student, other_target), student)
    assert not torch.equal(other[:, 0], gradient[:, 0])
    assert torch.equal(other[:, 1:], gradient[:, 1:])


@pytest.mark.parametrize("name", ["correctness", "foreground_background"])
def test_what_repels_stops_at_the_margin(name: ContrastName) -> None:
    target = torch.zeros(1, 1, 1, 4) if name == "foreground_background" else torch.ones(1, 1, 1, 4)
    teacher = torch.tensor([2.0, -2.0]).view(1, 2, 1, 1).repeat(1, 1, 1, 4)
    student = (0.5 * teacher).requires_grad_()
    contrast = Contrast(True, name, contrast_weight=10, background_weight=-10)
    for _ in range(300):
        value = contrast(teacher, student, target)
        assert value >= 0
        student.data -= 0.1 * gradient_of(value, student)
    reached = divergence(teacher, student, softmax=True)
    assert reached.min() > 1.9
    assert reached.max() < 3


def test_nothing_waits_for_the_device() -> None:
    """On the meta device there are no values: whatever has to read one fails."""
    for softmax in (True, False):
        teacher, student, target = (each.detach().to("meta") for each in pair(softmax, IGNORED))
        student.requires_grad_()
        for name in NAMES:
            gradient_of(Contrast(softmax, name, ignore_label=IGNORED)(teacher, student, target), student)
    with pytest.raises(RuntimeError):
        bool(student.sum() > 0)


# -------------------------------------------------------------------------------------------------- the whole objective


def levels(softmax: bool, count: int = 3) -> Iterator[list[torch.Tensor]]:
    """Teacher's outputs, student's outputs and targets of several resolutions."""
    tensors = [pair(softmax, seed=7 * level) for level in range(count)]
    return map(list, zip(*tensors, strict=True))


WEIGHTS = (0.6, 0.4, 0.0)


@MODES
@IGNORES
def test_13_weight_zero_or_no_teacher_is_the_base_loss_bit_for_bit_at_its_cost(
    softmax: bool, ignore: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student, target = pair(softmax, ignore)
    expected = base_loss(softmax, ignore)(student, target)
    counting = Counting(base_loss(softmax, ignore))
    loss = MutualLoss(counting, Contrast(softmax, ignore_label=ignore))
    loss.weight = 0.5
    assert not torch.equal(loss(student, target, teacher), expected), "the weight may change at any time"
    assert len(counting.seen) == 1
    with monkeypatch.context() as patched:
        patched.setattr(Contrast, "__call__", lambda *_: pytest.fail("the contrast was computed"))
        without = loss(student, target)
        loss.weight = 0.0
        zero = loss(student, target, teacher)
        with torch.inference_mode():
            assert torch.equal(loss(student, target), expected)
    assert len(counting.seen) == 4
    for value in (without, zero):
        assert torch.equal(value, expected)
        assert torch.equal(
            gradient_of(value, student), gradient_of(base_loss(softmax, ignore)(student, target), student)
        )


@MODES
@pytest.mark.parametrize("mix", ["additive", "convex"])
def test_the_objective_is_the_sum_of_loss_and_contrast(softmax: bool, mix: Any) -> None:
    teacher, student, target = pair(softmax)
    contrast = Contrast(softmax)
    loss = MutualLoss(base_loss(softmax), contrast, mix=mix)
    loss.weight = 0.3
    share = 1.0 if mix == "additive" else 0.7
    expected = share * base_loss(softmax)(student, target) + 0.3 * contrast(teacher, student, target)
    assert torch.allclose(loss(student, target, loss.lesson(teacher)), expected)


@MODES
def test_11_deep_supervision_stays_and_only_the_full_resolution_is_contrasted(softmax: bool) -> None:
    teacher, outputs, targets = levels(softmax)
    supervised = DeepSupervisionWrapper(base_loss(softmax), WEIGHTS)
    contrast = Contrast(softmax)
    loss = MutualLoss(supervised, contrast)
    assert torch.equal(loss(outputs, targets), supervised(outputs, targets))
    loss.weight = 0.3
    lesson = loss.lesson(teacher)
    assert len(lesson) == 1
    expected = supervised(outputs, targets) + 0.3 * contrast(teacher[0], outputs[0], targets[0])
    assert torch.equal(loss(outputs, targets, lesson), expected)


@MODES
def test_11_all_heads_have_the_weights_of_the_supervision_and_the_last_is_not_felt(softmax: bool) -> None:
    teacher, outputs, targets = levels(softmax)
    supervised = DeepSupervisionWrapper(base_loss(softmax), WEIGHTS)
    contrast = Contrast(softmax)
    loss = MutualLoss(supervised, contrast, heads="all")
    loss.weight = 0.3
    lesson = loss.lesson(teacher)
    assert len(lesson) == 3
    value = loss(outputs, targets, lesson)
    expected = DeepSupervisionWrapper(contrast, WEIGHTS)(teacher, outputs, targets)
    assert torch.allclose(value, supervised(outputs, targets) + 0.3 * expected)
    outputs[2], lesson[2] = outputs[2] * math.nan, lesson[2] * math.nan
    assert torch.equal(loss(outputs, targets, lesson), value)


# --------------------------------------------------------------------------------------------- two models, step by step


def network(seed: int) -> nn.Module:
    """nnU-Net's own, small."""
    torch.manual_seed(seed)
    return PlainConvUNet(
        1, CLASSES, [4, 6, 8], nn.Conv2d, 3, [1, 2, 2], 1, CLASSES, 1, conv_bias=True, norm_op=nn.InstanceNorm2d,
        norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )  # fmt: skip


def patches(seed: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    random = torch.Generator().manual_seed(seed)
    target = torch.randint(CLASSES, (2, 1, 16, 16), generator=random).float()
    return target + torch.randn(2, 1, 16, 16, generator=random), [target, target[..., ::2, ::2]]


class Trained:
    """A model, its optimizer as nnU-Net's, and its steps."""

    def __init__(self, model: nn.Module):
        self.model = copy.deepcopy(model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.05, 0.99, weight_decay=3e-5, nesterov=True)

    def step(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.update()

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 12)
        self.optimizer.step()

    def weights(self) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])


def supervised_loss() -> nn.Module:
    return DeepSupervisionWrapper(base_loss(True), (2 / 3, 1 / 3))


def train_alone(model: nn.Module, steps: int) -> torch.Tensor:
    alone, loss = Trained(model), supervised_loss()
    for step in range(steps):
        data, target = patches(step)
        alone.step(loss(alone.model(data), target))
    return alone.weights()


def train_together(
    local: nn.Module, incoming: nn.Module, steps: int, plan: Plan, weight: float, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two plans of the notes (5.3); weights of both at the end."""
    one, other = Trained(local), Trained(incoming)
    loss = MutualLoss(supervised_loss(), Contrast(True, **options))
    for step in range(steps):
        data, target = patches(step)
        loss.weight = ramped_weight(step + 1, weight, 2) if weight else 0.0
        if plan == "simultaneous":
            ours, theirs = one.model(data), other.model(data)
            one.step(loss(ours, target, loss.lesson(theirs)))
            other.step(loss(theirs, target, loss.lesson(ours)))
            continue
        with torch.no_grad():
            lesson = loss.lesson(other.model(data))
        outputs = one.model(data)
        one.step(loss(outputs, target, lesson))
        other.step(loss(other.model(data), target, loss.lesson(outputs)))
    return one.weights(), other.weights()


def test_4_no_gradient_reaches_the_teacher() -> None:
    data, target = patches(0)
    loss = MutualLoss(supervised_loss(), Contrast(True), heads="all")
    loss.weight = 0.5
    for student, teacher in ((network(0), network(1)), (network(1), network(0))):
        taught = teacher(data)
        loss(student(data), target, taught).backward()  # not even if the caller did not detach it
        assert all(parameter.grad is None for parameter in teacher.parameters())
        assert any(parameter.grad is not None for parameter in student.parameters())
        assert not any(output.requires_grad for output in loss.lesson(taught))


@PLANS
def test_13_weight_zero_is_the_training_of_each_alone(plan: Plan) -> None:
    local, incoming = network(0), network(1)
    together = train_together(local, incoming, 3, plan, 0.0)
    assert torch.equal(together[0], train_alone(local, 3))
    assert torch.equal(together[1], train_alone(incoming, 3))
    assert not torch.equal(train_together(local, incoming, 3, plan, 0.5)[0], together[0])


@PLANS
@CONTRASTS
def test_14_a_copy_as_a_peer_changes_nothing_bit_for_bit(plan: Plan, name: ContrastName) -> None:
    local = network(0)
    one, other = train_together(local, local, 3, plan, 0.5, contrast=name, contrast_weight=1.0)
    assert torch.equal(one, other)
    assert torch.equal(one, train_alone(local, 3))


@CONTRASTS
def test_15_both_plans_give_the_same_weights(name: ContrastName) -> None:
    at_once, in_turn = (
        torch.cat(train_together(network(0), network(1), 1, plan, 0.5, contrast=name)) for plan in get_args(Plan)
    )
    assert (at_once - in_turn).abs().max() < 1e-6


@PLANS
def test_16_the_two_models_may_change_places(plan: Plan) -> None:
    one = train_together(network(0), network(1), 2, plan, 0.5)
    other = train_together(network(1), network(0), 2, plan, 0.5)
    assert torch.equal(one[0], other[1])
    assert torch.equal(one[1], other[0])


# ------------------------------------------------------------------------------------------------------ weight and plan


def test_the_weight_rises_linearly_and_stays() -> None:
    assert [ramped_weight(step, 0.5, 50) for step in (0, 25, 50, 51, 10**6)] == [0, 0.25, 0.5, 0.5, 0.5]
    assert ramped_weight(0, 0.5, 0) == 0.5


@given(st.integers(0, 2**50), st.integers(1, 2**40))
def test_both_graphs_are_kept_where_a_second_step_fits_with_headroom(free: int, step: int) -> None:
    assert (execution_plan(free, step) == "simultaneous") == (5 * free >= 6 * step)
    assert execution_plan(0, step) == "two_pass"


@pytest.mark.parametrize(
    ("option", "number"),
    [
        ("contrast_weight", -0.1),
        ("margin", 0.0),
        ("margin", math.nan),
        ("temperature", 0.0),
        ("background_weight", math.inf),
    ],
)
def test_numbers_outside_their_bounds_are_refused(option: str, number: float) -> None:
    with pytest.raises(ConfigurationError, match="contrast_weight at least 0, margin and temperature above 0"):
        Contrast(True, **{option: number})  # type: ignore[arg-type]
