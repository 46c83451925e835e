"""Built-in demo data: several hospitals, each with a scanner and a mix of lesion sizes of its own.

A body is analytic, in mm; each site's scanner samples it on its own voxel grid, so that differences in resolution are
real and no case is a resampled copy of another. Source: ours.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813
from rich.progress import track
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.split import new_folder

Floats = npt.NDArray[np.float64]

LABELS = {"background": 0, "organ": 1, "lesion": 2}
FIELD_OF_VIEW = 48.0
"""Edge of the imaged cube in mm, up to half a voxel."""
LESION_RADII = ((1.1, 1.7), (2.2, 3.5), (4.5, 6.5))
"""Range of a tiny, a medium and a large lesion's radius in mm."""
_GAP = 4.0
"""Least distance of two lesions in mm: more than the diagonal of the coarsest voxel, so that they never touch."""


@dataclass(frozen=True)
class Scanner:
    """How a site turns a body into an image; intensities are relative to :attr:`scale`."""

    spacing: tuple[float, float, float]
    """Voxel size in mm along x, y, z."""
    scale: float
    offset: float
    """Additive, in the units of the image."""
    contrast: float
    """Lesion minus organ; the organ is 0.3 above the background."""
    noise: float
    """Standard deviation of the white noise."""
    blur: float
    """Standard deviation of the point spread function in mm."""
    bias: float
    """Largest relative deviation of the bias field from 1."""

    @property
    def origin(self) -> tuple[float, float, float]:
        """Position of the first voxel in mm along x, y, z; the centre of the grid is at 0."""
        x, y, z = (-(round(FIELD_OF_VIEW / step) - 1) * step / 2 for step in self.spacing)
        return x, y, z

    def points(self) -> Floats:
        """Voxel centres in mm: float64 of shape (nz, ny, nx, 3), the last axis in the order x, y, z."""
        x, y, z = (
            start + step * np.arange(round(FIELD_OF_VIEW / step))
            for start, step in zip(self.origin, self.spacing, strict=True)
        )
        points: Floats = np.stack(np.broadcast_arrays(x, y[:, None], z[:, None, None]), axis=-1)
        return points

    def image(self, labels: npt.NDArray[np.uint8], rng: np.random.Generator) -> npt.NDArray[np.float32]:
        """Image of the labels on the grid of :meth:`points`, both of shape (nz, ny, nx)."""
        tissue = np.array([0.3, 0.6, 0.6 + self.contrast])[labels]
        seen = gaussian_filter(tissue, sigma=[self.blur / step for step in reversed(self.spacing)])
        direction = rng.normal(size=3)
        wave = direction / np.linalg.norm(direction) * np.pi / FIELD_OF_VIEW
        field = 1 + self.bias * np.sin(self.points() @ wave + rng.uniform(0, 2 * np.pi))
        noise = self.noise * rng.normal(size=labels.shape)
        return np.asarray(self.offset + self.scale * (seen * field + noise), dtype=np.float32)


@dataclass(frozen=True)
class SiteProfile:
    """What makes a site differ from the others."""

    scanner: Scanner
    lesion_mix: tuple[float, float, float]
    """Shares of tiny, medium and large lesions; their sum is 1."""

    @classmethod
    def of(cls, site: int, seed: int) -> SiteProfile:
        """Profile of a site by its index: the first three are fixed, further ones are drawn from the seed."""
        if site < len(_PROFILES):
            return _PROFILES[site]
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(site,)))
        x, z = rng.uniform(1.1, 1.5, size=2).round(2).tolist()
        scanner = Scanner(
            spacing=(x, x, z),
            scale=float(10 ** rng.uniform(1.5, 3)),
            offset=rng.uniform(0, 100),
            contrast=rng.uniform(0.3, 0.5),
            noise=rng.uniform(0.02, 0.06),
            blur=rng.uniform(0.3, 0.8),
            bias=rng.uniform(0, 0.25),
        )
        tiny, medium, large = rng.dirichlet([1, 1, 1]).tolist()
        return cls(scanner, (tiny, medium, large))


_PROFILES = (
    SiteProfile(Scanner((1.1, 1.1, 1.1), 400.0, 0.0, contrast=0.4, noise=0.03, blur=0.4, bias=0.05), (0.1, 0.3, 0.6)),
    SiteProfile(Scanner((1.2, 1.2, 1.5), 90.0, 50.0, contrast=0.3, noise=0.03, blur=0.6, bias=0.25), (0.4, 0.3, 0.3)),
    SiteProfile(Scanner((1.35, 1.35, 1.35), 900.0, 9.0, contrast=0.5, noise=0.05, blur=0.5, bias=0.1), (0.8, 0.2, 0.0)),
)


