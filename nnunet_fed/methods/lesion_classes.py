"""Where lesions stand in nnU-Net's targets, and how small they are: what FedGS reads from a patch.

Source: see :mod:`nnunet_fed.methods.fedgs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nnunet_fed.errors import ConfigurationError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LesionClasses:
    """Where the classes that are scaled stand in a target of nnU-Net."""

    names: tuple[str, ...]
    indices: tuple[int, ...]
    """Label of each class, or its channel in a target of regions."""
    regions: bool = False
    """The target has a channel for each region, and one more for ignored voxels if there are any."""
    ignore: int | None = None
    """Label of ignored voxels; of regions only whether there is one matters."""
    truncation_guard: bool = True
    """In 3D a class that touches a face of the patch is no small lesion: it may be the corner of a large organ."""

    @classmethod
    def named(
        cls,
        names: Sequence[str] | None,
        labels: Mapping[str, Any],
        regions: bool = False,
        ignore: int | None = None,
        truncation_guard: bool = True,
    ) -> LesionClasses:
        """Find classes among those of a data set.

        Args:
            names: of the classes; ``None``: all but the background.
            labels: ``labels`` of dataset.json.
            regions: see the class, as for the arguments that follow.
            ignore: see there.
            truncation_guard: see there.

        Raises:
            ConfigurationError: the data set has no such class.
        """
        values = {name: value for name, value in labels.items() if name != "ignore"}
        foreground = [name for name, value in values.items() if np.any(np.asarray(value) != 0)]
        names = tuple(foreground if names is None else names)
        unknown = [name for name in names if name not in foreground]
        if unknown:
            raise ConfigurationError(
                f"The study's method table names the class {', '.join(unknown)} in 'classes', but dataset.json has "
                f"{', '.join(foreground)}. Correct it in federation.toml, and plan again."
            )
        indices = tuple(foreground.index(name) if regions else int(values[name]) for name in names)
        return cls(names, indices, regions, ignore, truncation_guard)

    def numbers(self, option: str, value: float | Mapping[str, float]) -> Floats:
        """An option's value for each class.

        Args:
            option: its name, for the error.
            value: one number for all classes, or one for each by its name.

        Raises:
            ConfigurationError: the names are not those of the classes.
        """
        by_name = value if isinstance(value, Mapping) else dict.fromkeys(self.names, value)
        if set(by_name) != set(self.names):
            raise ConfigurationError(
                f"The study's method table has '{option}' for {', '.join(by_name)}, but the lesion classes are "
                f"{', '.join(self.names)}: give a number for each of them, or one for all."
            )
        return np.array([by_name[name] for name in self.names])

    def inverse_areas(self, target: torch.Tensor | Sequence[torch.Tensor]) -> Floats:
        """The source's a^-1 of each sample and class: valid voxels over voxels of the class.

        Args:
            target: (samples, 1, ...) of labels or (samples, regions, ...), of any dtype; of a list only the first
                entry, the full resolution, matters.

        Returns:
            (samples, classes); not a number where the class is absent, and 0 where the guard applies.
        """
        full = target if isinstance(target, torch.Tensor) else target[0]
        return np.array([self._of_sample(sample) for sample in full.numpy(force=True)], dtype=np.float64)

    def _of_sample(self, sample: npt.NDArray[Any]) -> list[float]:
        ignored = None
        if self.ignore is not None:
            ignored = sample[-1] != 0 if self.regions else sample[0] == self.ignore
        valid = sample[0].size - (0 if ignored is None else np.count_nonzero(ignored))
        areas = []
        for index in self.indices:
            mask = sample[index] != 0 if self.regions else sample[0] == index
            if ignored is not None and self.regions:
                mask &= ~ignored
            count = np.count_nonzero(mask)
            if count == 0:
                areas.append(np.nan)
            elif self.truncation_guard and mask.ndim == 3 and _touches_a_face(mask):
                areas.append(0.0)
            else:
                areas.append(valid / count)
        return areas


def _touches_a_face(mask: npt.NDArray[np.bool_]) -> bool:
    return any(np.take(mask, end, axis=axis).any() for axis in range(mask.ndim) for end in (0, -1))
