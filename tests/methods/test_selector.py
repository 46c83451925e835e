"""FedSM's selector: what it sees, how sites with one label each train it, and how it is judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from nnunet_fed.errors import ConfigurationError, DisagreementError, FederationError
from nnunet_fed.exchange.communicator import Array, LocalCommunicator, LocalFederation
from nnunet_fed.methods.selector import (
    Selector,
    SelectorCase,
    SelectorConfiguration,
    case_log_probabilities,
    draw_patches,
    header_features,
    tempered,
)
from nnunet_fed.methods.selector_training import Mode, SelectorTraining, label_of
from nnunet_fed.methods.selector_validation import TEMPERATURES, SelectorValidation, validate_selector
from nnunet_fed.methods.tensors import load_arrays, to_arrays

SITES = ("a", "b", "c")
SMALL = SelectorConfiguration(channels=1, classes=3, patch_size=(8, 8, 8), patches=2)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -------------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize(("patch_size", "channels"), [((8, 8, 8), 1), ((40, 24), 3), ((5, 70, 3), 2)])
def test_the_selector_has_the_dimension_and_channels_of_the_plans(patch_size: tuple[int, ...], channels: int) -> None:
    configuration = SelectorConfiguration(channels, 4, patch_size, header_features=True)
    network = Selector(configuration)
    assert network(torch.zeros(2, channels, *patch_size), torch.zeros(configuration.header_size)).shape == (2, 4)
    assert not list(network.buffers()), "no normalisation keeps statistics"


def test_the_usual_selector_is_as_small_as_planned() -> None:
    network = Selector(SelectorConfiguration(1, 3, (64, 64, 64)))
    assert sum(p.numel() for p in network.parameters()) == 27 * (16 + 16 * 32) + 32 * 3 + (16 + 32) + 3


def test_t12_neither_building_nor_training_draws_from_the_global_generators() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tobytes()  # type: ignore[index, union-attr]
    training = SelectorTraining(SMALL, seed=1)
    training.step(training.gradient(sites_cases(1)["a"], 0)[0])
    case_log_probabilities(training.network, sites_cases(1)["a"])
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tobytes()  # type: ignore[index, union-attr]


def test_the_seed_decides_the_initial_weights() -> None:
    torch.manual_seed(1)
    one = Selector(SMALL, seed=5).state_dict()
    torch.manual_seed(2)
    same, other = Selector(SMALL, seed=5).state_dict(), Selector(SMALL, seed=6).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])
    logits = Selector(SMALL)(torch.randn(50, 1, 8, 8, 8))
    assert 0.01 < float(logits.detach().std()) < 10, "signals neither die nor explode"


@pytest.mark.parametrize(
    "settings", [(0, 3, (8, 8)), (1, 0, (8, 8)), (1, 3, (8,)), (1, 3, (8, 0)), (1, 3, (8, 8), 0), (1, 3, (8, 8), 1, 0)]
)
def test_configurations_that_are_none(settings: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigurationError, match="at least one channel, site and patch"):
        SelectorConfiguration(*settings)


# -------------------------------------------------------------------------------------------------------- patches


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(math.prod(shape)).reshape(shape).float()


def test_patches_are_a_grid_over_the_image() -> None:
    image = numbered(1, 8, 8, 16)
    patches = draw_patches(image, SelectorConfiguration(1, 2, (8, 8, 8)))
    assert torch.equal(patches, torch.stack([image[..., :8], image[..., 8:]]))


def test_patches_overlap_evenly_where_the_grid_does_not_fit() -> None:
    image = numbered(1, 4, 4, 10)
    patches = draw_patches(image, SelectorConfiguration(1, 2, (4, 4, 4)))
    assert [float(patch[0, 0, 0, 0]) for patch in patches] == [0, 3, 6]


def test_a_large_grid_is_thinned_from_its_first_to_its_last_patch() -> None:
    image = numbered(1, 16, 16, 16)
    patches = draw_patches(image, SelectorConfiguration(1, 2, (4, 4, 4), patches=5))
    assert len(patches) == 5
    assert float(patches[0].min()) == 0
    assert float(patches[-1].max()) == 16**3 - 1
    assert torch.equal(patches, draw_patches(image, SelectorConfiguration(1, 2, (4, 4, 4), patches=5)))


def test_small_cases_are_padded_on_both_sides() -> None:
    [patch] = draw_patches(torch.ones(1, 2, 4, 9), SelectorConfiguration(1, 2, (4, 5, 9)))
    assert patch.shape == (1, 4, 5, 9)
    assert float(patch.sum()) == 2 * 4 * 9
    assert float(patch[0, 1:3, :4].min()) == 1


def test_large_patches_are_averaged() -> None:
    image = numbered(2, 8, 8, 8)
    [patch] = draw_patches(image, SelectorConfiguration(2, 2, (8, 8, 8), pooled_size=4))
    assert patch.shape == (2, 4, 4, 4)
    assert float(patch[0, 0, 0, 0]) == float(image[0, :2, :2, :2].mean())
    [large] = draw_patches(torch.zeros(1, 70, 130, 64), SelectorConfiguration(1, 2, (70, 130, 64), patches=1))
    assert large.shape == (1, 35, 43, 64)


def test_two_dimensional_patches_are_slices() -> None:
    image = numbered(1, 4, 6, 6)
    patches = draw_patches(image, SelectorConfiguration(1, 2, (6, 6), patches=8))
    assert torch.equal(patches, image.transpose(0, 1))


def test_further_channels_are_not_looked_at() -> None:
    image = numbered(3, 8, 8, 8)
    assert torch.equal(draw_patches(image, SMALL), draw_patches(image[:1], SMALL))


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 0, 8, 8), (0, 8, 8, 8), (1, 1, 8, 8, 8)])
def test_a_case_that_no_patch_fits(shape: tuple[int, ...]) -> None:
    with pytest.raises(FederationError, match=r"No patch of 1 channels and 8 x 8 x 8 voxels fits"):
        draw_patches(torch.zeros(shape), SMALL)


def test_header_features_are_logarithms() -> None:
    image = np.stack([np.full((2, 3, 4), -1000.0), np.arange(24.0).reshape(2, 3, 4)])
    header = header_features(image, [5.0, 0.5, 1.0])
    expected = [math.log(5), math.log(0.5), 0, math.log(2), math.log(3), math.log(4)]
    expected += [math.asinh(-1000), math.asinh(11.5), 0, math.asinh(np.arange(24.0).std())]
    np.testing.assert_allclose(header, expected, rtol=1e-6)
    assert len(header) == SelectorConfiguration(2, 2, (8, 8), header_features=True).header_size


# -------------------------------------------------------------------------------------------------------- training


def sites_cases(count: int, seed: int = 0, sizes: Sequence[int] = (1, 1, 1)) -> dict[str, list[SelectorCase]]:
    """Noise, at each site around another level; site k has ``count * sizes[k]`` cases."""
    generator = torch.Generator().manual_seed(seed)

    def case(level: float) -> SelectorCase:
        return SelectorCase(level + 0.3 * torch.randn(2, 1, 8, 8, 8, generator=generator))

    return {
        site: [case(0.6 * number) for _ in range(count * size)]
        for number, (site, size) in enumerate(zip(SITES, sizes, strict=True))
    }


@pytest.mark.parametrize("weighting", ["cases", "balanced"])
def test_t13_server_adam_is_adam_on_all_cases_in_one_place(weighting: str) -> None:
    cases = sites_cases(1, sizes=(1, 2, 4))
    central = Selector(SMALL, seed=3)
    optimizer = torch.optim.Adam(central.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        of_sites = [
            torch.stack([torch.nn.functional.cross_entropy(central(c.patches), torch.full((2,), k)) for c in cases[s]])
            for k, s in enumerate(SITES)
        ]
        pooled = torch.cat(of_sites) if weighting == "cases" else torch.stack([losses.mean() for losses in of_sites])
        pooled.mean().backward()
        losses.append([float(of_site.mean().detach()) for of_site in of_sites])
        optimizer.step()

    def federated(seat: LocalCommunicator) -> tuple[SelectorTraining, list[float]]:
        training = SelectorTraining(SMALL, seed=3)
        weight = len(cases[seat.site]) if weighting == "cases" else 1.0
        told = training.train(seat, "round-0000", cases[seat.site], weight, steps=4)
        return training, told + training.train(seat, "round-0001", cases[seat.site], weight, steps=2)

    answers = LocalFederation(SITES).run(federated)
    for number, (training, told) in enumerate(answers.values()):
        for name, parameter in training.network.named_parameters():
            # Adam divides by the gradient's size, and so magnifies the rounding of those that are about zero
            difference = (parameter - dict(central.named_parameters())[name]).detach().abs()
            assert float((difference > 1e-6).float().mean()) < 1e-3
            assert float(difference.max()) < 1e-4
        np.testing.assert_allclose(told, [of_step[number] for of_step in losses], rtol=1e-5)
    states = [training.state_dict() for training, _ in answers.values()]
    assert all(torch.equal(states[0][name], state[name]) for state in states for name in state), "bit for bit"


class Measuring:
    """A seat that notes what a site sends."""

    def __init__(self, seat: LocalCommunicator):
        self._seat = seat
        self.site, self.sites = seat.site, seat.sites
        self.sent: dict[str, tuple[int, float]] = {}

    def mean(self, key: str, tensors: dict[str, Array], weight: float, exact: bool = False) -> dict[str, Array]:
        self.sent[key] = (sum(array.nbytes for array in tensors.values()), weight)
        return self._seat.mean(key, tensors, weight)


@pytest.mark.parametrize(("mode", "copies"), [("server_adam", 1), ("reference", 3)])
def test_t17_gradients_alone_are_sent_or_weights_and_moments(mode: Mode, copies: int) -> None:
    cases = sites_cases(1)

    def federated(seat: LocalCommunicator) -> dict[str, tuple[int, float]]:
        measuring = Measuring(seat)
        SelectorTraining(SMALL, 0, mode).train(measuring, "r", cases[seat.site], 2.5, steps=2)  # type: ignore[arg-type]
        return measuring.sent

    size = sum(p.numel() for p in Selector(SMALL).parameters()) * 4
    expected = {f"r/selector-{number}": (copies * size, 2.5) for number in range(2)}
    assert set(map(str, LocalFederation(SITES).run(federated).values())) == {str(expected)}


def test_the_first_reference_step_averages_weights_and_moments() -> None:
    cases = sites_cases(1)
    weights = dict(zip(SITES, (1.0, 2.0, 5.0), strict=True))

    def federated(seat: LocalCommunicator) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        training, alone = (SelectorTraining(SMALL, 0, "reference") for _ in range(2))
        training.train(seat, "r", cases[seat.site], weights[seat.site])
        alone.step(alone.gradient(cases[seat.site], label_of(seat, SMALL))[0])
        return training.state_dict(), alone.state_dict()

    answers = LocalFederation(SITES).run(federated)
    for name in answers["a"][0]:
        mean = sum(weights[site] * answers[site][1][name].double() for site in SITES) / 8.0
        for together, _ in answers.values():
            torch.testing.assert_close(together[name].double(), mean, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mode", ["server_adam", "reference"])
def test_t19_a_resumed_training_is_the_uninterrupted_one(mode: Mode) -> None:
    cases = sites_cases(1)

    def federated(seat: LocalCommunicator) -> bool:
        training = SelectorTraining(SMALL, 0, mode)
        training.train(seat, "r0", cases[seat.site], 1.0, steps=2)
        saved = training.state_dict()
        training.train(seat, "r1", cases[seat.site], 1.0, steps=2)
        resumed = SelectorTraining(SMALL, 99, mode)
        resumed.load_state_dict(saved)
        resumed.train(seat, "r1-again", cases[seat.site], 1.0, steps=2)
        one, other = training.state_dict(), resumed.state_dict()
        return all(torch.equal(one[name], other[name]) for name in one) and int(one["steps"]) == 4

    assert set(LocalFederation(SITES).run(federated).values()) == {True}


def test_the_state_of_another_selector_is_refused() -> None:
    state = SelectorTraining(SelectorConfiguration(2, 3, (8, 8, 8)), 0).state_dict()
    with pytest.raises(DisagreementError, match="shape"):
        SelectorTraining(SMALL, 0).load_state_dict(state)


@pytest.mark.parametrize(
    ("cases", "match"),
    [([], "Site 'a', r: there are no training cases"), ([float("nan")], "Site 'a', r: the selector's loss is not")],
)
def test_cases_from_which_nothing_is_learned(cases: list[float], match: str) -> None:
    seat = LocalFederation("abc").communicator("a")  # the others never come: a waiting call would end in DeadlineError
    of_site = [SelectorCase(torch.full((1, 1, 8, 8, 8), value)) for value in cases]
    with pytest.raises(FederationError, match=match):
        SelectorTraining(SMALL, 0).train(seat, "r", of_site, 1.0)


def test_t20_labels_follow_the_names_whoever_comes_first() -> None:
    for order in ("abc", "cba", "bca"):
        labels = LocalFederation(order).run(lambda seat: label_of(seat, SMALL))
        assert labels == {"a": 0, "b": 1, "c": 2}


def test_t20_a_selector_for_another_number_of_sites_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="tells 3 sites apart, but the study has 2: a, b"):
        LocalFederation("ab").run(lambda seat: SelectorTraining(SMALL, 0).train(seat, "r", [], 1.0))


def test_a_site_that_came_later_has_no_class() -> None:
    seat = LocalFederation("abc").communicator("a")
    seat.site = "z"
    with pytest.raises(ConfigurationError, match=r"the sites a, b, c apart.*site 'z' came later, or has another name"):
        SelectorTraining(SMALL, 0).train(seat, "r", [], 1.0)


def unsynchronized(seat: LocalCommunicator, cases: list[SelectorCase], rounds: int) -> SelectorTraining:
    """The control: as the reference mode, but every site keeps moments of its own."""
    training, label = SelectorTraining(SMALL, 0), label_of(seat, SMALL)
    weights = dict(training.network.named_parameters())
    for number in range(rounds):
        training.step(training.gradient(cases, label)[0])
        load_arrays(weights, seat.mean(f"r/{number}", to_arrays(weights), len(cases)))
    return training


ROUNDS = 60


def accuracies(training: SelectorTraining) -> list[float]:
    """Of each site's new cases."""
    new = sites_cases(20, seed=1)
    return [
        float((case_log_probabilities(training.network, new[site]).argmax(1) == label).double().mean())
        for label, site in enumerate(SITES)
    ]


