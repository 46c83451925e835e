"""FedGS: federated gradient scaling. Options and facts; docs/methods.md explains them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictStr, model_validator

from nnunet_fed.study.method_table import FineTuned
from nnunet_fed.study.table import Neutral


def _number_per_class(value: Any) -> Any:
    numbers = list(value.values()) if isinstance(value, dict) else [value]
    if not numbers or not all(type(number) in (int, float) for number in numbers):
        raise ValueError("use a number, or a number for each class by its name")
    return {name: float(number) for name, number in value.items()} if isinstance(value, dict) else float(value)


PerClass = Annotated[float | dict[str, float], BeforeValidator(_number_per_class)]
"""One number for all classes, or one for each by its name."""
Threshold = Annotated[
    float | dict[str, float] | Literal["calibrate"],
    BeforeValidator(lambda value: value if value == "calibrate" else _number_per_class(value)),
]


class FedGS(FineTuned):
    """Federated gradient scaling: see :mod:`nnunet_fed.methods.fedgs` for the source and the symbols."""

    TITLE = "FedGS"
    DEVICE_FLOATS = 2  # the weights before the step, and the residual
    SCOPES_BEFORE = ("start", "calibration")
    name: Literal["fedgs"]
    # of 0.2, where the other methods have had both since 0.1
    finetune_epochs: Annotated[int, Neutral(0, since=3)] = Field(default=0, ge=0)
    finetune_lr_factor: Annotated[float, Neutral(0.1, since=3)] = Field(default=0.1, gt=0)
    variant: Literal["fedgs", "fedgs_norm", "fedavg_gain", "fedavg_server_lr"] = "fedgs"
    """``fedgs``, or a control that tells it from a larger step: factors divided by the federation's mean of the round
    before (``fedgs_norm``), each site's update times its own mean factor (``fedavg_gain``), or all updates times the
    federation's mean factor (``fedavg_server_lr``)."""
    strength: float = Field(default=2.0, ge=0)
    """The source's lambda."""
    threshold: Threshold = "calibrate"
    """The source's tau: from which inverse area on a class is small in a patch; ``calibrate``: the 80th percentile."""
    log_base: PerClass | None = None
    """The source's l; ``None``: the threshold, as in the source's LiTS experiment."""
    classes: tuple[StrictStr, ...] | None = Field(default=None, min_length=1)
    """Names of the lesion classes in dataset.json; ``None``: all foreground classes."""
    truncation_guard: bool = True
    """In 3D a class that touches a face of the patch is not small."""
    warm_down: float = Field(default=0.0, ge=0, lt=1)
    """Share of the rounds, the last ones, over which the strength falls linearly to 0."""

    @model_validator(mode="after")
    def _sizes_are_possible(self) -> FedGS:
        thresholds = [] if self.threshold == "calibrate" else _values(self.threshold)
        if any(threshold < 1 for threshold in thresholds):
            raise ValueError("threshold is an inverse area, patch over lesion: use numbers of at least 1")
        if any(base <= 1 for base in (thresholds if self.log_base is None else _values(self.log_base))):
            raise ValueError(
                "the base of a logarithm is above 1: correct log_base (or the threshold, which is its base)"
            )
        return self


def _values(per_class: float | dict[str, float] | str) -> list[float]:
    return list(per_class.values()) if isinstance(per_class, dict) else [float(per_class)]
