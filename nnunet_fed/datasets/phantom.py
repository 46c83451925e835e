"""Built-in demo data: several hospitals, each with a scanner and a mix of lesion sizes, or an organ, of its own.

A body is analytic, in mm (:mod:`nnunet_fed.datasets.phantom_bodies`); each site's scanner samples it on its own voxel
grid, so that differences in resolution are real and no case is a resampled copy of another. Source: ours.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813
from rich.progress import track
from scipy.ndimage import gaussian_filter

from nnunet_fed.datasets.phantom_bodies import LABELS, Anatomy, Floats, Organ, ellipsoid, labels_of
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.files import new_folder, write_json

FIELD_OF_VIEW = 48.0
"""Edge of the imaged cube in mm, up to half a voxel."""
TEST_CASES = 6
COARSEST = 3.0


@dataclass(frozen=True)
class Scanner:
    """How a site turns what a body shows into an image; noise is relative to :attr:`scale`."""

    spacing: tuple[float, float, float]
    """Voxel size in mm along x, y, z."""
    scale: float
    offset: float
    """Additive, in the units of the image."""
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

    def image(self, body: Floats, rng: np.random.Generator) -> npt.NDArray[np.float32]:
        """Image of a body's intensities on the grid of :meth:`points`, both of shape (nz, ny, nx)."""
        seen = gaussian_filter(body, sigma=[self.blur / step for step in reversed(self.spacing)])
        direction = rng.normal(size=3)
        wave = direction / np.linalg.norm(direction) * np.pi / FIELD_OF_VIEW
        field = 1 + self.bias * np.sin(self.points() @ wave + rng.uniform(0, 2 * np.pi))
        noise = self.noise * rng.normal(size=body.shape)
        return np.asarray(self.offset + self.scale * (seen * field + noise), dtype=np.float32)


@dataclass(frozen=True)
class SiteProfile:
    """What makes a site differ from the others."""

    scanner: Scanner
    lesion_mix: tuple[float, float, float]
    """Shares of tiny, medium and large lesions; their sum is 1."""
    organ: Organ

    @classmethod
    def of(cls, site: int, seed: int, organs: bool = False) -> SiteProfile:
        """Profile of a site by its index: the first ones are fixed, further ones are drawn from the seed.

        Args:
            site: its index.
            seed: of what is drawn.
            organs: an organ of its own and the lesions of all, instead of lesions of its own in the organ of all.
        """
        profile = _PROFILES[site] if site < len(_PROFILES) else cls._drawn(site, seed)
        return cls(profile.scanner, _COMMON_MIX, Organ.of(site, seed)) if organs else profile

    def coarser(self, factor: float) -> SiteProfile:
        """The same, in voxels whose edges are so many times as long."""
        x, y, z = self.scanner.spacing
        return replace(self, scanner=replace(self.scanner, spacing=(factor * x, factor * y, factor * z)))

    def in_phase(self, phase: int) -> SiteProfile:
        """The same in one of :data:`PHASES`."""
        background, intensity, sign = PHASES[phase]
        contrast = sign * abs(self.organ.contrast)
        return replace(self, organ=replace(self.organ, contrast=contrast, intensity=intensity, background=background))

    @classmethod
    def _drawn(cls, site: int, seed: int) -> SiteProfile:
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(site,)))
        x, z = rng.uniform(1.1, 1.5, size=2).round(2).tolist()
        scale, offset = float(10 ** rng.uniform(1.5, 3)), rng.uniform(0, 100)
        organ = _organ(contrast=rng.uniform(0.3, 0.5))
        noise, blur, bias = rng.uniform(0.02, 0.06), rng.uniform(0.3, 0.8), rng.uniform(0, 0.25)
        tiny, medium, large = rng.dirichlet([1, 1, 1]).tolist()
        return cls(Scanner((x, x, z), scale, offset, noise, blur, bias), (tiny, medium, large), organ)