def test_t14_sites_with_one_label_each_learn_to_tell_each_other_apart() -> None:
    cases = sites_cases(2, sizes=(1, 2, 4))

    def balanced(seat: LocalCommunicator) -> SelectorTraining:
        training = SelectorTraining(SMALL, 0)
        training.train(seat, "r", cases[seat.site], 1.0, steps=ROUNDS)
        return training

    learned = accuracies(LocalFederation(SITES).run(balanced)["a"])
    control = accuracies(LocalFederation(SITES).run(lambda seat: unsynchronized(seat, cases[seat.site], ROUNDS))["a"])
    assert min(learned) >= 0.95
    assert min(control) < min(learned)


# -------------------------------------------------------------------------------------------------------- judging it


def logits_of(network: Selector, case: SelectorCase) -> torch.Tensor:
    return network(case.patches).double()


def test_a_case_is_decided_by_the_mean_of_its_patches_log_softmax() -> None:
    network, case = Selector(SMALL), sites_cases(1)["c"][0]
    [decided] = case_log_probabilities(network, [case])
    mean = torch.log_softmax(logits_of(network, case), 1).mean(0)
    torch.testing.assert_close(decided.exp(), mean.exp() / mean.exp().sum())
    assert float(decided.exp().sum()) == pytest.approx(1)
    assert case_log_probabilities(network, []).shape == (0, 3)


