"""Whether an image looks as if a site of the federation had made it: what FedSM's selector cannot say. Source: ours.

A softmax is sure of itself away from its data: an image of a scanner that no site has is given to some site's model
with high probability. So the super model also asks how far an image's *texture* (differences between neighbouring
voxels, in which noise, blur and resampling show) is from those of the sites, in a Gaussian of each site with one common
covariance, as in Lee et al., *A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial
Attacks*, NeurIPS 2018, section 2.1, which uses a classifier's own features. Those of the selector do not serve: they
hold only what tells the sites apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import avg_pool2d, avg_pool3d

from nnunet_fed.exchange.communicator import Collectives
from nnunet_fed.exchange.keys import key_of
from nnunet_fed.exchange.payload import Array
from nnunet_fed.methods.selector import SelectorCase

SHARE = 0.95
"""Share of the sites' validation cases that are familiar."""
SHRINKAGE = 0.1
"""Of the covariances towards 0, since some cases have to do for many pairs of features."""
FLOOR = 1e-3
"""Added to differences before the logarithm: nothing to nnU-Net's normalised intensities."""
VARIANCE_FLOOR = 1e-6
"""Of a feature: 0.1 % of a difference tells nothing."""
_EDGES = 2.0 ** (np.arange(-80, 480) / 8)
"""Bins of squared distances."""


@dataclass(frozen=True)
class Familiarity:
    """The sites' textures, and how far from all of them an image may be."""

    means: Mapping[str, tuple[float, ...]]
    """Mean texture of each site."""
    precision: tuple[tuple[float, ...], ...]
    """Inverse of the covariance of textures within a site."""
    limit: float
    """Largest squared distance of a familiar image from the nearest site."""

    def unfamiliarity(self, case: SelectorCase) -> float:
        """Squared distance from the nearest site over the limit: above 1 the image is no site's."""
        return float(self._distances(texture(case.patches)[None])[0] / self.limit)

    def _distances(self, textures: Array) -> Array:
        apart = textures[:, None] - np.array(list(self.means.values()))
        distances: Array = np.einsum("nsi,ij,nsj->ns", apart, np.array(self.precision), apart).min(axis=1)
        return distances


def texture(patches: torch.Tensor) -> Array:
    """Sizes of the differences between neighbouring voxels, as logarithms.

    Args:
        patches: of one case, float32 of shape (patches, channels, ...), two or three axes.

    Returns:
        float64: for each channel, at full and at half resolution, along each axis of at least three voxels, the median
        and the mean of first and of second differences, their logarithms averaged over the patches.
    """
    pool = avg_pool2d if patches.ndim == 4 else avg_pool3d
    features = []
    for scale in (1, 2):
        image = patches if scale == 1 else pool(patches, [min(2, size) for size in patches.shape[2:]])
        for axis in range(2, image.ndim):
            for order in (1, 2):
                if image.shape[axis] < 3:
                    continue
                sizes = image.diff(n=order, dim=axis).abs().flatten(2)
                for size in (sizes.median(dim=2).values, sizes.mean(dim=2)):
                    features.append((size.double() + FLOOR).log().mean(0))
    return torch.cat(features).cpu().numpy() if features else np.zeros(0)


def fit_familiarity(
    communicator: Collectives, scope: str, training: Iterable[SelectorCase], validation: Iterable[SelectorCase]
) -> Familiarity | None:
    """Describe the sites' textures by sums over the federation: three.

    Args:
        communicator: this site's.
        scope: first part of the keys.
        training: this site's cases that shape its Gaussian.
        validation: this site's cases by which the limit is set.

    Returns:
        The same at every site; ``None`` if there are too few cases to tell: no site has two training cases, or no site
        a validation case.
    """
    own, held_out = _textures(training), _textures(validation)
    sites = communicator.sites
    sums = np.zeros((len(sites), 1 + own.shape[1]))
    sums[sites.index(communicator.site)] = [len(own), *own.sum(0)]
    sums = communicator.sum(key_of(scope, "texture-means"), sums)
    means = {site: row[1:] / row[0] for site, row in zip(sites, sums, strict=True) if row[0]}
    apart = own - means[communicator.site] if len(own) else own
    scatter = communicator.sum(key_of(scope, "texture-scatter"), apart.T @ apart)
    degrees = sums[:, 0].sum() - len(means)
    found = None
    counts = np.zeros(len(_EDGES) + 1, dtype=np.int64)
    if degrees > 0 and own.shape[1]:
        covariance = (1 - SHRINKAGE) * scatter / degrees
        variances = np.diagonal(scatter) / degrees + VARIANCE_FLOOR
        np.fill_diagonal(covariance, variances)
        precision = np.linalg.inv(covariance)
        found = Familiarity(
            {site: tuple(mean.tolist()) for site, mean in means.items()}, tuple(map(tuple, precision.tolist())), 1.0
        )
        if len(held_out):
            np.add.at(counts, np.searchsorted(_EDGES, found._distances(held_out)), 1)
    counts = communicator.sum(key_of(scope, "texture-distances"), counts)
    if found is None or not counts.any():
        return None
    bin_of_limit = int(np.searchsorted(np.cumsum(counts), SHARE * counts.sum()))
    return Familiarity(found.means, found.precision, float(_EDGES[min(bin_of_limit, len(_EDGES) - 1)]))


def _textures(cases: Iterable[SelectorCase]) -> Array:
    textures = [texture(case.patches) for case in cases]
    return np.stack(textures) if textures else np.zeros((0, 0))
