"""FedSM's model selector: a small network that says from an image which site it comes from, and what it looks at.

Source: the selector is the paper's (see :mod:`nnunet_fed.methods.fedsm`); its published code uses VGG-11 on 2D slices.
This network for two and three dimensions, its input and the decision per case are ours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.functional import avg_pool2d, avg_pool3d, pad
from torch.nn.utils import skip_init

from nnunet_fed.errors import ConfigurationError, FederationError
from nnunet_fed.exchange.payload import Array

WIDTHS = (16, 32)
"""Feature maps of the convolutions, each of which halves every axis. Few, so that many places are left to average
over: with five of them, as the notes propose, it learns small data sets by heart and is no better than chance."""


@dataclass(frozen=True)
class SelectorConfiguration:
    """What rebuilds a selector and its input; equal at all sites."""

    channels: int
    """Of the image; further channels of the network's input, such as a previous stage's segmentation, are ignored."""
    classes: int
    """K: the sites, in the order of their names."""
    patch_size: tuple[int, ...]
    """Of nnU-Net's configuration: two or three axes."""
    patches: int = 8
    """At most so many patches a case (``selector_patches``)."""
    pooled_size: int = 64
    """Patches are average-pooled to at most so many voxels an axis."""
    header_features: bool = False
    """Whether the selector also gets :func:`header_features`."""

    def __post_init__(self) -> None:
        numbers = (self.channels, self.classes, self.patches, self.pooled_size, *self.patch_size)
        if len(self.patch_size) not in (2, 3) or min(numbers) < 1:
            raise ConfigurationError(
                f"A selector needs at least one channel, site and patch, and patches of two or three axes, not {self}."
            )

    @property
    def header_size(self) -> int:
        """Length of the header features: spacing and shape of three axes, mean and deviation of each channel."""
        return 6 + 2 * self.channels if self.header_features else 0


@dataclass(frozen=True)
class SelectorCase:
    """A case as the selector sees it."""

    patches: torch.Tensor
    """float32 of shape (patches, channels, ...)."""
    header: torch.Tensor | None = None
    """float32 of shape (header_size,)."""


class Selector(nn.Module):
    """Strided convolutions, the mean over space, and one linear layer.

    No batch normalisation: at a site every batch has one label, which its statistics would tell. No instance
    normalisation either: it removes level and contrast, by which sites differ.

    Args:
        configuration: input and number of sites.
        seed: of the initial weights, which come from a generator of their own: the global ones stay as they are.
    """

    def __init__(self, configuration: SelectorConfiguration, seed: int = 0):
        super().__init__()
        convolution = nn.Conv2d if len(configuration.patch_size) == 2 else nn.Conv3d
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise((configuration.channels, *WIDTHS)):
            # skip_init: the usual construction draws from the global generator
            layer = skip_init(convolution, inputs, outputs, kernel_size=3, stride=2, padding=1)  # type: ignore[no-untyped-call]
            layers += [layer, nn.LeakyReLU(0.01)]
        self.features = nn.Sequential(*layers)
        width = WIDTHS[-1] + configuration.header_size
        self.head = skip_init(nn.Linear, width, configuration.classes)  # type: ignore[no-untyped-call]
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim > 1:
                    gain = math.sqrt(2) if parameter.ndim > 2 else 1.0
                    parameter.normal_(0, gain / math.sqrt(parameter[0].numel()), generator=generator)
                else:
                    parameter.zero_()

    def forward(self, patches: torch.Tensor, header: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of shape (patches, classes) of a case's patches; its header goes with each of them."""
        features = self.features(patches).flatten(2).mean(2)
        if header is not None:
            features = torch.cat([features, header.expand(len(features), -1)], dim=1)
        logits: torch.Tensor = self.head(features)
        return logits


def draw_patches(image: torch.Tensor, configuration: SelectorConfiguration) -> torch.Tensor:
    """A case's patches: a grid that covers the image, thinned evenly. No labels, no chance.

    Args:
        image: preprocessed by nnU-Net, of shape (channels, z, y, x); of a 2D configuration the patches are slices. An
            image smaller than a patch is padded with zeros on both sides, as nnU-Net does.
        configuration: patch size, and what becomes of it.

    Returns:
        float32 of shape (patches, channels, *pooled), at most ``configuration.patches`` of them.

    Raises:
        FederationError: no patch fits: the image has other axes, no voxels, or too few channels.
    """
    patch = (1,) * (3 - len(configuration.patch_size)) + configuration.patch_size
    if image.ndim != 4 or len(image) < configuration.channels or 0 in image.shape:
        voxels = " x ".join(map(str, configuration.patch_size))
        raise FederationError(
            f"No patch of {configuration.channels} channels and {voxels} voxels fits an image of the shape "
            f"{tuple(image.shape)}; expected are channels, then three axes that are not "
            "empty. Preprocess the case with the plans of this study."
        )
    image = image[: configuration.channels].float()
    missing = [max(0, wanted - size) for wanted, size in zip(patch, image.shape[1:], strict=True)]
    # torch counts the axes from the last
    image = pad(image, [side for short in reversed(missing) for side in (short // 2, short - short // 2)])
    corners = list(itertools.product(*map(_starts, image.shape[1:], patch)))
    chosen = np.linspace(0, len(corners) - 1, min(configuration.patches, len(corners))).round().astype(int)
    patches = []
    for corner in (corners[number] for number in chosen):
        within = tuple(slice(at, at + size) for at, size in zip(corner, patch, strict=True))
        patches.append(image[(slice(None),) + within])  # noqa: RUF005 (mypy's parser for Python 3.10)
    stacked = torch.stack(patches)
    kernel = [math.ceil(size / configuration.pooled_size) for size in configuration.patch_size]
    return avg_pool2d(stacked.squeeze(2), kernel) if len(kernel) == 2 else avg_pool3d(stacked, kernel)


def _starts(size: int, patch: int) -> list[int]:
    count = math.ceil(size / patch)
    return [int(start) for start in np.linspace(0, size - patch, count).round()]


def header_features(image: Array, spacing: Sequence[float]) -> torch.Tensor:
    """What preprocessing removes: voxel size, shape and intensities of the image as it came.

    They tell sites apart easily, and perhaps for no better reason than a habit of cropping: off by default.

    Args:
        image: as read, before any preprocessing, of shape (channels, z, y, x).
        spacing: mm along the image's three axes.

    Returns:
        float32 of shape (6 + 2 channels,): logarithms of spacing and shape, then of each channel mean and standard
        deviation as their inverse hyperbolic sines, logarithms that are defined for negative numbers too.
    """
    channels = np.asarray(image, dtype=np.float64).reshape(len(image), -1)
    intensities = np.arcsinh([channels.mean(1), channels.std(1)])
    header = np.concatenate([np.log(spacing), np.log(image.shape[1:]), intensities.ravel()])
    return torch.from_numpy(header.astype(np.float32))


@torch.no_grad()
def case_log_probabilities(network: Selector, cases: Iterable[SelectorCase]) -> torch.Tensor:
    """The decision for each case: the mean of its patches' log-softmax, renormalised.

    Returns:
        float64 of shape (cases, classes), on the CPU.
    """
    decisions = []
    for case in cases:
        patches = torch.log_softmax(network(case.patches, case.header).double(), dim=1)
        decisions.append(torch.log_softmax(patches.mean(0), dim=0))
    return torch.stack(decisions) if decisions else torch.zeros(0, network.head.out_features, dtype=torch.float64)


def tempered(log_probabilities: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities at another temperature, renormalised; above 1 they are less sure."""
    return torch.log_softmax(log_probabilities / temperature, dim=-1)