def test_t15_a_constant_on_all_logits_changes_nothing() -> None:
    network, case = Selector(SMALL), sites_cases(1)["c"][0]
    [before] = case_log_probabilities(network, [case])
    with torch.no_grad():
        network.head.bias += 7
    torch.testing.assert_close(case_log_probabilities(network, [case])[0], before, rtol=0, atol=1e-5)


def test_temperature_softens_and_keeps_the_order() -> None:
    sure = torch.log(torch.tensor([[0.98, 0.01, 0.01], [0.2, 0.5, 0.3]]).double())
    torch.testing.assert_close(tempered(sure, 1), sure)
    soft = tempered(sure, 4).exp()
    assert torch.equal(soft.argmax(1), sure.argmax(1))
    assert float(soft[0, 0]) < 0.98
    torch.testing.assert_close(soft.sum(1), torch.ones(2).double())


def judged(log_probabilities: dict[str, torch.Tensor], gamma: float = 0.9) -> SelectorValidation:
    federation = LocalFederation(list(log_probabilities), deadline=5)
    answers = federation.run(lambda seat: validate_selector(seat, "end", log_probabilities[seat.site], gamma))
    assert len(set(answers.values())) == 1, "every site is told the same"
    return answers[federation.sites[0]]


def test_the_federations_temperature_is_that_of_the_pooled_cases() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = {site: 3 * torch.randn(40, 3, generator=generator).double() for site in SITES}
    log_probabilities = {site: torch.log_softmax(values, 1) for site, values in logits.items()}
    pooled = torch.cat([log_probabilities[site] for site in SITES])
    labels = torch.arange(3).repeat_interleave(40)
    losses = [float(torch.nn.functional.nll_loss(tempered(pooled, t), labels)) for t in TEMPERATURES]
    judgement = judged(log_probabilities)
    assert judgement.temperature == TEMPERATURES[int(np.argmin(losses))]
    assert judgement.temperature > 4, "guesses must not be sure"
    accuracy = float((pooled.argmax(1) == labels).double().mean())
    assert judgement.accuracy == pytest.approx(accuracy)
    routed = (tempered(pooled, judgement.temperature).exp().max(1).values <= 0.9).double()
    assert judgement.share_routed_to_global == pytest.approx(float(routed.mean()))


