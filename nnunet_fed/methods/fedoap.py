"""FedOAP's network: a U-Net of nnU-Net with decoupled cross-attention and a private adapter; what of it is shared.

Source: Tashdeed et al. (arXiv 2511.18847). The body of the paper was not read: the formulas E1 to E7 are reconstructed
from the public code and agree with the symbols of the abstract and the captions. That code carries no licence; only
facts were taken from it. Ours are: the wrapper around nnU-Net's networks, heads, the light query branch, kernels of the
adapter as the planner chose them, private deep-supervision heads, private running statistics and the private stem.

Every site trains a whole network. Shared are the encoder, whose last stage is the key-value branch, the key, value and
output projections, and the decoder. Private are the query branch, the query projection, the adapter and the heads. Keys
and values come from the local image: nothing but parameters ever travels.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU, StackedConvBlocks
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.methods.tensors import shared_tensors

QueryBranch = Literal["copy", "light"]
Adapter = Literal["res3", "none"]

WRAPPED_AROUND = ("bottleneck_q.", "dca.")
"""Modules beside those of the stock network; the adapter lies within the last of the heads."""
PRIVATE_PREFIXES = ("bottleneck_q.", "dca.query.", "decoder.seg_layers.")
"""Modules whose tensors stay at the site. The adapter lies within the last of the heads."""
RUNNING_STATISTICS = ("running_mean", "running_var")
"""Buffers of a normalisation: they describe a site's images."""
STEM_NAMES = ("encoder.stages.0.0.convs.0.conv.weight", "encoder.stem.convs.0.conv.weight")
"""The first convolution's weight, in a plain and in a residual encoder."""
_INHERITED = ("key_to_encoder", "key_to_stem", "keys_to_in_proj")
"""Where nnU-Net looks for a network's parts when it loads pretrained weights."""


@dataclass(frozen=True)
class FedOAPArchitecture:
    """The options that shape the network; equal at all sites.

    Raises:
        ConfigurationError: an option has no such value.
    """

    heads: int = 1
    """Of the attention; a divisor of the bottleneck's channels. The public code takes a number and uses one."""
    query_branch: QueryBranch = "copy"
    """``copy``: the private query branch is as the encoder's last stage; ``light``: one convolution block (ours)."""
    adapter: Adapter = "res3"
    """``res3``: E7 before the head; ``none``: no adapter."""

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise ConfigurationError(f"heads is {self.heads}; the attention needs at least 1.")
        for option, values in (("query_branch", get_args(QueryBranch)), ("adapter", get_args(Adapter))):
            if getattr(self, option) not in values:
                raise ConfigurationError(f"{option} is '{getattr(self, option)}'; use {' or '.join(values)}.")


