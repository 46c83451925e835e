"""What a training takes of memory and disk, reckoned from the plans. The only part of ``nnunet_fed check`` with torch.

Source: ours. What a step keeps for its backward pass is told (:mod:`nnunet_fed.trainers.parts.step_memory`). Where it
is not, the memory of a step is nnU-Net's own reckoning, by which its planner chooses patch and batch size
(``ExperimentPlanner``: 8 GB for so many elements of feature maps); what methods hold is added to either.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_fed.errors import ConfigurationError, FederationError
from nnunet_fed.preflight.site_checks import GB, Finding, Outcome
from nnunet_fed.study.federation import Federation

REFERENCE_GB = 8.0
REFERENCE = {"PlainConvUNet": {2: 12 * 85e6, 3: 2 * 560e6}, "ResidualEncoderUNet": {2: 12 * 135e6, 3: 2 * 680e6}}
"""Elements of the feature maps of a batch for which nnU-Net's planners take 8 GB: by network, by dimensions."""
FLOAT = 4
CHECKPOINTS = 5
"""In ``fold_X``: final, best, latest, global, and one that is being written."""


@dataclass(frozen=True)
class StepMemory:
    """Of the network and the loss that a trainer trains."""

    parameters: int
    """Of one network."""
    saved_bytes: dict[str, int]
    """What a step keeps for its backward pass, by phase of the training."""


@dataclass(frozen=True)
class Footprint:
    """Of a training."""

    parameters: int
    """Of one network."""
    sent: int
    """Parameters of the plans' network, of which one model on the wire has about as many."""
    steps: dict[str, float]
    """Device memory of a training step, in bytes, by phase; of one phase only, ``training``, if it is nnU-Net's own
    reckoning; none: nnU-Net has no reckoning for such a network."""
    results_bytes: float
    """Disk for checkpoints."""

    @property
    def step_bytes(self) -> float:
        """Device memory of the largest step."""
        return max(self.steps.values())

    @property
    def payload_bytes(self) -> int:
        """Of one model on the wire, in float32."""
        return FLOAT * self.sent


def footprint(
    plans: Mapping[str, Any],
    configuration: str,
    dataset: Mapping[str, Any],
    study: Federation,
    build: Callable[..., torch.nn.Module] | None = None,
    trained: StepMemory | None = None,
) -> Footprint:
    """Reckon from plans.

    Args:
        plans: nnU-Net's.
        configuration: of the plans.
        dataset: ``dataset.json``.
        study: its method may hold several models.
        build: builds the network, as ``build_network_architecture`` of nnU-Net's trainers; ``None``: it is the plans'.
        trained: what is really trained; ``None``: not known, then nnU-Net's own reckoning of the plans' network.

    Raises:
        ConfigurationError: what ``build`` raises, whatever it is.
    """
    manager = PlansManager(dict(plans))
    chosen = manager.get_configuration(configuration)
    labels = manager.get_label_manager(dict(dataset))
    channels, heads = determine_num_input_channels(manager, chosen, dict(dataset)), labels.num_segmentation_heads
    if build is not None:
        network = _built(build, manager, chosen, channels, heads)
    else:
        with torch.device("meta"):  # no memory, no initialisation
            network = get_network_from_plans(
                chosen.network_arch_class_name,
                chosen.network_arch_init_kwargs,
                chosen.network_arch_init_kwargs_req_import,
                channels,
                heads,
                allow_init=False,
            )
    sent = sum(parameter.numel() for parameter in network.parameters())
    parameters = sent if trained is None else trained.parameters
    method = study.method
    held = FLOAT * parameters * (3 * (method.MODELS - 1) + method.DEVICE_FLOATS)
    if trained is None:  # nnU-Net's reckoning has weights, gradients and momentum of one model
        step = _step_bytes(network, chosen.patch_size, chosen.batch_size)
        steps = {} if step is None else {"training": step + held}
    else:
        steps = {phase: size + 3 * FLOAT * parameters + held for phase, size in trained.saved_bytes.items()}
    kept = CHECKPOINTS * (2 * method.MODELS + method.DEVICE_FLOATS + method.HOST_FLOATS)  # no gradients
    kept += method.kept_models(len(study.sites))
    kept *= len(study.trained_folds)
    return Footprint(parameters, sent, steps, FLOAT * kept * parameters)