def test_the_confusion_matrix_has_a_row_for_each_true_site() -> None:
    def decided(*sites: int) -> torch.Tensor:
        return torch.log(torch.eye(3).double() * 0.97 + 0.01)[list(sites)]

    judgement = judged({"a": decided(0, 0, 2), "b": decided(1), "c": torch.zeros(0, 3).double()}, gamma=0.0)
    assert judgement.confusion == ((2, 0, 1), (0, 1, 0), (0, 0, 0))
    assert judgement.accuracy == 0.75
    assert judgement.accuracy_by_site == {"a": 2 / 3, "b": 1, "c": None}
    assert judgement.routed_to_global == (0, 0, 0)
    assert judged({site: decided(k) for k, site in enumerate(SITES)}).temperature == 1, "nothing is sharpened"
    assert judged({site: decided(k) for k, site in enumerate(SITES)}, gamma=1.0).share_routed_to_global == 1


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (torch.zeros(2, 4), r"Site 'a'.* shape \(cases, 3\).*\(2, 4\)"),
        (torch.full((2, 3), math.nan), "must be finite"),
        (torch.zeros(0, 3), "No site has a validation case"),
    ],
)
def test_what_cannot_be_judged(values: torch.Tensor, match: str) -> None:
    with pytest.raises(FederationError, match=match):
        judged(dict.fromkeys(SITES, values))
