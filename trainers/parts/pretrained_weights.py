"""Pretrained weights: a checkpoint is read without running what stands in it; their digest; what a network takes.

Source: nnU-Net's rule (``nnunetv2.run.load_pretrained_weights``): all tensors but those of the segmentation heads,
which begin as they are built; the number of classes may be another one. Ours are the digest, and a sentence for each
thing that does not fit.
"""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.exchange.payload import bytes_of
from nnunet_fed.prediction.safe_loading import read_checkpoint
from nnunet_fed.study.federation import canonical_json

SEGMENTATION_HEADS = ".seg_layers."
"""Within the names of the tensors that nnU-Net never takes over."""
_WRAPPERS = ("module.", "_orig_mod.")
"""What ``DistributedDataParallel`` and ``torch.compile`` put before all names."""


@dataclass(frozen=True)
class PretrainedWeights:
    """The network's weights in a checkpoint."""

    path: Path
    tensors: Mapping[str, torch.Tensor] = field(repr=False)
    """By nnU-Net's names, on the CPU; memory-mapped."""
    digest: str
    """See :func:`digest_of_weights`."""


def read_weights(path: Path) -> PretrainedWeights:
    """Read the weights in a checkpoint of nnU-Net: any that ``nnUNetv2_train`` has written, federated or not.

    The file may come from anywhere: only tensors, plain values and NumPy's numbers are taken from it, and nothing that
    stands in it is run (:func:`nnunet_fed.prediction.safe_loading.read_checkpoint`).

    Raises:
        ConfigurationError: the file cannot be read, or is no checkpoint.
    """
    try:
        content = read_checkpoint(path)
    except OSError as error:
        raise ConfigurationError(
            f"The pretrained weights in {path} cannot be read: {error.strerror or error}. Name a checkpoint of nnU-Net."
        ) from None
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))  # in a page of text
        told = f": {found[1]}" if found else ""
        raise ConfigurationError(
            _not_a_checkpoint(path, f"it holds more than tensors and plain values{told}")
        ) from None
    except Exception as error:  # torch tells of a damaged file by many kinds of errors
        raise ConfigurationError(_not_a_checkpoint(path, f"{type(error).__name__} while it is read")) from None
    weights = content.get("network_weights") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise ConfigurationError(_not_a_checkpoint(path, "it has no 'network_weights'"))
    if not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in weights.items()):
        raise ConfigurationError(_not_a_checkpoint(path, "its 'network_weights' are not tensors by name"))
    tensors = _without_wrappers(weights)
    return PretrainedWeights(path, tensors, digest_of_weights(tensors))


def digest_of_weights(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors: 64 hexadecimal digits.

    It is the weights' and not the file's: what else a checkpoint holds, such as its optimizer and its log, does not
    count. It is one against forgery, since a study may name weights that come from somebody else.
    """
    names = sorted(tensors)
    described = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    digest = hashlib.sha256(canonical_json(described))
    for name in names:
        digest.update(bytes_of(tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def take_weights(
    network: torch.nn.Module, weights: PretrainedWeights, may_begin_anew: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Copy pretrained weights into a network, in place, by nnU-Net's rule.

    Args:
        network: a bare one.
        weights: of another network, which may have more than this one.
        may_begin_anew: beginnings of names, each of a module that stays as it was built unless all of it fits.

    Returns:
        Those of them that stay as they were built.

    Raises:
        ConfigurationError: a tensor is missing, has another shape or is not finite; the network is as before then.
    """
    own = network.state_dict(keep_vars=True)
    first_names: dict[int, str] = {}
    for name, tensor in own.items():
        first_names.setdefault(id(tensor), name)  # nnU-Net names most tensors more than once
    wanted = {name: first_names[id(own[name])] for name in own if SEGMENTATION_HEADS not in name}
    misfits = {name: misfit for name in wanted if (misfit := _misfit(own[name], weights.tensors.get(name)))}
    anew = tuple(one for one in may_begin_anew if any(wanted[name].startswith(one) for name in misfits))
    taken = [name for name, first in wanted.items() if not first.startswith(anew)]
    if misfits := {name: misfits[name] for name in taken if name in misfits}:
        raise ConfigurationError(_another_network(weights.path, misfits))
    for name in taken:
        tensor = weights.tensors[name]
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ConfigurationError(
                f"The pretrained weights in {weights.path} are of a training that diverged: '{name}' holds a number "
                "that is not finite. Take another checkpoint."
            )
    with torch.no_grad():
        for name in taken:
            own[name].copy_(weights.tensors[name])
    return anew


def _misfit(own: torch.Tensor, given: torch.Tensor | None) -> str | None:
    if given is None:
        return "is missing there"
    if given.shape != own.shape:
        return f"has the shape {tuple(given.shape)} there and {tuple(own.shape)} here"
    return None


def _another_network(path: Path, misfits: Mapping[str, str]) -> str:
    name, misfit = next(iter(misfits.items()))
    others = f" (and {len(misfits) - 1} further tensors do not fit)" if len(misfits) > 1 else ""
    return (
        f"The pretrained weights in {path} are of another network than this study's: '{name}' {misfit}{others}. By "
        "nnU-Net's rule all but the segmentation heads must fit: take weights of the same architecture with the same "
        "input channels, or plan the study with the planner that made theirs."
    )


def _not_a_checkpoint(path: Path, why: str) -> str:
    return f"{path} is no checkpoint of nnU-Net ({why}). Name a file such as checkpoint_final.pth."


def _without_wrappers(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names without what :data:`_WRAPPERS` put before them, in any order and number."""
    names = list(weights)
    while wrapper := next((one for one in _WRAPPERS if all(name.startswith(one) for name in names)), None):
        names = [name.removeprefix(wrapper) for name in names]
    return dict(zip(names, weights.values(), strict=True))