def _built(build: Callable[..., torch.nn.Module], manager: Any, chosen: Any, channels: int, heads: int) -> Any:
    try:
        return build(manager, chosen, channels, heads, True)
    except FederationError:
        raise
    except Exception as error:  # whatever a class of the user's does
        raise ConfigurationError(
            f"The base trainer's network cannot be built by these plans: {type(error).__name__}: {error}. Plan for a "
            "study that names another trainer or configuration."
        ) from error


def _step_bytes(network: Any, patch: Sequence[int], batch: int) -> float | None:
    """nnU-Net's reckoning of a convolutional network's step."""
    try:
        elements = network.compute_conv_feature_map_size(patch) * batch
    except (AttributeError, NotImplementedError):
        return None
    kind = "ResidualEncoderUNet" if "Residual" in type(network).__name__ else "PlainConvUNet"
    return float(REFERENCE_GB * GB * elements / REFERENCE[kind][len(patch)])


def check_memory(known: Footprint | None, device: str, target: float | None = None, remark: str = "") -> Finding:
    """Compare the memory of a training with what the device has.

    Args:
        known: of the training; ``None``: not known, then only the device is looked at.
        device: ``cuda`` or ``cpu``.
        target: the study's ``gpu_memory_target_in_gb``; ``None``: the planner's own.
        remark: on how it was reckoned.
    """
    if device == "cuda":
        if not torch.cuda.is_available():
            text = "torch finds no GPU here."
            remedy = "Install a torch for it (nvidia-smi shows whether there is one), or train with -device cpu."
            return Finding("memory", Outcome.failed, text, remedy)
        free, total = map(float, torch.cuda.mem_get_info())
        place = torch.cuda.get_device_name()
    else:
        memory = host_memory()
        if memory is None:
            return Finding("memory", Outcome.skipped, "this system does not tell how much it has")
        free, total = memory
        place = "this machine"
    has = f"{place} has {free / GB:.1f} GB free of {total / GB:.1f} GB"
    if known is None:
        return Finding("memory", Outcome.ok, f"{has}; with plans (-d) it would be compared with what a training needs")
    if not known.steps:
        text = (
            f"{has}; what a step of this network needs is not known ({known.parameters / 1e6:.1f} M parameters{remark})"
        )
        return Finding("memory", Outcome.ok, text)
    steps = ", ".join(f"{size / GB:.1f} GB in {phase}" for phase, size in known.steps.items())
    text = f"{has}, a step needs about {steps} ({known.parameters / 1e6:.1f} M parameters{remark})"
    if known.step_bytes > total:
        share = total / known.step_bytes
        smaller = (
            f"{share:.0%} of the planner's own" if target is None else f"{share * target:.2g} instead of {target:g}"
        )
        remedy = f"Plan with a smaller 'gpu_memory_target_in_gb' in federation.toml ({smaller}), or use a larger GPU."
        return Finding("memory", Outcome.warning, f"{text}: it will hardly fit.", remedy)
    if known.step_bytes > free:
        return Finding("memory", Outcome.warning, f"{text}.", "End what else uses it before the training starts.")
    return Finding("memory", Outcome.ok, text)


def host_memory() -> tuple[float, float] | None:
    """Available and installed memory of this machine, in bytes; where the former is not told, the latter twice.

    ``None``: Windows tells neither in this way.
    """
    if sys.platform == "win32":
        return None
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return total, total
    kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return 1024.0 * int(kilobytes), total
