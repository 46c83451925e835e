from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from scipy import ndimage

from nnunet_fed.datasets.phantom import FIELD_OF_VIEW, SiteProfile, write_phantom
from nnunet_fed.datasets.phantom_bodies import LABELS, Organ
from nnunet_fed.errors import ConfigurationError

TOUCHING = np.ones((3, 3, 3))


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_phantom(tmp_path_factory.mktemp("phantom"), sites=3, cases=8, test_cases=4)


@pytest.fixture(scope="module")
def organs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_phantom(tmp_path_factory.mktemp("organs"), sites=7, cases=4, organs=True)


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


def test_coarse_images_show_the_same_bodies_in_fewer_voxels(tmp_path: Path) -> None:
    fine = write_phantom(tmp_path / "fine", cases=2, test_cases=1)
    coarse = write_phantom(tmp_path / "coarse", cases=2, test_cases=1, coarse=1.5)
    for name, folder in fine.items():
        for path in (folder / "labelsTr").iterdir():
            one, other = (sitk.ReadImage(str(at)) for at in (path, coarse[name] / "labelsTr" / path.name))
            np.testing.assert_allclose(np.array(other.GetSpacing()), 1.5 * np.array(one.GetSpacing()))
            volumes, counts = [], []
            for image in (one, other):
                voxels = np.bincount(sitk.GetArrayFromImage(image).ravel(), minlength=3)[1:]
                volumes.append(voxels * np.prod(image.GetSpacing()))
                counts.append(image.GetNumberOfPixels())
            assert counts[1] < counts[0] / 2.5
            assert volumes[1][0] == pytest.approx(volumes[0][0], rel=0.05)
            assert volumes[1][1] > 0, "every lesion has a voxel"


def test_a_case_does_not_depend_on_the_counts(tmp_path: Path) -> None:
    write_phantom(tmp_path / "small", sites=2, cases=1, test_cases=1)
    write_phantom(tmp_path / "large", sites=4, cases=3, test_cases=5)
    small, large = files(tmp_path / "small"), files(tmp_path / "large")
    assert small.items() <= large.items()


def test_sites_of_unequal_size_with_validation_cases_of_their_own(tmp_path: Path) -> None:
    sizes = {"site_a": 1, "site_b": 3, "site_c": 2}
    unequal = write_phantom(tmp_path / "unequal", cases=list(sizes.values()), test_cases=1, val_cases=2)
    equal = files(write_phantom(tmp_path / "equal", cases=3, test_cases=1)["site_b"].parent)
    assert list(unequal) == list(sizes)
    for name, folder in unequal.items():
        cases = sorted(path.name.removesuffix(".nii.gz") for path in (folder / "labelsTr").iterdir())
        [fold] = json.loads((folder / "splits_final.json").read_text())
        assert [*fold["train"], *fold["val"]] == cases
        assert (len(fold["train"]), len(fold["val"])) == (sizes[name], 2)
        assert json.loads((folder / "dataset.json").read_text())["numTraining"] == len(cases)
    written = files(tmp_path / "unequal")
    assert [name for name in equal if "site_b_002" in name]
    assert all(written[name] == content for name, content in equal.items() if "site_b" in name), "no other case"


def test_in_each_phase_organ_and_lesion_look_different_and_the_body_is_the_same(tmp_path: Path) -> None:
    one = write_phantom(tmp_path / "one", sites=2, cases=9, test_cases=1)
    four = write_phantom(tmp_path / "four", sites=2, cases=9, test_cases=1, phases=4)
    seen = set()
    for name, folder in four.items():
        for (_, alone), (image, label) in zip(volumes(one[name]), volumes(folder), strict=True):
            tissues, intensity = sitk.GetArrayFromImage(label), sitk.GetArrayFromImage(image)
            assert (tissues == sitk.GetArrayFromImage(alone)).all()
            background, organ, lesion = (np.median(intensity[tissues == value]) for value in LABELS.values())
            seen.add((bool(organ > background), bool(lesion > organ)))
    assert len(seen) == 4
    again = write_phantom(tmp_path / "again", sites=1, cases=2, test_cases=1, phases=4)
    assert files(again["site_a"]).items() <= files(four["site_a"]).items(), "whatever the counts"