def _organ(contrast: float) -> Organ:
    return Organ("organ", ellipsoid, contrast)


_PROFILES = (
    SiteProfile(Scanner((1.1, 1.1, 1.1), 400.0, 0.0, noise=0.03, blur=0.4, bias=0.05), (0.1, 0.3, 0.6), _organ(0.4)),
    SiteProfile(Scanner((1.2, 1.2, 1.5), 90.0, 50.0, noise=0.03, blur=0.6, bias=0.25), (0.4, 0.3, 0.3), _organ(0.3)),
    SiteProfile(Scanner((1.35, 1.35, 1.35), 900.0, 9.0, noise=0.05, blur=0.5, bias=0.1), (0.8, 0.2, 0.0), _organ(0.5)),
)
_COMMON_MIX = (0.1, 0.5, 0.4)
"""Of lesions that are of one kind in all organs."""
PHASES = ((0.3, 0.6, 1), (0.3, 0.9, -1), (1.1, 0.6, -1), (1.1, 0.8, 1))
"""Of a contrast agent: intensity of the background, that of the organ, and the sign of a lesion's contrast."""


def write_phantom(
    out: Path,
    sites: int = 3,
    cases: int | Sequence[int] = 16,
    seed: int = 0,
    test_cases: int | None = None,
    organs: bool = False,
    val_cases: int = 0,
    phases: int = 1,
    coarse: float = 1.0,
) -> dict[str, Path]:
    """Write ``out/site_a``, ``out/site_b``, ... in nnU-Net's raw layout, and a test set of all scanners ``out/test``.

    A case depends only on the seed, its site and its number, not on how many there are. Images are float32, labels
    uint8 (0 background, 1 organ, 2 lesion), about 48 mm along each axis in voxels of 1.1 to 1.5 mm.

    With ``organs`` the lesions are of one kind, but every site has another organ, after which its label 1 is named:
    another shape, darker or brighter than what is around it, with darker or brighter lesions. Among the lesions lie
    cysts, which only the contrast of that organ tells from lesions; they are labelled as organ. The labels of the test
    set are those of an organ-agnostic task, 0 background and 1 lesion, into which ``labels = { lesion = "lesion" }``
    in ``site.toml`` maps each site's.

    Args:
        out: new or empty folder.
        sites: number of sites, 1 to 26.
        cases: training cases of each site, at least 1: one number for all, or one for each in turn.
        seed: of everything drawn at random, at least 0.
        test_cases: cases in ``out/test/imagesTs`` and ``labelsTs``, at least 1, from the sites in turn; ``None``: 6,
            or more if it takes more to have one of every organ.
        organs: every site another organ.
        val_cases: further cases of each site, kept apart for validation by fold 0 of its ``splits_final.json``: so a
            site with few training cases is validated on as many as the others. 0: nnU-Net splits the training cases.
        phases: of a contrast agent, 1 to 4, in one of which each case is imaged, drawn evenly: in each the organ is
            darker or brighter than what is around it, and lesions are darker or brighter than the organ. So what a
            site with few cases sees is not all that there is. Not with ``organs``, which differ in just that.
        coarse: voxels so many times as long along each axis, 1 to 3: of the same bodies smaller images, on which a
            processor trains in less time.

    Returns:
        Folder of each site by its name.

    Raises:
        ConfigurationError: ``out`` is not empty or cannot be made, or a number is out of its range.
    """
    if test_cases is None:
        test_cases = max(TEST_CASES, sites) if organs else TEST_CASES
    if not 1 <= sites <= len(ascii_lowercase):
        raise ConfigurationError(f"The phantom has 1 to {len(ascii_lowercase)} sites, not {sites}.")
    sizes = [cases] * sites if isinstance(cases, int) else list(cases)
    if len(sizes) != sites:
        raise ConfigurationError(
            f"The phantom has {sites} sites, but {len(sizes)} numbers of cases: give one for all, or one each."
        )
    limits = (("cases", min(sizes), 1), ("test_cases", test_cases, 1), ("seed", seed, 0), ("val_cases", val_cases, 0))
    for name, value, least in limits:
        if value < least:
            raise ConfigurationError(f"The phantom's {name} is {value}: use at least {least}.")
    if not 1 <= phases <= len(PHASES):
        raise ConfigurationError(f"The phantom's phases are {phases}: use 1 to {len(PHASES)}.")
    if not 1 <= coarse <= COARSEST:
        raise ConfigurationError(f"The phantom's voxels cannot be {coarse:g} times as long: use 1 to {COARSEST:g}.")
    if organs and phases > 1:
        raise ConfigurationError("The phantom has several phases, or an organ of each site, not both.")
    new_folder(out)
    profiles = [SiteProfile.of(site, seed, organs).coarser(coarse) for site in range(sites)]
    names = [f"site_{letter}" for letter in ascii_lowercase[:sites]]
    folders = {name: out / name for name in names}
    for name, profile, size in zip(names, profiles, sizes, strict=True):
        _write_dataset_json(folders[name], size + val_cases, ["background", profile.organ.name, "lesion"])
        if val_cases:
            own = [f"{name}_{case:03d}" for case in range(size + val_cases)]
            splits = json.dumps([{"train": own[:size], "val": own[size:]}], indent=4)
            (folders[name] / "splits_final.json").write_text(splits + "\n", encoding="utf-8")
    _write_dataset_json(out / "test", 0, ["background", "lesion"] if organs else list(LABELS))
    training = [
        (folders[names[site]], site, "Tr", case) for site, size in enumerate(sizes) for case in range(size + val_cases)
    ]
    test = [(out / "test", case % sites, "Ts", case // sites) for case in range(test_cases)]
    for folder, site, subset, case in track(training + test, description="Writing the phantom"):
        name = f"{names[site]}_{'test_' if subset == 'Ts' else ''}{case:03d}"
        lesions_only = organs and subset == "Ts"
        profile, (body, phase) = profiles[site], _streams(seed, site, subset, case)
        if phases > 1:
            profile = profile.in_phase(int(phase.integers(phases)))
        _write_case(folder, subset, name, profile, body, lesions_only)
    return folders


def _streams(seed: int, site: int, subset: str, case: int) -> tuple[np.random.Generator, np.random.Generator]:
    """Random numbers of a case for its body, and for its phase."""
    key = (site, ("Tr", "Ts").index(subset), case)
    body, phase = (np.random.SeedSequence(seed, spawn_key=one) for one in (key, (*key, 0)))
    return np.random.default_rng(body), np.random.default_rng(phase)


def _write_dataset_json(folder: Path, cases: int, names: list[str]) -> None:
    folder.mkdir()
    labels = {name: value for value, name in enumerate(names)}
    dataset = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": cases, "file_ending": ".nii.gz"}
    write_json(folder / "dataset.json", dataset, indent=4)


def _write_case(
    folder: Path, subset: str, name: str, profile: SiteProfile, rng: np.random.Generator, lesions_only: bool
) -> None:
    scanner = profile.scanner
    tissues = Anatomy.draw(profile.lesion_mix, rng, profile.organ).tissues(scanner.points())
    image = scanner.image(profile.organ.seen(tissues, scanner.spacing, rng), rng)
    labels = (tissues == LABELS["lesion"]).astype(np.uint8) if lesions_only else labels_of(tissues)
    for kind, file, array in (("images", f"{name}_0000.nii.gz", image), ("labels", f"{name}.nii.gz", labels)):
        volume = sitk.GetImageFromArray(array)
        volume.SetSpacing(scanner.spacing)
        volume.SetOrigin(scanner.origin)
        path = folder / f"{kind}{subset}" / file
        path.parent.mkdir(exist_ok=True)
        sitk.WriteImage(volume, str(path))
