from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from scipy import ndimage

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.phantom import FIELD_OF_VIEW, LABELS, Anatomy, SiteProfile, write_phantom

TOUCHING = np.ones((3, 3, 3))


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_phantom(tmp_path_factory.mktemp("phantom"), sites=3, cases=8, test_cases=4)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.nii.gz")}


def volumes(site: Path) -> list[tuple[sitk.Image, sitk.Image]]:
    """Image and label of every training case."""
    return [
        (sitk.ReadImage(str(site / "imagesTr" / label.name.replace(".nii", "_0000.nii"))), sitk.ReadImage(str(label)))
        for label in sorted((site / "labelsTr").iterdir())
    ]


def lesion_sizes(site: Path) -> list[float]:
    """Volume of every lesion of a site in mm3."""
    sizes = []
    for _, label in volumes(site):
        components, count = ndimage.label(sitk.GetArrayFromImage(label) == LABELS["lesion"], TOUCHING)
        sizes += (np.bincount(components.ravel(), minlength=count + 1)[1:] * np.prod(label.GetSpacing())).tolist()
    return sizes


def test_layout_is_nnunets(phantom: dict[str, Path]) -> None:
    assert list(phantom) == ["site_a", "site_b", "site_c"]
    names = []
    for site in phantom.values():
        dataset = json.loads((site / "dataset.json").read_text())
        assert dataset == {
            "channel_names": {"0": "MRI"},
            "labels": {"background": 0, "organ": 1, "lesion": 2},
            "numTraining": 8,
            "file_ending": ".nii.gz",
        }
        cases = sorted(path.name.removesuffix(".nii.gz") for path in (site / "labelsTr").iterdir())
        assert sorted(path.name for path in (site / "imagesTr").iterdir()) == [f"{c}_0000.nii.gz" for c in cases]
        assert len(cases) == 8
        names += cases
    test = phantom["site_a"].parent / "test"
    names += [path.name.removesuffix(".nii.gz") for path in (test / "labelsTs").iterdir()]
    assert len(set(names)) == len(names) == 3 * 8 + 4
    assert (test / "dataset.json").is_file()
    assert len(list((test / "imagesTs").iterdir())) == 4


