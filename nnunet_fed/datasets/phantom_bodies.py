"""The bodies of the built-in demo data: an organ with lesions of known sizes, analytic and in mm. Source: ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

Floats = npt.NDArray[np.float64]
Shape = Callable[[Floats], Floats]
"""Level of points (..., 3) in the coordinates of an organ, of shape (...): below 1 inside; all of it is within ±1."""

LABELS = {"background": 0, "organ": 1, "lesion": 2}
CYST = 3
"""Tissue that is no label: part of the organ to whoever labels it."""
LESION_RADII = ((1.1, 1.7), (2.2, 3.5), (4.5, 6.5))
"""Range of a tiny, a medium and a large lesion's radius in mm."""
_GAP = 4.0
"""Least distance of two lesions in mm: more than the diagonal of the coarsest voxel, so that they never touch."""
_DEPTH = 0.85
"""Level up to which the centre of a lesion lies in its organ."""


def ellipsoid(points: Floats) -> Floats:
    """A ball, before an organ's axes stretch it."""
    level: Floats = np.linalg.norm(points, axis=-1)
    return level


def banana(points: Floats) -> Floats:
    """A body that is bent along its first axis."""
    x, y, z = np.moveaxis(points, -1, 0)
    level: Floats = np.sqrt(x**2 + ((y - 0.9 * x**2 + 0.4) / 0.55) ** 2 + (z / 0.65) ** 2)
    return level


def two_lobes(points: Floats) -> Floats:
    """Two bodies side by side along the first axis, with a waist between them."""
    x, y, z = np.moveaxis(points, -1, 0)
    level: Floats = np.sqrt(((np.abs(x) - 0.47) / 0.53) ** 2 + (y / 0.95) ** 2 + (z / 0.75) ** 2)
    return level


def tube(points: Floats) -> Floats:
    """A wall around a hollow along the third axis, open at both ends."""
    radius = np.linalg.norm(points[..., :2], axis=-1)
    level: Floats = np.maximum(np.abs(radius - 0.65) / 0.35, np.abs(points[..., 2]))
    return level