class DecoupledCrossAttention(nn.Module):
    """DCA (E1 to E6): queries of the private feature map, keys and values of the shared one; a position is a token.

    Positions are not encoded, so the two maps may have any size. ``key.bias`` changes nothing: the softmax does not
    feel a constant.

    Args:
        convolution: ``nn.Conv2d`` or ``nn.Conv3d``.
        channels: C of both feature maps.
        heads: a divisor of C; each works on C / heads channels.
    """

    def __init__(self, convolution: type[nn.Module], channels: int, heads: int = 1):
        super().__init__()
        self.heads = heads
        self.query = convolution(channels, channels, 1)
        self.key = convolution(channels, channels, 1)
        self.value = convolution(channels, channels, 1)
        self.proj = convolution(channels, channels, 1)
        self.norm = nn.GroupNorm(math.gcd(32, channels), channels)

    def forward(self, private: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        """Attend, project, add the private feature map and normalise.

        Args:
            private: f_q of shape (B, C, ...).
            shared: f_kv of shape (B, C, ...), its spatial size may differ.

        Returns:
            Of the shape of ``private``.
        """
        attended = scaled_dot_product_attention(
            self._tokens(self.query(private)), self._tokens(self.key(shared)), self._tokens(self.value(shared))
        )
        fused = self.proj(attended.transpose(2, 3).reshape(private.shape)) + private
        normalised: torch.Tensor = self.norm(fused)
        return normalised

    def _tokens(self, features: torch.Tensor) -> torch.Tensor:
        """(B, heads, tokens, C / heads)."""
        batch, channels = features.shape[:2]
        return features.reshape(batch, self.heads, channels // self.heads, -1).transpose(2, 3)


class SpatialAdapter(nn.Module):
    """E7: two convolutions and a 1x1 shortcut, each normalised, added and rectified; the width stays.

    Args:
        encoder: its convolution, normalisation and the first stage's kernel are taken.
        channels: of the decoder's last stage.
    """

    def __init__(self, encoder: Any, channels: int):
        super().__init__()
        normalisation = (encoder.norm_op, encoder.norm_op_kwargs)

        def block(kernel: Any, bias: bool, nonlinearity: type[nn.Module] | None) -> nn.Module:
            made: nn.Module = ConvDropoutNormReLU(
                encoder.conv_op, channels, channels, kernel, 1, bias, *normalisation, nonlin=nonlinearity
            )
            return made

        kernel = encoder.kernel_sizes[0]
        self.first = block(kernel, True, nn.ReLU)
        self.second = block(kernel, True, None)
        self.shortcut = block(1, False, None)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Of the shape of ``features``."""
        return torch.relu(self.second(self.first(features)) + self.shortcut(features))


class FedOAPNetwork(nn.Module):
    """What :func:`wrap_network` makes of a U-Net; ``encoder`` and ``decoder`` are the ones it had.

    Input and output are nnU-Net's: a list of logits with ``decoder.deep_supervision``, else the full resolution.
    """

    def __init__(self, base: nn.Module, bottleneck_q: nn.Module, dca: DecoupledCrossAttention):
        super().__init__()
        self.encoder: Any = base.encoder
        self.decoder: Any = base.decoder
        self.bottleneck_q = bottleneck_q
        self.dca = dca
        for name in _INHERITED:
            if hasattr(base, name):
                setattr(self, name, getattr(base, name))

    def forward(self, image: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Logits of (B, channels, ...), each of shape (B, classes, ...)."""
        *skips, shared = self.encoder(image)
        logits: torch.Tensor | list[torch.Tensor] = self.decoder(
            [*skips, self.dca(self.bottleneck_q(skips[-1]), shared)]
        )
        return logits

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Values in all convolutions' outputs for one image, by which nnU-Net estimates memory.

        Args:
            input_size: of the image, without channels.
        """
        sizes = [tuple(input_size)]
        for strides in self.encoder.strides:
            sizes.append(tuple(edge // stride for edge, stride in zip(sizes[-1], strides, strict=True)))
        full, above, bottleneck = sizes[1], sizes[-2], sizes[-1]
        total = int(self.encoder.compute_conv_feature_map_size(input_size))
        total += int(self.decoder.compute_conv_feature_map_size(input_size))
        # as in nnU-Net's own encoder, a stage may be a sequence of a pooling and the convolutions
        branch = self.bottleneck_q
        blocks: list[Any] = list(branch) if isinstance(branch, nn.Sequential) else [branch]
        for block in blocks:
            if hasattr(block, "compute_conv_feature_map_size"):
                total += int(block.compute_conv_feature_map_size(above))
        total += 4 * int(self.encoder.output_channels[-1]) * math.prod(bottleneck)
        if hasattr(self.decoder.seg_layers[-1], "adapter"):
            total += 3 * int(self.encoder.output_channels[0]) * math.prod(full)
        return total


def wrap_network(network: nn.Module, architecture: FedOAPArchitecture) -> FedOAPNetwork:
    """Put FedOAP around a network that nnU-Net built: PlainConvUNet or ResidualEncoderUNet, in 2D or 3D.

    The encoder and the decoder are taken over, not copied: their parameters keep their values, and the last head moves
    into ``decoder.seg_layers[-1].head`` behind the adapter. Do not use ``network`` afterwards.

    New modules draw from torch's global generator, in this order: construction of ``bottleneck_q``, ``dca`` and the
    adapter, then initialisation of the same in the same order, as nnU-Net initialises ``network`` itself. So equal
    seeds give equal networks, as long as the networks before wrapping are equal too.

    Args:
        network: as ``nnUNetTrainer.build_network_architecture`` returns it.
        architecture: the options.

    Raises:
        ConfigurationError: the network has another structure, or the heads do not divide the bottleneck's channels.
    """
    encoder, decoder = _u_net_of(network)
    channels = int(encoder.output_channels[-1])
    if channels % architecture.heads:
        raise ConfigurationError(
            f"The bottleneck has {channels} channels, which {architecture.heads} attention heads do not divide: set "
            f"heads to 1 or to another divisor of {channels}."
        )
    bottleneck_q = _query_branch(encoder, architecture.query_branch)
    dca = DecoupledCrossAttention(encoder.conv_op, channels, architecture.heads)
    made: list[nn.Module] = [bottleneck_q, dca]
    if architecture.adapter == "res3":
        made.append(SpatialAdapter(encoder, int(encoder.output_channels[0])))
        decoder.seg_layers[-1] = nn.Sequential(OrderedDict(adapter=made[-1], head=decoder.seg_layers[-1]))
    for module in made:
        module.apply(getattr(network, "initialize", InitWeights_He(1e-2)))
    return FedOAPNetwork(network, bottleneck_q, dca)


def _u_net_of(network: nn.Module) -> tuple[Any, Any]:
    encoder: Any = getattr(network, "encoder", None)
    decoder: Any = getattr(network, "decoder", None)
    expected = (
        (encoder, ("stages", "output_channels", "strides", "kernel_sizes", "conv_op", "norm_op", "norm_op_kwargs")),
        (decoder, ("seg_layers", "deep_supervision")),
    )
    if not all(hasattr(part, name) for part, names in expected for name in names) or len(encoder.stages) < 2:
        raise ConfigurationError(
            f"FedOAP needs a U-Net of an encoder with at least two stages and a decoder, and {type(network).__name__} "
            "is none: plan the study with an architecture of nnU-Net's planners (PlainConvUNet, ResidualEncoderUNet), "
            "or train it with another method."
        )
    return encoder, decoder


def _query_branch(encoder: Any, kind: QueryBranch) -> nn.Module:
    if kind == "light":
        made: nn.Module = StackedConvBlocks(
            1, encoder.conv_op, encoder.output_channels[-2], encoder.output_channels[-1], encoder.kernel_sizes[-1],
            encoder.strides[-1], encoder.conv_bias, encoder.norm_op, encoder.norm_op_kwargs,
            encoder.dropout_op, encoder.dropout_op_kwargs, encoder.nonlin, encoder.nonlin_kwargs,
        )  # fmt: skip
        return made
    branch: nn.Module = copy.deepcopy(encoder.stages[-1])
    module: Any
    for module in branch.modules():
        # what the initialiser leaves alone, such as most normalisations, begins as it was built
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return branch


# ------------------------------------------------------------------------------------------------------------ partition


def is_private(name: str, private_stem: bool = False) -> bool:
    """Whether a tensor is not averaged, and stays at the site while it trains.

    Args:
        name: as :func:`nnunet_fed.methods.tensors.shared_tensors` of the bare network gives it.
        private_stem: the first convolution's weight is private too, so that sites may have other input channels.
    """
    if private_stem and name in STEM_NAMES:
        return True
    return name.startswith(PRIVATE_PREFIXES) or name.rpartition(".")[2] in RUNNING_STATISTICS


def shared_names(network: nn.Module, private_stem: bool = False) -> tuple[str, ...]:
    """Names of the tensors that are averaged (gamma), in the network's order, each tensor once.

    Names and shapes do not depend on the number of classes; on the number of input channels only the stem's does.
    """
    return tuple(name for name in shared_tensors(network) if not is_private(name, private_stem))


def private_names(network: nn.Module, private_stem: bool = False) -> tuple[str, ...]:
    """Names of the tensors that stay at the site (pi): all others of ``shared_tensors``."""
    return tuple(name for name in shared_tensors(network) if is_private(name, private_stem))


def stem_name(network: nn.Module) -> str:
    """Name of the one tensor whose shape depends on the number of input channels.

    Raises:
        ConfigurationError: the network names its first convolution otherwise.
    """
    found = [name for name in shared_tensors(network) if name in STEM_NAMES]
    if len(found) != 1:
        raise ConfigurationError(
            f"The first convolution of {type(network).__name__} was not found under {' or '.join(STEM_NAMES)}: set "
            "private_stem to false, and use equal input channels at all sites."
        )
    return found[0]