def test_same_seed_same_bytes_other_seed_other_bodies(tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        write_phantom(tmp_path / name, sites=1, cases=1, seed=seed, test_cases=1)
    one, two, other = (files(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert all(one[name] != other[name] for name in one)


def test_a_case_does_not_depend_on_the_counts(tmp_path: Path) -> None:
    write_phantom(tmp_path / "small", sites=2, cases=1, test_cases=1)
    write_phantom(tmp_path / "large", sites=4, cases=3, test_cases=5)
    small, large = files(tmp_path / "small"), files(tmp_path / "large")
    assert small.items() <= large.items()


def test_no_two_cases_are_alike(phantom: dict[str, Path]) -> None:
    labels = [path.read_bytes() for path in phantom["site_a"].parent.rglob("labels*/*.nii.gz")]
    assert len(set(labels)) == len(labels) == 3 * 8 + 4


def test_image_and_label_share_geometry_and_types(phantom: dict[str, Path]) -> None:
    for site in phantom.values():
        for image, label in volumes(site):
            assert image.GetPixelID() == sitk.sitkFloat32
            assert label.GetPixelID() == sitk.sitkUInt8
            assert image.GetSize() == label.GetSize()
            for geometry in ("GetSpacing", "GetOrigin", "GetDirection"):
                assert getattr(image, geometry)() == getattr(label, geometry)()
            assert set(np.unique(sitk.GetArrayFromImage(label))) == {0, 1, 2}
            assert np.isfinite(sitk.GetArrayFromImage(image)).all()


def test_sites_see_the_same_field_of_view_at_other_resolutions(phantom: dict[str, Path]) -> None:
    spacings = set()
    for site in phantom.values():
        (image, _), *_ = volumes(site)
        spacings.add(image.GetSpacing())
        edges = np.array(image.GetSize()) * image.GetSpacing()
        assert np.abs(edges - FIELD_OF_VIEW).max() <= max(image.GetSpacing()) / 2
    assert len(spacings) == 3


def test_the_grid_is_the_files_grid(phantom: dict[str, Path]) -> None:
    # site_b has anisotropic voxels: a mix-up of the axes shows
    (image, _), *_ = volumes(phantom["site_b"])
    points = SiteProfile.of(1, seed=0).scanner.points()
    assert points.shape == (*reversed(image.GetSize()), 3)
    for x, y, z in ((0, 0, 0), (5, 0, 0), (1, 7, 0), (2, 3, 11)):
        np.testing.assert_allclose(points[z, y, x], image.TransformIndexToPhysicalPoint((x, y, z)))


def test_one_body_has_one_size_under_every_scanner() -> None:
    body = Anatomy.draw((0, 0, 1), np.random.default_rng(0))
    for label in (1, 2):
        sizes = []
        for site in range(3):
            scanner = SiteProfile.of(site, seed=0).scanner
            sizes.append((body.labels(scanner.points()) == label).sum() * np.prod(scanner.spacing))
        assert max(sizes) / min(sizes) < 1.05


def test_every_lesion_is_seen(phantom: dict[str, Path]) -> None:
    for site in phantom.values():
        for image, label in volumes(site):
            intensity, labels = sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(label)
            components, count = ndimage.label(labels == LABELS["lesion"], TOUCHING)
            organ = intensity[labels == LABELS["organ"]]
            assert (ndimage.mean(intensity, components, range(1, count + 1)) > np.median(organ) + organ.std()).all()


@pytest.mark.parametrize("site", range(6))
def test_lesions_are_never_lost_nor_merged(site: int) -> None:
    profile = SiteProfile.of(site, seed=0)
    points = profile.scanner.points()
    for case in range(10):
        body = Anatomy.draw(profile.lesion_mix, np.random.default_rng(case))
        assert len(body.lesions) >= 1
        assert ndimage.label(body.labels(points) == LABELS["lesion"], TOUCHING)[1] == len(body.lesions)


def test_a_lesion_between_the_voxels_takes_the_nearest_one() -> None:
    zeros = np.zeros((1, 3))
    lesions = np.array([[0.3, 0.4, 0.0, 0.01]])
    body = Anatomy(np.zeros(3), np.eye(3) * 5, waves=zeros, phases=np.zeros(1), shifts=zeros, lesions=lesions)
    points = np.stack(np.meshgrid([-1.0, 0.0, 1.0], [-1.0, 0.0, 1.0], [0.0], indexing="ij"), axis=-1)
    labels = body.labels(points)
    assert np.argwhere(labels == LABELS["lesion"]).tolist() == [[1, 1, 0]]


def test_sites_differ_in_lesion_sizes(phantom: dict[str, Path]) -> None:
    large, mixed, tiny = (np.median(lesion_sizes(phantom[site])) for site in ("site_a", "site_b", "site_c"))
    assert large > 3 * mixed > 9 * tiny


def test_further_sites_follow_the_seed() -> None:
    assert SiteProfile.of(2, seed=0) == SiteProfile.of(2, seed=1)
    assert SiteProfile.of(3, seed=0) == SiteProfile.of(3, seed=0)
    assert len({SiteProfile.of(3, seed=0), SiteProfile.of(3, seed=1), SiteProfile.of(4, seed=0)}) == 3
    for site in range(26):
        assert sum(SiteProfile.of(site, seed=0).lesion_mix) == pytest.approx(1)


def test_refuses_a_folder_with_content(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ConfigurationError, match="not empty"):
        write_phantom(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"sites": 0}, "1 to 26 sites"),
        ({"sites": 27}, "1 to 26 sites"),
        ({"cases": 0}, "cases is 0"),
        ({"test_cases": 0}, "test_cases is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_refuses_numbers_out_of_range(tmp_path: Path, option: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        write_phantom(tmp_path / "out", **option)
    assert not (tmp_path / "out").exists()
