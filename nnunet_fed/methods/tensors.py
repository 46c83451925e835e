"""The torch side of payloads: which tensors of a network are shared, and how they come back into it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from nnunet_fed.errors import DisagreementError
from nnunet_fed.exchange.payload import Array, encode, measure


def shared_tensors(network: nn.Module) -> dict[str, torch.Tensor]:
    """The network's own tensors by name, each once: parameters, then floating-point buffers.

    nnU-Net's ``state_dict`` names the encoder again below the decoder, and each convolution twice: the stock
    3d_fullres network has 108 tensors (125 MB) behind 292 names (354 MB). Integer buffers, such as the number of
    batches that a normalisation has seen, have no mean. A buffer that no ``state_dict`` has, such as the angles by
    which a transformer tells places, is a constant of the architecture: it would be in no checkpoint.
    """
    tensors: dict[str, torch.Tensor] = dict(network.named_parameters())
    known, kept = {id(tensor) for tensor in tensors.values()}, network.state_dict(keep_vars=True).keys()
    for name, buffer in network.named_buffers():
        if buffer.is_floating_point() and id(buffer) not in known and name in kept:
            tensors[name] = buffer
    return tensors


def to_arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    """Arrays for a payload; on the CPU they share the tensors' memory."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}


@torch.no_grad()
def load_arrays(tensors: Mapping[str, torch.Tensor], arrays: Mapping[str, Array]) -> None:
    """Copy arrays into the tensors, in place, so that every alias and the optimizer see them.

    Raises:
        DisagreementError: names or shapes differ.
    """
    if tensors.keys() != arrays.keys():
        differing = ", ".join(sorted(tensors.keys() ^ arrays.keys())[:5])
        raise DisagreementError(f"The received model has other tensors than this site's network: {differing}.")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != arrays[name].shape:
            raise DisagreementError(
                f"The received tensor '{name}' has the shape {arrays[name].shape}, this site's {tuple(tensor.shape)}."
            )
    for name, tensor in tensors.items():
        array = arrays[name]
        # torch warns of memory that it could write to and must not
        tensor.copy_(torch.from_numpy(array if array.flags.writeable else array.copy()))


def digest_of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Digest of the payload of these tensors (:func:`nnunet_fed.exchange.payload.measure`)."""
    return measure(encode(to_arrays(tensors)))[0]