def test_phases_are_one_to_four_and_not_of_several_organs(tmp_path: Path) -> None:
    for wrong in (0, 5):
        with pytest.raises(ConfigurationError, match=f"phases are {wrong}: use 1 to 4"):
            write_phantom(tmp_path / "out", phases=wrong)
    with pytest.raises(ConfigurationError, match="not both"):
        write_phantom(tmp_path / "out", phases=2, organs=True)
    assert not (tmp_path / "out").exists()


def test_as_many_sizes_as_sites(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="has 3 sites, but 2 numbers of cases"):
        write_phantom(tmp_path / "out", cases=[4, 8])
    with pytest.raises(ConfigurationError, match="cases is 0: use at least 1"):
        write_phantom(tmp_path / "out", cases=[4, 0, 8])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("site", "body", "voxels"),
    [
        ("site_a", "803ba3344138ae54", (143.07767755, 53.32573535, 240.90639)),
        ("site_d", "d616694de8937ae0", (79.78091905, 21.65413359, 133.99191)),
    ],
)
def test_what_was_measured_on_can_be_written_again(
    tmp_path: Path, site: str, body: str, voxels: tuple[float, ...]
) -> None:
    """Label for label; the last bits of an image may differ between processors. Figures in the docs are of these."""
    folder = write_phantom(tmp_path, sites=4, cases=1, test_cases=1)[site]
    [(image, label)] = volumes(folder)
    intensity = sitk.GetArrayFromImage(image).astype(float)
    assert hashlib.sha256(sitk.GetArrayFromImage(label).tobytes()).hexdigest().startswith(body)
    assert (intensity.mean(), intensity.std(), intensity[20, 21, 22]) == pytest.approx(voxels, rel=1e-6)


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


def test_every_lesion_is_seen(phantom: dict[str, Path]) -> None:
    for site in phantom.values():
        for image, label in volumes(site):
            intensity, labels = sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(label)
            components, count = ndimage.label(labels == LABELS["lesion"], TOUCHING)
            organ = intensity[labels == LABELS["organ"]]
            assert (ndimage.mean(intensity, components, range(1, count + 1)) > np.median(organ) + organ.std()).all()


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
        ({"coarse": 0.5}, "cannot be 0.5 times as long: use 1 to 3"),
        ({"coarse": float("nan")}, "cannot be nan times as long"),
    ],
)
def test_refuses_numbers_out_of_range(tmp_path: Path, option: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        write_phantom(tmp_path / "out", **option)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------- organs


def test_labels_name_the_organ_and_the_test_set_is_agnostic(organs: dict[str, Path]) -> None:
    for number, site in enumerate(organs.values()):
        labels = json.loads((site / "dataset.json").read_text())["labels"]
        assert labels == {"background": 0, Organ.of(number, seed=0).name: 1, "lesion": 2}
        for _, label in volumes(site):
            assert set(np.unique(sitk.GetArrayFromImage(label))) == {0, 1, 2}
    test = organs["site_a"].parent / "test"
    content = json.loads((test / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "lesion": 1}
    references = sorted((test / "labelsTs").iterdir())
    assert [path.name for path in references] == [f"{site}_test_000.nii.gz" for site in organs], "one of every organ"
    assert len(list((test / "imagesTs").iterdir())) == len(references)
    for path in references:
        assert set(np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(path))))) == {0, 1}


def test_lesions_of_every_organ_are_seen_brighter_or_darker_but_of_one_kind(organs: dict[str, Path]) -> None:
    for number, site in enumerate(organs.values()):
        brighter = Organ.of(number, seed=0).contrast > 0
        for image, label in volumes(site):
            intensity, labels = sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(label)
            organ = intensity[labels == LABELS["organ"]]
            middle = np.median(organ)
            noise = 1.4826 * np.median(np.abs(organ - middle))  # cysts do not count
            components, count = ndimage.label(labels == LABELS["lesion"], TOUCHING)
            contrast = (ndimage.mean(intensity, components, range(1, count + 1)) - middle) / noise
            assert ((contrast if brighter else -contrast) > 1).all()
    mixes = {SiteProfile.of(site, 0, organs=True).lesion_mix for site in range(26)}
    assert len(mixes) == 1


def test_organs_are_seen_by_the_same_scanners() -> None:
    for site in range(6):
        assert SiteProfile.of(site, 0, organs=True).scanner == SiteProfile.of(site, 0).scanner
