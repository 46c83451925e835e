from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from nnunet_fed.datasets.phantom import SiteProfile
from nnunet_fed.datasets.phantom_bodies import (
    CYST,
    LABELS,
    Anatomy,
    Floats,
    Organ,
    Shape,
    banana,
    ellipsoid,
    labels_of,
    tube,
    two_lobes,
)

TOUCHING = np.ones((3, 3, 3))
SHAPES = (ellipsoid, banana, two_lobes, tube)


def grid(edge: float, steps: int) -> Floats:
    """Points of a cube around the origin."""
    axis = np.linspace(-edge, edge, steps)
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_organ_is_one_body_within_its_axes(shape: Shape) -> None:
    points = grid(1.5, 61)
    inside = shape(points) < 1
    assert ndimage.label(inside)[1] == 1
    assert np.abs(points[inside]).max() <= 1
    assert inside.mean() > 0.05


def test_shapes_are_clearly_different() -> None:
    points = grid(1, 41)
    bodies = [shape(points) < 1 for shape in SHAPES]
    for number, one in enumerate(bodies):
        for other in bodies[:number]:
            assert (one & other).sum() / (one | other).sum() < 0.75
    assert not bodies[3][20, 20].any(), "the tube is hollow"
    across = bodies[2].sum((1, 2))
    assert across[20] < across.max() / 2, "a waist is between the lobes"
    assert not bodies[1][:, 20, 20].all()
    assert bodies[1][0:41, :, 20].any(1).sum() > 35, "the banana goes around the middle of the line between its ends"


def test_one_body_has_one_size_under_every_scanner() -> None:
    body = Anatomy.draw((0, 0, 1), np.random.default_rng(0), SiteProfile.of(0, seed=0).organ)
    for label in (1, 2):
        sizes = []
        for site in range(3):
            scanner = SiteProfile.of(site, seed=0).scanner
            sizes.append((body.tissues(scanner.points()) == label).sum() * np.prod(scanner.spacing))
        assert max(sizes) / min(sizes) < 1.05


@pytest.mark.parametrize("organs", [False, True])
@pytest.mark.parametrize("site", range(8))
def test_lesions_are_never_lost_nor_merged(site: int, organs: bool) -> None:
    profile = SiteProfile.of(site, 0, organs)
    points = profile.scanner.points()
    for case in range(10):
        body = Anatomy.draw(profile.lesion_mix, np.random.default_rng(case), profile.organ)
        assert len(body.lesions) >= 1
        assert ndimage.label(body.tissues(points) == LABELS["lesion"], TOUCHING)[1] == len(body.lesions)


def test_a_lesion_between_the_voxels_takes_the_nearest_one() -> None:
    zeros = np.zeros((1, 3))
    lesions = np.array([[0.3, 0.4, 0.0, 0.01]])
    body = Anatomy(np.zeros(3), np.eye(3) * 5, waves=zeros, phases=np.zeros(1), shifts=zeros, lesions=lesions)
    points = np.stack(np.meshgrid([-1.0, 0.0, 1.0], [-1.0, 0.0, 1.0], [0.0], indexing="ij"), axis=-1)
    labels = body.tissues(points)
    assert np.argwhere(labels == LABELS["lesion"]).tolist() == [[1, 1, 0]]


def test_a_cyst_is_inside_the_organ_apart_from_lesions_and_labelled_as_organ() -> None:
    points = SiteProfile.of(0, seed=0).scanner.points()
    for site in range(8):
        profile = SiteProfile.of(site, 0, organs=True)
        body = Anatomy.draw(profile.lesion_mix, np.random.default_rng(3), profile.organ)
        tissues = body.tissues(points)
        assert 1 <= len(body.cysts) <= 3
        assert (tissues == CYST).any()
        near = ndimage.binary_dilation(tissues == CYST, TOUCHING)
        assert not (near & (tissues == LABELS["lesion"])).any()
        labels = labels_of(tissues)
        assert labels.dtype == np.uint8
        assert set(labels[tissues == CYST]) == {LABELS["organ"]}
        assert np.array_equal(labels[tissues != CYST], tissues[tissues != CYST])


def test_every_site_has_an_organ_of_its_own() -> None:
    organs = [Organ.of(site, seed=0) for site in range(26)]
    assert len({organ.name for organ in organs}) == 26
    assert [organ.shape for organ in organs[:8]] == [*SHAPES, *SHAPES]
    assert organs[:4] == [Organ.of(site, seed=1) for site in range(4)]
    assert organs[4] == Organ.of(4, seed=0) != Organ.of(4, seed=1)
    assert {organ.contrast > 0 for organ in organs[:4]} == {True, False}
    for organ in organs:
        lesion = organ.intensity + organ.contrast
        assert abs(organ.contrast) >= 0.3, "a lesion stands out of the organ"
        assert abs(lesion - organ.background) >= 0.2, "and out of what is around the organ"
        assert min(lesion, organ.intensity - organ.contrast) >= 0


def test_tissues_are_seen_as_the_organ_says() -> None:
    organ = Organ("x", ellipsoid, contrast=-0.3, intensity=0.7, background=0.2)
    tissues = np.arange(4, dtype=np.uint8).reshape(1, 1, 4)
    rng = np.random.default_rng(0)
    assert organ.seen(tissues, (1, 1, 1), rng).ravel() == pytest.approx([0.2, 0.7, 0.4, 1.0])
    tissues = np.repeat(np.array([0, 1], dtype=np.uint8), 16**3).reshape(32, 16, 16)
    grainy = Organ("x", ellipsoid, 0.3, texture=(0.05, 2.0)).seen(tissues, (1.0, 1.0, 1.0), rng)
    assert np.ptp(grainy[16:]) == 0, "the texture is around the organ"
    assert grainy[:16].std() == pytest.approx(0.05, rel=0.3)
    assert np.corrcoef(grainy[:15].ravel(), grainy[1:16].ravel())[0, 1] > 0.8, "neighbours are alike"
