"""FedOAP's network and partition: invariants 1, 2, 5, 10 to 16 and 25 of the method's notes (5), by their numbers."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.methods.fedoap import (
    DecoupledCrossAttention,
    FedOAPArchitecture,
    FedOAPNetwork,
    SpatialAdapter,
    is_private,
    private_names,
    shared_names,
    stem_name,
    wrap_network,
)
from nnunet_fed.methods.tensors import load_arrays, shared_tensors, to_arrays

PATCHES = {2: (16, 24), 3: (8, 16, 24)}
KINDS = pytest.mark.parametrize("kind", [PlainConvUNet, ResidualEncoderUNet])
DIMENSIONS = pytest.mark.parametrize("dimensions", [2, 3])


def unet(
    kind: type[nn.Module] = PlainConvUNet, dimensions: int = 2, *, deep_supervision: bool = True, classes: int = 2,
    channels: int = 1, widths: tuple[int, ...] = (4, 6, 48), norm: str = "InstanceNorm", seed: int = 0,
    **changes: Any,
) -> nn.Module:  # fmt: skip
    """A small network as nnU-Net builds it; the bottleneck's GroupNorm has groups of three channels."""
    torch.manual_seed(seed)
    stages = len(widths)
    kwargs = {
        "n_stages": stages, "features_per_stage": widths, "conv_op": f"torch.nn.Conv{dimensions}d",
        "kernel_sizes": [[3] * dimensions] * stages, "strides": [1, *[2] * (stages - 1)],
        "n_conv_per_stage_decoder": 1, "conv_bias": True, "norm_op": f"torch.nn.{norm}{dimensions}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "dropout_op": None, "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
        ("n_conv_per_stage" if kind is PlainConvUNet else "n_blocks_per_stage"): 2,
    }  # fmt: skip
    network: nn.Module = get_network_from_plans(
        f"{kind.__module__}.{kind.__qualname__}", kwargs | changes, ("conv_op", "norm_op", "dropout_op", "nonlin"),
        channels, classes, deep_supervision=deep_supervision,
    )  # fmt: skip
    return network


def wrapped(kind: type[nn.Module] = PlainConvUNet, dimensions: int = 2, **options: Any) -> FedOAPNetwork:
    shape = {name: options.pop(name) for name in ("heads", "query_branch", "adapter") if name in options}
    return wrap_network(unet(kind, dimensions, **options), FedOAPArchitecture(**shape))


def image(dimensions: int, channels: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, channels, *PATCHES[dimensions], generator=torch.Generator().manual_seed(seed))