@dataclass(frozen=True)
class Anatomy:
    """One body around the origin: an ellipsoid with lesions, seen through a smooth deformation. Lengths in mm."""

    centre: Floats
    """Of the organ, shape (3,)."""
    axes: Floats
    """Semi-axes of the organ as rows, shape (3, 3)."""
    waves: Floats
    """Wave vectors of the deformation in radians per mm, shape (k, 3)."""
    phases: Floats
    """Of the waves in radians, shape (k,)."""
    shifts: Floats
    """Amplitudes of the waves, shape (k, 3)."""
    lesions: Floats
    """Centre and radius of each lesion, shape (n, 4)."""

    @classmethod
    def draw(cls, lesion_mix: tuple[float, float, float], rng: np.random.Generator) -> Anatomy:
        """A random body with two to four lesions, fewer where they find no room."""
        centre = rng.uniform(-2, 2, size=3)
        axes = np.diag(rng.uniform(12, 17, size=3)) @ Rotation.from_rotvec(rng.uniform(-0.6, 0.6, size=3)).as_matrix()
        kinds = rng.choice(len(LESION_RADII), size=rng.integers(2, 5), p=lesion_mix)
        lesions = np.empty((0, 4))
        for kind in sorted(kinds, reverse=True):  # large ones first, while there is room
            radius = rng.uniform(*LESION_RADII[kind])
            inside = rng.uniform(-1, 1, size=(100, 3))
            places = centre + inside[np.linalg.norm(inside, axis=1) < 0.85] @ axes
            distances = np.linalg.norm(places[:, None] - lesions[:, :3], axis=2)
            free = places[(distances > lesions[:, 3] + radius + _GAP).all(axis=1)]
            lesions = np.vstack([lesions, *(np.append(place, radius) for place in free[:1])])
        waves, shifts = rng.normal(0, 0.1, size=(4, 3)), rng.normal(0, 0.7, size=(4, 3))
        return cls(centre, axes, waves, rng.uniform(0, 2 * np.pi, size=4), shifts, lesions)

    def labels(self, points: Floats) -> npt.NDArray[np.uint8]:
        """Label of each point (..., 3), of shape (...); a lesion between all points takes the nearest one."""
        body: Floats = points + np.sin(points @ self.waves.T + self.phases) @ self.shifts
        radii = np.linalg.norm((body - self.centre) @ np.linalg.inv(self.axes), axis=-1)
        labels = np.asarray(radii < 1, dtype=np.uint8)
        for x, y, z, radius in self.lesions:
            distance = np.linalg.norm(body - (x, y, z), axis=-1)
            labels[distance <= max(radius, distance.min())] = LABELS["lesion"]
        return labels


def write_phantom(out: Path, sites: int = 3, cases: int = 16, seed: int = 0, test_cases: int = 6) -> dict[str, Path]:
    """Write ``out/site_a``, ``out/site_b``, ... in nnU-Net's raw layout, and a test set of all scanners ``out/test``.

    A case depends only on the seed, its site and its number, not on how many there are. Images are float32, labels
    uint8 (0 background, 1 organ, 2 lesion), about 48 mm along each axis in voxels of 1.1 to 1.5 mm.

    Args:
        out: new or empty folder.
        sites: number of sites, 1 to 26.
        cases: training cases of each site, at least 1.
        seed: of everything drawn at random, at least 0.
        test_cases: cases in ``out/test/imagesTs`` and ``labelsTs``, at least 1, from the sites' scanners in turn.

    Returns:
        Folder of each site by its name.

    Raises:
        ConfigurationError: ``out`` is not empty or cannot be made, or a number is out of its range.
    """
    if not 1 <= sites <= len(ascii_lowercase):
        raise ConfigurationError(f"The phantom has 1 to {len(ascii_lowercase)} sites, not {sites}.")
    for name, value, least in (("cases", cases, 1), ("test_cases", test_cases, 1), ("seed", seed, 0)):
        if value < least:
            raise ConfigurationError(f"The phantom's {name} is {value}: use at least {least}.")
    new_folder(out)
    names = [f"site_{letter}" for letter in ascii_lowercase[:sites]]
    folders = {name: out / name for name in names}
    for folder, count in [*((folder, cases) for folder in folders.values()), (out / "test", 0)]:
        folder.mkdir()
        _write_dataset_json(folder, count)
    training = [(folders[names[site]], site, "Tr", case) for site in range(sites) for case in range(cases)]
    test = [(out / "test", case % sites, "Ts", case // sites) for case in range(test_cases)]
    for folder, site, subset, case in track(training + test, description="Writing the phantom"):
        name = f"{names[site]}_{'test_' if subset == 'Ts' else ''}{case:03d}"
        _write_case(folder, subset, name, SiteProfile.of(site, seed), _rng(seed, site, subset, case))
    return folders


def _rng(seed: int, site: int, subset: str, case: int) -> np.random.Generator:
    key = (site, ("Tr", "Ts").index(subset), case)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _write_dataset_json(folder: Path, cases: int) -> None:
    dataset = {"channel_names": {"0": "MRI"}, "labels": LABELS, "numTraining": cases, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(dataset, indent=4) + "\n", encoding="utf-8")


def _write_case(folder: Path, subset: str, name: str, profile: SiteProfile, rng: np.random.Generator) -> None:
    scanner = profile.scanner
    labels = Anatomy.draw(profile.lesion_mix, rng).labels(scanner.points())
    for kind, file, array in (
        ("images", f"{name}_0000.nii.gz", scanner.image(labels, rng)),
        ("labels", f"{name}.nii.gz", labels),
    ):
        volume = sitk.GetImageFromArray(array)
        volume.SetSpacing(scanner.spacing)
        volume.SetOrigin(scanner.origin)
        path = folder / f"{kind}{subset}" / file
        path.parent.mkdir(exist_ok=True)
        sitk.WriteImage(volume, str(path))
