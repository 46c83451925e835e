"""Familiar and unfamiliar images: the texture of the sites' images, found by sums over the federation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunet_fed.exchange.communicator import LocalCommunicator, LocalFederation
from nnunet_fed.exchange.payload import Array
from nnunet_fed.methods.familiarity import SHARE, SHRINKAGE, VARIANCE_FLOOR, Familiarity, fit_familiarity, texture
from nnunet_fed.methods.fedsm import GLOBAL, Route, route
from nnunet_fed.methods.selector import SelectorCase

NOISE = {"a": 0.05, "b": 0.2}


def case(noise: float, seed: int, smooth: bool = False) -> SelectorCase:
    rng = np.random.default_rng(seed)
    image = np.sin(np.linspace(0, 3, 20)) + rng.normal(size=(2, 1, 20, 20, 20)) * noise * rng.uniform(0.9, 1.1)
    if smooth:
        image = (image + np.roll(image, 1, axis=4)) / 2**0.5
    return SelectorCase(torch.from_numpy(image.astype(np.float32)))


def fit(training: dict[str, list[SelectorCase]], validation: dict[str, list[SelectorCase]]) -> Familiarity | None:
    def run(seat: LocalCommunicator) -> Familiarity | None:
        return fit_familiarity(seat, "round-0009", training[seat.site], validation[seat.site])

    found = LocalFederation(list(training), deadline=60).run(run)
    assert len({repr(value) for value in found.values()}) == 1, "the same at every site"
    return next(iter(found.values()))


@pytest.fixture(scope="module")
def fitted() -> Familiarity:
    training = {site: [case(noise, number) for number in range(30)] for site, noise in NOISE.items()}
    validation = {site: [case(noise, 100 + number) for number in range(20)] for site, noise in NOISE.items()}
    found = fit(training, validation)
    assert found is not None
    return found


def test_images_of_the_sites_are_familiar(fitted: Familiarity) -> None:
    for noise in NOISE.values():
        familiar = [fitted.unfamiliarity(case(noise, 500 + number)) <= 1 for number in range(40)]
        assert np.mean(familiar) >= 0.8


@pytest.mark.parametrize(("noise", "smooth"), [(0.1, False), (0.01, False), (1.0, False), (0.05, True), (0.2, True)])
def test_images_of_nobody_are_not_even_between_the_sites(fitted: Familiarity, noise: float, smooth: bool) -> None:
    assert all(fitted.unfamiliarity(case(noise, 900 + number, smooth)) > 1 for number in range(10))


def test_the_federation_finds_what_the_pooled_cases_have() -> None:
    """Means, covariance and limit out of sums are those of all cases in one place, with unequal numbers of cases."""
    training = {"a": [case(0.05, number) for number in range(30)], "b": [case(0.2, number) for number in range(12)]}
    validation = {"a": [case(0.05, 100 + number) for number in range(7)], "b": []}
    found = fit(training, validation)
    assert found is not None
    textures = {site: np.stack([texture(one.patches) for one in cases]) for site, cases in training.items()}
    scatter = sum((rows - rows.mean(0)).T @ (rows - rows.mean(0)) for rows in textures.values())
    pooled: Array = np.asarray(scatter) / (30 + 12 - 2)
    expected = (1 - SHRINKAGE) * pooled + np.diag(SHRINKAGE * np.diag(pooled) + VARIANCE_FLOOR)
    for site, rows in textures.items():
        assert np.allclose(found.means[site], rows.mean(0), rtol=1e-12)
    assert np.allclose(np.linalg.inv(np.array(found.precision)), expected, rtol=1e-6)
    ratios = sorted(found.unfamiliarity(one) for one in validation["a"])
    assert ratios[int(np.ceil(SHARE * 7)) - 1] <= 1, "the limit covers the share of the validation cases"
    assert ratios[-1] > 2 ** (-1 / 8) - 1e-9, "and no more than a bin beyond"


def test_too_few_cases_to_tell() -> None:
    one = {"a": [case(0.05, 0)], "b": [case(0.2, 0)]}
    assert fit(one, {"a": [case(0.05, 1)], "b": []}) is None
    two = {"a": [case(0.05, 0), case(0.05, 1)], "b": [case(0.2, 0)]}
    assert fit(two, {"a": [], "b": []}) is None
    assert fit(two, {"a": [], "b": [case(0.2, 3)]}) is not None


def test_texture_of_slices_flat_patches_and_constant_images() -> None:
    assert texture(torch.rand(3, 2, 16, 16)).shape == (2 * 2 * 2 * 2 * 2,)
    assert texture(torch.rand(3, 1, 2, 16, 16)).shape == (2 * 2 * 2 * 2,), "an axis of two voxels is left out"
    assert np.isfinite(texture(torch.zeros(1, 1, 8, 8, 8))).all()


def test_texture_does_not_see_where_the_patches_are() -> None:
    patches = torch.rand(4, 1, 8, 8, 8)
    assert np.allclose(texture(patches), texture(patches.flip(0)))
    assert np.allclose(texture(patches), texture(patches + 5), atol=1e-3), "nor a constant"


@pytest.mark.parametrize("distance", [1.001, 50.0, float("nan")])
def test_the_unfamiliar_goes_to_the_global_model_however_sure_the_selector_is(distance: float) -> None:
    sure = {"a": 1.0, "b": 0.0}
    taken = route(sure, 0.9, unfamiliarity=distance)
    assert (taken.choice, taken.reason) == (GLOBAL, "unfamiliar")
    assert route(sure, 0.9, unfamiliarity=1.0) == Route("a", "personal", 1.0)
    assert route(sure, 0.9, unfamiliarity=distance, trusted=False).reason == "gate"
