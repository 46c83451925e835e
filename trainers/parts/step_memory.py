"""What a training step keeps for its backward pass, reckoned without computing it. Source: ours.

The trainer's own network and loss run on fake tensors, which have a shape, a type and a device but no memory: with
``cuda`` also where there is no GPU, and under autocast as nnU-Net trains there. Counted is each storage that autograd
saves, once; weights are not. What exists for a moment only, in the forward or the backward pass, and cuDNN's workspaces
come on top; with ``torch.compile`` less may be saved. Nobody has compared it with a GPU's own figures yet.
"""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from tempfile import TemporaryDirectory
from typing import Any

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from nnunet_fed.errors import ConfigurationError, FederationError
from nnunet_fed.preflight.resources import StepMemory
from nnunet_fed.trainers.parts.study_trainer import StudyTrainer

RESULTS = "nnUNet_results"
LOGGER = "nnUNet_wandb_enabled"


class SavedTensors(saved_tensors_hooks):
    """Counts what autograd saves while it is entered: storages once, and no weights."""

    def __init__(self) -> None:
        self._storages: dict[int, Any] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        whole = tensor if tensor._base is None else tensor._base
        if not (whole.is_leaf and whole.requires_grad):
            storage = tensor.untyped_storage()  # kept, so that no other one gets its address
            self._storages[storage._cdata] = storage
        return tensor

    @property
    def bytes(self) -> int:
        """Of all storages that were saved."""
        return sum(storage.nbytes() for storage in self._storages.values())


class _EveryAnswerIsYes(TorchDispatchMode):
    """Answers what code asks of a fake tensor's value, such as whether any voxel is not ignored: then most is done."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        return func(*args, **(kwargs or {}))


def reckon(
    trainer: type[StudyTrainer],
    plans: Mapping[str, Any],
    configuration: str,
    dataset: Mapping[str, Any],
    device: str,
) -> StepMemory:
    """Reckon the steps of a trainer. Nothing is written below nnU-Net's folders, and no memory is taken.

    Args:
        trainer: its class.
        plans: with the study in them.
        configuration: of the plans.
        dataset: ``dataset.json``.
        device: ``cuda`` (with autocast to float16, as nnU-Net trains there) or another one.

    Raises:
        FederationError: the trainer does not do the study's method, or cannot be reckoned.
    """
    try:
        with redirect_stdout(io.StringIO()):  # for what nnU-Net prints
            return _reckon(trainer, plans, configuration, dataset, device)
    except FederationError:
        raise
    except Exception as error:  # whatever a network or a loss of the user's does with tensors that have no values
        raise ConfigurationError(
            f"{trainer.__name__} does not run on tensors without values ({type(error).__name__}: {error})."
        ) from error


def _reckon(trainer: Any, plans: Any, configuration: str, dataset: Any, device: str) -> StepMemory:
    made = _made(trainer, plans, configuration, dataset)
    channels = determine_num_input_channels(made.plans_manager, made.configuration_manager, made.dataset_json)
    # fake tensors cannot be copied, as some trainers copy parts of a network; other base trainers may ask for values
    with nullcontext() if made.study.names_trainer else torch.device("meta"):
        network = made.build_network_architecture(
            made.plans_manager, made.configuration_manager, channels, made.label_manager.num_segmentation_heads,
            made.enable_deep_supervision,
        )  # fmt: skip
    with FakeTensorMode(), _EveryAnswerIsYes(), torch.device(device):
        tensors = {name: _like(tensor) for name, tensor in (*network.named_parameters(), *network.named_buffers())}
        made.network, made.loss = lambda data: functional_call(network, tensors, (data,)), made._build_loss()
        saved = _reckoned(made, channels, device)
    return StepMemory(sum(parameter.numel() for parameter in network.parameters()), saved)


def _made(trainer: type[StudyTrainer], plans: Any, configuration: str, dataset: Any) -> Any:
    """An instance, whose constructor makes a folder and begins a log, in a folder that is removed at once.

    It is one of the CPU: otherwise nnU-Net compiles a part of the loss.
    """
    with TemporaryDirectory() as folder, _environment({RESULTS: folder, LOGGER: "0"}):
        plans = {"continue_training": False, **copy.deepcopy(dict(plans))}
        try:
            return trainer(plans, configuration, 0, dict(dataset), torch.device("cpu"))
        except SystemExit as error:  # the sentence of a trainer for the user
            raise ConfigurationError(str(error).removeprefix("Error: ")) from None


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _reckoned(made: Any, channels: int, device: str) -> dict[str, int]:
    labels, chosen = made.label_manager, made.configuration_manager
    data = torch.empty(chosen.batch_size, channels, *chosen.patch_size)
    with torch.no_grad():
        outputs = made.network(data)
    targets = [_target(labels, output) for output in outputs] if isinstance(outputs, list) else _target(labels, outputs)
    saved = {}
    for phase, step in made.steps().items():
        counted = SavedTensors()
        with counted, _autocast() if device == "cuda" else nullcontext():
            step(data, targets)
        saved[phase] = counted.bytes
    return saved


def _like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)


def _target(labels: Any, output: torch.Tensor) -> torch.Tensor:
    """As nnU-Net's augmentation gives it, for the output of one resolution."""
    batch, heads, *shape = output.shape
    if labels.has_regions:
        return torch.empty(batch, heads + (labels.ignore_label is not None), *shape, dtype=torch.bool)
    return torch.empty(batch, 1, *shape, dtype=torch.int16)


@contextmanager
def _autocast() -> Iterator[None]:
    """What ``torch.autocast("cuda")`` does, which does nothing on a machine without a GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.float16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()