def randomise(network: nn.Module, seed: int = 5) -> None:
    """No parameter keeps a value that hides another, such as the zeros that end a residual block."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 1 / math.sqrt(max(1, parameter[0].numel())), generator=generator)


def shapes(network: nn.Module, private_stem: bool = False) -> dict[str, tuple[int, ...]]:
    tensors = shared_tensors(network)
    return {name: tuple(tensors[name].shape) for name in shared_names(network, private_stem)}


# ------------------------------------------------------------------------------------------------------------ partition


@KINDS
@DIMENSIONS
@pytest.mark.parametrize("private_stem", [False, True])
def test_1_every_parameter_is_shared_or_private_and_named_once(
    kind: type[nn.Module], dimensions: int, private_stem: bool
) -> None:
    network = wrapped(kind, dimensions)
    shared, private = shared_names(network, private_stem), private_names(network, private_stem)
    assert not set(shared) & set(private)
    assert {*shared, *private} == dict(network.named_parameters()).keys()
    assert len(shared) + len(private) == len({id(parameter) for parameter in network.parameters()})
    assert not [name for name in shared if "decoder.encoder." in name or ".all_modules." in name]
    assert (stem_name(network) in private) == private_stem
    assert {name.split(".")[0] for name in shared} == {"encoder", "decoder", "dca"}
    assert {name.split(".")[1] for name in shared if name.startswith("dca.")} == {"key", "value", "proj", "norm"}
    assert {"dca.query.weight", "decoder.seg_layers.0.weight"} <= set(private), "heads of deep supervision too"
    assert {f"decoder.seg_layers.1.{part}.weight" for part in ("adapter.first.conv", "head")} <= set(private)
    assert not [name for name in shared if name.startswith(("bottleneck_q.", "decoder.seg_layers."))]


def test_1_running_statistics_stay_at_the_site() -> None:
    network = wrapped(norm="BatchNorm")
    buffers = shared_tensors(network).keys() - dict(network.named_parameters()).keys()
    assert any(name.startswith("encoder.") for name in buffers)
    assert buffers < set(private_names(network))
    assert not buffers & set(shared_names(network))


@KINDS
@DIMENSIONS
def test_2_the_schema_does_not_depend_on_classes_and_on_channels_only_by_the_stem(
    kind: type[nn.Module], dimensions: int
) -> None:
    schema = shapes(wrapped(kind, dimensions))
    assert shapes(wrapped(kind, dimensions, classes=5)) == schema
    assert shapes(wrapped(kind, dimensions, deep_supervision=False, adapter="none")) == schema
    assert shapes(wrapped(kind, dimensions, query_branch="light", heads=4)) == schema, "only the trunk travels"
    other = wrapped(kind, dimensions, channels=3)
    assert shapes(other).keys() == schema.keys()
    assert [name for name, shape in shapes(other).items() if shape != schema[name]] == [stem_name(other)]
    assert shapes(other, private_stem=True) == shapes(wrapped(kind, dimensions), private_stem=True)


def test_the_stem_of_an_unknown_network_is_not_guessed() -> None:
    with pytest.raises(ConfigurationError, match="private_stem to false"):
        stem_name(nn.Sequential(nn.Conv2d(1, 2, 3)))
    assert is_private("encoder.stem.convs.0.conv.weight", True)
    assert not is_private("encoder.stem.convs.0.conv.weight")


@KINDS
def test_5_all_names_of_a_tensor_follow_what_is_loaded(kind: type[nn.Module]) -> None:
    network, other = wrapped(kind), wrapped(kind, seed=1)
    before = copy.deepcopy(network.state_dict())
    shared, private = shared_names(network), private_names(network)
    tensors = shared_tensors(network)
    received = {name: array for name, array in to_arrays(shared_tensors(other)).items() if name in shared}
    load_arrays({name: tensors[name] for name in shared}, received)
    state, theirs = network.state_dict(keep_vars=True), other.state_dict()
    identities = {id(tensors[name]): name for name in tensors}
    aliases = [name for name in state if name not in tensors]
    assert any(name.startswith("decoder.encoder.") for name in aliases)
    for name, tensor in state.items():
        expected = before if identities[id(tensor)] in private else theirs
        assert torch.equal(tensor, expected[name]), name
    assert any(not torch.equal(before[name], theirs[name]) for name in shared)


# ----------------------------------------------------------------------------------------------------- cross-attention


def attention(channels: int, heads: int = 1, seed: int = 0) -> DecoupledCrossAttention:
    module = DecoupledCrossAttention(nn.Conv2d, channels, heads).double()
    randomise(module, seed)
    return module


def features(channels: int, size: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(2, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def explicit(module: DecoupledCrossAttention, private: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """E1 to E6 of one head after the other, as they are written."""

    def project(convolution: Any, maps: torch.Tensor) -> torch.Tensor:
        return torch.einsum("oc,bcn->bon", convolution.weight[:, :, 0, 0], maps.flatten(2)) + convolution.bias[:, None]

    width = private.shape[1] // module.heads
    attended = []
    for head in range(module.heads):
        own = slice(head * width, (head + 1) * width)
        query, key, value = project(module.query, private), project(module.key, shared), project(module.value, shared)
        scores = torch.einsum("bdq,bdk->bqk", query[:, own], key[:, own]) / math.sqrt(width)
        rows = scores.exp() / scores.exp().sum(2, keepdim=True)
        assert torch.allclose(rows.sum(2), torch.ones_like(rows[:, :, 0]))
        attended.append(torch.einsum("bqk,bdk->bdq", rows, value[:, own]))
    fused = project(module.proj, torch.cat(attended, 1)) + private.flatten(2)
    grouped = fused.reshape(len(fused), math.gcd(32, private.shape[1]), -1)
    grouped = (grouped - grouped.mean(2, keepdim=True)) / (grouped.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
    normalised = grouped.reshape(fused.shape) * module.norm.weight[:, None] + module.norm.bias[:, None]
    return normalised.reshape(private.shape)


sizes = st.tuples(st.integers(1, 4), st.integers(1, 4))


@settings(deadline=None)
@given(st.sampled_from([(48, 1), (48, 2), (48, 3), (48, 16), (12, 12), (40, 4)]), sizes, sizes, st.integers(0, 2**31))
def test_10_and_12_attention_is_the_formula_for_any_heads_and_sizes(
    width: tuple[int, int], own: tuple[int, int], other: tuple[int, int], seed: int
) -> None:
    channels, heads = width
    if math.prod(own) == 1:
        own = (2, 1)  # a group of one channel and one token has no variance
    module = attention(channels, heads, seed)
    private, shared = features(channels, own, seed), features(channels, other, seed + 1)
    found = module(private, shared)
    assert found.shape == private.shape
    assert torch.allclose(found, explicit(module, private, shared), atol=1e-9)


@pytest.mark.parametrize("heads", [1, 4])
def test_11_queries_may_be_permuted_with_the_output_and_keys_without_a_trace(heads: int) -> None:
    module = attention(16, heads)
    private, shared = features(16, (3, 4), 1), features(16, (2, 5), 2)
    found = module(private, shared)
    order, other = torch.randperm(12), torch.randperm(10)
    shuffled = module(private.flatten(2)[..., order].view_as(private), shared)
    assert torch.allclose(shuffled.flatten(2), found.flatten(2)[..., order])
    assert not torch.allclose(shuffled, found)
    assert torch.allclose(module(private, shared.flatten(2)[..., other].view_as(shared)), found)


@pytest.mark.parametrize("heads", [1, 4])
def test_13_of_constant_keys_and_values_only_the_projected_value_is_left(heads: int) -> None:
    module = attention(16, heads)
    private, shared = features(16, (3, 4), 1), features(16, (1, 1), 2).expand(2, 16, 3, 3)
    value = module.proj(module.value(shared))[:, :, :1, :1]
    assert torch.allclose(module(private, shared), module.norm(value + private))


def test_14_the_bias_of_the_keys_changes_nothing_and_gets_no_gradient() -> None:
    module = attention(48)
    private, shared = features(48, (3, 4), 1), features(48, (3, 4), 2)
    found = module(private, shared)
    (found**2 * features(48, (3, 4), 3)).sum().backward()
    assert module.key.bias.grad.abs().max() < 1e-10 < 1e-3 < module.key.weight.grad.abs().max()
    with torch.no_grad():
        module.key.bias += 7 * torch.randn(48, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(module(private, shared), found)


# ------------------------------------------------------------------------------------------------------------- network


@KINDS
@DIMENSIONS
def test_15_every_parameter_but_the_lowest_head_gets_a_gradient(kind: type[nn.Module], dimensions: int) -> None:
    network = wrapped(kind, dimensions).double()
    randomise(network)
    outputs = network(image(dimensions).double())
    DeepSupervisionWrapper(lambda logits, target: (logits - target).pow(2).mean(), (1.0, 0.0))(
        outputs, [torch.randn_like(output) for output in outputs]
    ).backward()
    lowest = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert lowest == ["decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias"]
    for name, parameter in network.named_parameters():
        # a constant before an instance normalisation, or on all keys, is not felt
        unfelt = name.endswith(".conv.bias") or name == "dca.key.bias"
        if name not in lowest and not unfelt:
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 1e-8, name


@KINDS
@DIMENSIONS
@pytest.mark.parametrize("query_branch", ["copy", "light"])
@pytest.mark.parametrize("adapter", ["res3", "none"])
def test_16_outputs_are_those_of_nnunet(
    kind: type[nn.Module], dimensions: int, query_branch: str, adapter: str
) -> None:
    network = wrapped(kind, dimensions, widths=(4, 6, 6, 8), classes=3, query_branch=query_branch, adapter=adapter)
    outputs = network(image(dimensions))
    assert isinstance(outputs, list)
    expected = [(2, 3, *(edge // 2**level for edge in PATCHES[dimensions])) for level in range(3)]
    assert [tuple(output.shape) for output in outputs] == expected
    network.decoder.deep_supervision = False  # as nnU-Net switches it
    alone = network(image(dimensions))
    assert isinstance(alone, torch.Tensor)
    assert torch.equal(alone, outputs[0])
    same = wrapped(
        kind, dimensions, widths=(4, 6, 6, 8), classes=3, query_branch=query_branch, adapter=adapter,
        deep_supervision=False,
    )  # fmt: skip
    same.load_state_dict(network.state_dict())
    assert torch.equal(same(image(dimensions)), alone), "the network that nnUNetv2_predict builds"


def test_16_anisotropic_kernels_and_strides_of_the_planner() -> None:
    network = wrapped(
        PlainConvUNet, 3, kernel_sizes=[[1, 3, 3], [1, 3, 3], [3, 3, 3]], strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]]
    )
    assert [tuple(output.shape[2:]) for output in network(image(3))] == [(8, 16, 24), (8, 8, 12)]
    adapter = network.decoder.seg_layers[-1].adapter
    assert adapter.first.conv.kernel_size == adapter.second.conv.kernel_size == (1, 3, 3)


@KINDS
def test_16_two_stages_are_enough(kind: type[nn.Module]) -> None:
    assert wrapped(kind, widths=(4, 8), deep_supervision=False)(image(2)).shape == (2, 2, 16, 24)


def test_16_a_network_without_normalisation() -> None:
    assert wrapped(norm_op=None, norm_op_kwargs=None)(image(2))[0].shape == (2, 2, 16, 24)


@KINDS
@DIMENSIONS
def test_25_the_head_sees_the_adapter_and_not_the_trunk(kind: type[nn.Module], dimensions: int) -> None:
    network = wrapped(kind, dimensions, deep_supervision=False)
    adapter = network.decoder.seg_layers[-1].adapter
    biases = [torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    assert not torch.allclose(network(image(dimensions)), network(image(dimensions, seed=1)))
    with torch.no_grad():
        for block, bias in zip((adapter.second, adapter.shortcut), biases, strict=True):
            block.norm.weight.zero_()
            block.norm.bias.copy_(bias)
    constant = torch.relu(sum(biases)).view(1, 4, *[1] * dimensions).expand(2, 4, *PATCHES[dimensions])
    assert torch.allclose(network(image(dimensions)), network.decoder.seg_layers[-1].head(constant), atol=1e-6)


def test_the_adapter_is_the_sources_of_its_width() -> None:
    encoder = unet(widths=(64, 64)).encoder
    assert sum(parameter.numel() for parameter in SpatialAdapter(encoder, 64).parameters()) == 78_336


@KINDS
@DIMENSIONS
def test_wrapping_changes_no_parameter_of_the_u_net(kind: type[nn.Module], dimensions: int) -> None:
    base, network = unet(kind, dimensions), wrapped(kind, dimensions)
    names = dict(network.named_parameters())
    last = f"decoder.seg_layers.{len(network.decoder.seg_layers) - 1}."
    moved = {name: name.replace(last, f"{last}head.") for name, _ in base.named_parameters()}
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, names[moved[name]]), name
    added = names.keys() - set(moved.values())
    assert added == {name for name in names if name.startswith(("bottleneck_q.", "dca.", f"{last}adapter."))}
    plain = wrapped(kind, dimensions, adapter="none")
    assert dict(plain.named_parameters()).keys() == {name for name in names if ".adapter." not in name}.difference(
        {f"{last}head.weight", f"{last}head.bias"}
    ) | {f"{last}weight", f"{last}bias"}
    for attribute in ("key_to_encoder", "key_to_stem", "keys_to_in_proj"):
        assert getattr(network, attribute) == getattr(base, attribute)
    assert network.get_submodule(network.keys_to_in_proj[0]).weight is names[stem_name(network)]


@KINDS
def test_new_modules_begin_as_nnunet_begins_whatever_the_u_net_has_become(kind: type[nn.Module]) -> None:
    base, untouched = unet(kind), unet(kind)
    randomise(base)
    network = wrap_network(base, FedOAPArchitecture())
    begun, trained = (dict(net.encoder.stages[-1].named_parameters()) for net in (untouched, base))
    fresh = dict(network.bottleneck_q.named_parameters())
    assert fresh.keys() == begun.keys()
    for name, parameter in fresh.items():
        assert parameter.shape == begun[name].shape
        assert not torch.equal(parameter, trained[name])
        if name.endswith("conv.weight"):
            assert not torch.equal(parameter, begun[name])
            assert parameter.std().item() == pytest.approx(begun[name].std().item(), rel=0.1)
        else:
            assert torch.equal(parameter, begun[name]), f"{name}: biases, and normalisations that begin with 0 or 1"
    for convolution in (network.dca.query, network.dca.key, network.dca.value, network.dca.proj):
        assert convolution.weight.std().item() == pytest.approx(math.sqrt(2 / 48), rel=0.1), "He's"
        assert not convolution.bias.any()


@KINDS
def test_equal_seeds_give_equal_networks(kind: type[nn.Module]) -> None:
    one, same, other = wrapped(kind), wrapped(kind), wrapped(kind, seed=1)
    assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in one.state_dict().items())
    assert not torch.equal(one.dca.query.weight, other.dca.query.weight)


def test_a_network_without_an_initialiser_of_its_own_gets_hes() -> None:
    class Unnamed(nn.Module):
        def __init__(self, base: nn.Module):
            super().__init__()
            self.encoder, self.decoder = base.encoder, base.decoder

    network = wrap_network(Unnamed(unet().apply(InitWeights_He(1e-2))), FedOAPArchitecture())
    assert not network.dca.proj.bias.any()
    assert not hasattr(network, "key_to_encoder")
    assert network(image(2))[0].shape == (2, 2, 16, 24)


@KINDS
def test_the_light_branch_is_lighter_and_as_wide(kind: type[nn.Module]) -> None:
    branches = [wrapped(kind, query_branch=branch).bottleneck_q for branch in ("copy", "light")]
    features = torch.randn(2, 6, 8, 12)
    assert branches[0](features).shape == branches[1](features).shape == (2, 48, 4, 6)
    heavy, light = (sum(parameter.numel() for parameter in branch.parameters()) for branch in branches)
    assert light < heavy


def test_heads_shape_no_parameter_but_change_the_output() -> None:
    one, four = wrapped(heads=1), wrapped(heads=4)
    four.load_state_dict(one.state_dict())
    assert not torch.allclose(one(image(2))[0], four(image(2))[0])


@KINDS
def test_the_private_branch_is_felt_and_the_shared_one_too(kind: type[nn.Module]) -> None:
    network = wrapped(kind).double()
    randomise(network)
    before = network(image(2).double())[0]
    for module in (network.bottleneck_q, network.encoder.stages[-1]):
        changed = copy.deepcopy(module.state_dict())
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.5)
        assert not torch.allclose(network(image(2).double())[0], before)
        module.load_state_dict(changed)
    assert torch.equal(network(image(2).double())[0], before)


@KINDS
@pytest.mark.parametrize("query_branch", ["copy", "light"])
def test_a_checkpoint_goes_round(kind: type[nn.Module], query_branch: str) -> None:
    network, other = wrapped(kind, query_branch=query_branch), wrapped(kind, query_branch=query_branch, seed=3)
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(network(image(2)), other(image(2)), strict=True))
    with pytest.raises(RuntimeError, match="bottleneck_q"):
        other.load_state_dict(unet(kind).state_dict())


def test_a_plain_network_can_be_pickled_and_copied() -> None:
    network = wrapped()
    for other in (pickle.loads(pickle.dumps(network)), copy.deepcopy(network)):
        assert torch.equal(network(image(2))[0], other(image(2))[0])
        names = shared_names(other)
        assert names == shared_names(network)
        assert other.encoder is other.decoder.encoder


@KINDS
@DIMENSIONS
@pytest.mark.parametrize("adapter", ["res3", "none"])
def test_the_estimate_of_feature_maps_counts_the_new_ones(kind: type[nn.Module], dimensions: int, adapter: str) -> None:
    base = unet(kind, dimensions)
    above = [edge // 2 for edge in PATCHES[dimensions]]
    stage: Any = base.encoder.stages[-1] if kind is ResidualEncoderUNet else base.encoder.stages[-1][0]
    before = base.compute_conv_feature_map_size(PATCHES[dimensions]) + stage.compute_conv_feature_map_size(above)
    network = wrap_network(base, FedOAPArchitecture(adapter=adapter))
    counted = 0

    def count(_: nn.Module, __: Any, output: torch.Tensor) -> None:
        nonlocal counted
        counted += output[0].numel()

    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and (name.startswith("dca.") or ".adapter." in name):
            module.register_forward_hook(count)
    network(image(dimensions))
    assert counted > 0
    assert network.compute_conv_feature_map_size(PATCHES[dimensions]) == before + counted


# ----------------------------------------------------------------------------------------------------------- bad input


def test_heads_that_do_not_divide_the_bottleneck_are_refused() -> None:
    base = unet()
    with pytest.raises(ConfigurationError, match=r"48 channels, which 5 attention heads .* heads to 1"):
        wrap_network(base, FedOAPArchitecture(heads=5))
    assert isinstance(base.decoder.seg_layers[-1], nn.Conv2d), "nothing was touched"


@pytest.mark.parametrize("network", [nn.Conv2d(1, 2, 3), unet(widths=(4,))], ids=["convolution", "one stage"])
def test_other_networks_are_refused(network: nn.Module) -> None:
    with pytest.raises(ConfigurationError, match="at least two stages .* another method"):
        wrap_network(network, FedOAPArchitecture())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"heads": 0}, "at least 1"),
        ({"query_branch": "heavy"}, "use copy or light"),
        ({"adapter": "res5"}, "use res3 or none"),
    ],
)
def test_an_option_without_such_a_value_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        FedOAPArchitecture(**options)
