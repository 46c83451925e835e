"""Which tensors of nnU-Net's networks are shared, and how they come back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnunet_fed.errors import DisagreementError
from nnunet_fed.exchange.payload import Array, decode, encode
from nnunet_fed.methods.tensors import digest_of_tensors, load_arrays, shared_tensors, to_arrays


def unet(
    features: tuple[int, ...] = (32, 64, 128, 256, 320, 320), norm: type[nn.Module] = nn.InstanceNorm3d
) -> nn.Module:
    """What nnU-Net plans for 3d_fullres, by default of the usual size."""
    stages = len(features)
    return PlainConvUNet(
        input_channels=1, n_stages=stages, features_per_stage=features, conv_op=nn.Conv3d, kernel_sizes=3,
        strides=[1, *[2] * (stages - 1)], n_conv_per_stage=2, num_classes=3, n_conv_per_stage_decoder=2,
        conv_bias=True, norm_op=norm, norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True}, deep_supervision=True,
    )  # fmt: skip


def small(norm: type[nn.Module] = nn.InstanceNorm3d) -> nn.Module:
    torch.manual_seed(0)
    return unet((2, 3), norm)


def travelled(arrays: dict[str, Array]) -> dict[str, Array]:
    """As the network delivers them: views of one buffer."""
    return decode(memoryview(bytearray(b"".join(encode(arrays)))))


def size(tensors: dict[str, torch.Tensor]) -> float:
    return sum(tensor.nbytes for tensor in tensors.values()) / 1e6


def test_the_stock_network_is_shared_once() -> None:
    with torch.device("meta"):
        network = unet()
    shared, state = shared_tensors(network), network.state_dict()
    assert (len(shared), len(state)) == (108, 292)
    assert size(shared) == pytest.approx(125, abs=1)
    assert size(state) == pytest.approx(354, abs=1)
    assert shared.keys() <= state.keys()


def test_a_constant_that_no_checkpoint_has_is_not_shared() -> None:
    """Primus has one; a mean on a wire of 16 bits would round it, and who predicts would have the exact one."""
    network = Primus(1, 24, (8, 8, 8), 2, 1, 2, (8, 16, 16))
    assert "eva.rope.pos_embed" in dict(network.named_buffers())
    assert shared_tensors(network).keys() == network.state_dict().keys()


@pytest.mark.parametrize("norm", [nn.InstanceNorm3d, nn.BatchNorm3d])
def test_what_is_shared_is_all_that_prediction_needs(norm: type[nn.Module]) -> None:
    source, target = small(norm), small(norm)
    for tensor in shared_tensors(source).values():
        torch.nn.init.uniform_(tensor.detach(), 0.5, 1.5)
    load_arrays(shared_tensors(target), travelled(to_arrays(shared_tensors(source))))
    image = torch.randn(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    source.eval(), target.eval()
    for mine, theirs in zip(source(image), target(image), strict=True):
        assert torch.equal(mine, theirs)


def test_loading_reaches_every_alias_and_the_optimizer() -> None:
    network = small()
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    sum(output.sum() for output in network(torch.ones(2, 1, 8, 8, 8))).backward()
    optimizer.step()
    aliases, before = network.state_dict(), [id(parameter) for parameter in network.parameters()]
    moments = {id(parameter): state["momentum_buffer"].clone() for parameter, state in optimizer.state.items()}
    arrays = {name: np.full(tuple(tensor.shape), 0.25, np.float32) for name, tensor in shared_tensors(network).items()}
    load_arrays(shared_tensors(network), arrays)
    for name, tensor in [*aliases.items(), *network.state_dict().items()]:
        assert (tensor == 0.25).all(), name
    assert [id(parameter) for parameter in network.parameters()] == before
    assert [id(parameter) for parameter in optimizer.param_groups[0]["params"]] == before
    for parameter, state in optimizer.state.items():
        assert torch.equal(state["momentum_buffer"], moments[id(parameter)])
        assert parameter.requires_grad
        assert parameter.grad_fn is None
    optimizer.step()
    assert not (network.state_dict()["encoder.stages.0.0.convs.0.conv.weight"] == 0.25).all(), "the optimizer steps on"


def test_running_means_are_shared_and_counters_are_not() -> None:
    network = small(nn.BatchNorm3d)
    shared = shared_tensors(network)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm3d)]
    assert sum(name.endswith("running_mean") for name in shared) == len(norms) > 0
    assert sum(name.endswith("running_var") for name in shared) == len(norms)
    assert not any(name.endswith("num_batches_tracked") for name in shared)
    network(torch.randn(2, 1, 8, 8, 8))
    load_arrays(shared, {name: np.zeros(tuple(tensor.shape), np.float32) for name, tensor in shared.items()})
    assert all((norm.running_mean == 0).all() and norm.num_batches_tracked == 1 for norm in norms)


def test_a_buffer_under_two_names_is_shared_once() -> None:
    network = nn.Module()
    network.register_buffer("one", torch.zeros(2))
    network.register_buffer("two", network.one)
    network.register_buffer("other", torch.zeros(2))
    assert list(shared_tensors(network)) in (["one", "other"], ["two", "other"])


def test_arrays_share_the_memory_of_tensors() -> None:
    tensors = shared_tensors(small())
    for name, array in to_arrays(tensors).items():
        assert array.ctypes.data == tensors[name].data_ptr()


def test_loading_copies() -> None:
    tensors = {"w": torch.zeros(2)}
    array = np.float32([1, 2])
    load_arrays(tensors, {"w": array})
    array[:] = 9
    assert tensors["w"].tolist() == [1, 2]


def test_scalars_and_signed_zeros_are_loaded() -> None:
    tensors = {"w": torch.zeros(3), "scalar": torch.zeros(())}
    load_arrays(tensors, travelled({"w": np.float32([1, -0.0, 3]), "scalar": np.full((), 4, np.float32)}))
    assert tensors["w"].numpy().tobytes() == np.float32([1, -0.0, 3]).tobytes()
    assert tensors["scalar"] == 4


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"w": np.zeros((2, 3), np.float32)}, "other tensors than this site's network: b"),
        ({"w": np.zeros((2, 3)), "b": np.zeros(2), "extra": np.zeros(1)}, "other tensors.*: extra"),
        ({}, "other tensors.*: b, w"),
        ({"w": np.zeros((3, 2)), "b": np.zeros(2)}, r"tensor 'w' has the shape \(3, 2\), this site's \(2, 3\)"),
        ({"w": np.zeros((2, 3)), "b": np.zeros(())}, r"tensor 'b' has the shape \(\), this site's \(2,\)"),
        ({"w": np.zeros((2, 3)), "b": np.zeros(1)}, r"tensor 'b' has the shape \(1,\)"),
    ],
)
def test_another_network_is_refused_and_nothing_is_loaded(arrays: dict[str, Array], sentence: str) -> None:
    tensors = {"w": torch.ones(2, 3), "b": torch.ones(2)}
    with pytest.raises(DisagreementError, match=sentence):
        load_arrays(tensors, arrays)
    assert all((tensor == 1).all() for tensor in tensors.values())


def test_the_digest_tells_any_two_models_apart() -> None:
    network = small()
    tensors = shared_tensors(network)
    digest = digest_of_tensors(tensors)
    assert digest == digest_of_tensors(dict(reversed(tensors.items()))) == digest_of_tensors(shared_tensors(small()))
    seen = {digest}
    for tensor in tensors.values():
        flat = tensor.detach().reshape(-1)
        before = flat[-1].item()
        flat[-1] = float(np.nextafter(np.float32(before), np.float32(9)))
        seen.add(digest_of_tensors(tensors))
        flat[-1] = before
    assert len(seen) == len(tensors) + 1, "one unit in the last place of any tensor changes the digest"
    assert digest_of_tensors(tensors) == digest
    assert digest_of_tensors({"v": torch.zeros(2)}) != digest_of_tensors({"w": torch.zeros(2)})
    assert digest_of_tensors({"w": torch.zeros(2, 1)}) != digest_of_tensors({"w": torch.zeros(1, 2)})
    assert digest_of_tensors({"w": torch.tensor([0.0])}) != digest_of_tensors({"w": torch.tensor([-0.0])})