@dataclass(frozen=True)
class Organ:
    """An organ by shape and by what an image shows of it; intensities are relative to the scanner's scale."""

    name: str
    shape: Shape
    contrast: float
    """Lesion minus organ. A cyst, which is no lesion, has the opposite."""
    intensity: float = 0.6
    background: float = 0.3
    proportions: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Factors of the three semi-axes."""
    texture: tuple[float, float] = (0.0, 1.0)
    """Of the background: standard deviation, and length in mm over which it varies."""
    cysts: int = 0
    """Most cysts of a body; with any there is at least one."""

    @classmethod
    def of(cls, site: int, seed: int) -> Organ:
        """Organ of a site by its index: the first four are fixed, further ones are their shapes in another draw."""
        organ = _ORGANS[site % len(_ORGANS)]
        if site < len(_ORGANS):
            return organ
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(site, 0)))
        background = 1.1  # the darkest cyst stays above 0
        intensity = background + rng.choice((-1, 1)) * rng.uniform(0.6, 0.7)
        x, y, z = (rng.uniform(0.85, 1.1, size=3) * organ.proportions).tolist()
        return replace(
            organ,
            name=f"{organ.name}_{site // len(_ORGANS) + 1}",
            contrast=float(rng.choice((-1, 1)) * rng.uniform(0.3, 0.4)),
            intensity=float(intensity),
            background=background,
            proportions=(x, y, z),
            texture=(rng.uniform(0.02, 0.06), rng.uniform(1, 3)),
        )

    def seen(self, tissues: npt.NDArray[np.uint8], spacing: tuple[float, ...], rng: np.random.Generator) -> Floats:
        """Intensities of tissues before a scanner adds its own, both of shape (nz, ny, nx).

        Args:
            tissues: of :meth:`Anatomy.tissues`.
            spacing: of their grid in mm along x, y, z.
            rng: for the texture.
        """
        lesion, cyst = self.intensity + self.contrast, self.intensity - self.contrast
        values: Floats = np.array([self.background, self.intensity, lesion, cyst])[tissues]
        strength, length = self.texture
        if strength:
            grain = gaussian_filter(rng.normal(size=tissues.shape), sigma=[length / step for step in reversed(spacing)])
            values += strength * grain / grain.std() * (tissues == LABELS["background"])
        return values


_ORGANS = (
    Organ("liver", ellipsoid, 0.35, intensity=0.6, background=0.3, texture=(0.02, 3.0), cysts=3),
    Organ("kidney", banana, -0.35, 0.9, background=0.3, proportions=(1.1, 1.25, 1.25), texture=(0.05, 1.5), cysts=3),
    Organ("thyroid", two_lobes, 0.3, 0.3, background=0.9, proportions=(1.1, 1.1, 1.1), texture=(0.06, 2.0), cysts=3),
    Organ("bowel", tube, -0.35, intensity=0.5, background=0.8, texture=(0.04, 1.0), cysts=3),
)


@dataclass(frozen=True)
class Anatomy:
    """One body around the origin: an organ with lesions, seen through a smooth deformation. Lengths in mm."""

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
    shape: Shape = ellipsoid
    cysts: Floats = field(default_factory=lambda: np.empty((0, 4)))
    """Centre and radius of each cyst, shape (m, 4)."""

    @classmethod
    def draw(cls, lesion_mix: tuple[float, float, float], rng: np.random.Generator, organ: Organ) -> Anatomy:
        """A random body with two to four lesions, fewer where they find no room; cysts are as large as lesions."""
        centre = rng.uniform(-2, 2, size=3)
        axes = np.diag(rng.uniform(12, 17, size=3)) @ Rotation.from_rotvec(rng.uniform(-0.6, 0.6, size=3)).as_matrix()
        axes = np.array(organ.proportions)[:, None] * axes

        def scatter(least: int, most: int, taken: Floats) -> Floats:
            """Balls in the organ that keep away from those that are there, each (x, y, z, radius)."""
            kinds = rng.choice(len(LESION_RADII), size=rng.integers(least, most + 1), p=lesion_mix)
            balls = taken
            for kind in sorted(kinds, reverse=True):  # large ones first, while there is room
                radius = rng.uniform(*LESION_RADII[kind])
                inside = rng.uniform(-1, 1, size=(100, 3))
                places = centre + inside[organ.shape(inside) < _DEPTH] @ axes
                distances = np.linalg.norm(places[:, None] - balls[:, :3], axis=2)
                free = places[(distances > balls[:, 3] + radius + _GAP).all(axis=1)]
                balls = np.vstack([balls, *(np.append(place, radius) for place in free[:1])])
            return balls[len(taken) :]

        lesions = scatter(2, 4, np.empty((0, 4)))
        waves, shifts = rng.normal(0, 0.1, size=(4, 3)), rng.normal(0, 0.7, size=(4, 3))
        phases = rng.uniform(0, 2 * np.pi, size=4)
        cysts = scatter(1, organ.cysts, lesions) if organ.cysts else np.empty((0, 4))
        return cls(centre, axes, waves, phases, shifts, lesions, organ.shape, cysts)

    def tissues(self, points: Floats) -> npt.NDArray[np.uint8]:
        """Tissue at each point (..., 3), of shape (...): a label, or :data:`CYST`, which is inside the organ only.

        A lesion between all points takes the nearest one.
        """
        body: Floats = points + np.sin(points @ self.waves.T + self.phases) @ self.shifts
        tissues = np.asarray(self.shape((body - self.centre) @ np.linalg.inv(self.axes)) < 1, dtype=np.uint8)
        for x, y, z, radius in self.cysts:
            cyst = np.linalg.norm(body - (x, y, z), axis=-1) <= radius
            tissues[cyst & (tissues == LABELS["organ"])] = CYST
        for x, y, z, radius in self.lesions:
            distance = np.linalg.norm(body - (x, y, z), axis=-1)
            tissues[distance <= max(radius, distance.min())] = LABELS["lesion"]
        return tissues


def labels_of(tissues: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Labels of tissues: a cyst is labelled as organ."""
    return np.where(tissues == CYST, np.uint8(LABELS["organ"]), tissues)
