"""Federated gradient scaling inside nnU-Net's training, and the controls that tell it from a larger step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from nnunet_fed.errors import ConfigurationError, FederationError, RoundClosedError
from nnunet_fed.exchange.keys import key_of, round_of
from nnunet_fed.exchange.payload import Array
from nnunet_fed.methods.fedgs import (
    Floats,
    GradientScaler,
    LesionClasses,
    against_plain,
    calibrated_thresholds,
    difficulty,
    histogram_of,
    strength_in_round,
    with_gain,
)
from nnunet_fed.methods.tensors import shared_tensors, to_arrays
from nnunet_fed.study.methods.fedgs_options import FedGS, PerClass
from nnunet_fed.trainers.parts import checkpoint
from nnunet_fed.trainers.parts.federated_trainer import FederatedTrainer

CALIBRATION = key_of("calibration", "inverse-areas")
"""Key of the histogram; a scope of its own, so that a late site can fetch it whatever the round."""
CALIBRATION_PATCHES = 200
"""Patches that each site draws (notes 6.2)."""


class nnUNetTrainerFedGS(FederatedTrainer):  # noqa: N801
    """Federated averaging on surrogate weights omega + R (:mod:`nnunet_fed.methods.fedgs`).

    Local training is that of federated averaging, bit for bit; only what is uploaded differs.
    """

    method = "fedgs"

    def configure_study(self) -> None:
        """Find the lesion classes and their thresholds; raises :class:`ConfigurationError` if they do not fit."""
        super().configure_study()
        assert isinstance(self.study.method, FedGS)
        self.options = self.study.method
        self._classes = self._lesion_classes()
        threshold, log_base = self.options.threshold, self.options.log_base
        self._thresholds = None if threshold == "calibrate" else self._per_class("threshold", threshold)
        self._given_bases = None if log_base is None else self._per_class("log_base", log_base)
        self._round_start: dict[str, Array] = {}
        self.scaler: GradientScaler

    def _lesion_classes(self) -> LesionClasses:
        labels = {name: value for name, value in self.dataset_json["labels"].items() if name != "ignore"}
        foreground = [name for name, value in labels.items() if np.any(np.asarray(value) != 0)]
        names = tuple(foreground) if self.options.classes is None else self.options.classes
        unknown = [name for name in names if name not in foreground]
        if unknown:
            raise ConfigurationError(
                f"The study's method table names the class {', '.join(unknown)} in 'classes', but dataset.json has "
                f"{', '.join(foreground)}. Correct it in federation.toml, and plan again."
            )
        regions = self.label_manager.has_regions
        indices = tuple(foreground.index(name) if regions else int(labels[name]) for name in names)
        return LesionClasses(names, indices, regions, self.label_manager.ignore_label, self.options.truncation_guard)

    def _per_class(self, option: str, value: PerClass) -> Floats:
        names = self._classes.names
        numbers = value if isinstance(value, dict) else dict.fromkeys(names, value)
        if set(numbers) != set(names):
            raise ConfigurationError(
                f"The study's method table has '{option}' for {', '.join(numbers)}, but the lesion classes are "
                f"{', '.join(names)}: give a number for each of them, or one for all."
            )
        return np.array([numbers[name] for name in names])

    # ------------------------------------------------------------------------------------------- training

    def initialize(self) -> None:
        """As in nnU-Net; then watch the optimizer's steps."""
        super().initialize()
        parameters = {name: tensor for name, tensor in self.shared_network.named_parameters() if tensor.requires_grad}
        self.scaler = GradientScaler(
            self.optimizer, parameters, accumulate=self.options.variant in ("fedgs", "fedgs_norm")
        )

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """nnU-Net's step; how much it will count is read from the target beforehand."""
        self.scaler.factor = self._factor(batch["target"])
        result: dict[str, Any] = super().train_step(batch)
        return result

    def _factor(self, target: torch.Tensor | list[torch.Tensor]) -> float:
        """eta: 1 + strength * mean difficulty, over the samples of all ranks."""
        assert self._thresholds is not None
        bases = self._thresholds if self._given_bases is None else self._given_bases
        difficulties = difficulty(self._classes.inverse_areas(target), self._thresholds, bases)
        total, samples = float(difficulties.sum()), len(difficulties)
        if self.is_ddp:
            sums = torch.tensor([total, samples], dtype=torch.float64, device=self.device)
            dist.all_reduce(sums)
            total, samples = sums.tolist()
        round_number = self.current_epoch // self.study.local_epochs
        strength = strength_in_round(self.options.strength, self.options.warm_down, round_number, self.study.rounds)
        return 1 + strength * total / samples

    # ------------------------------------------------------------------------------------------- the exchange

    def exchange(self, scope: str) -> None:
        """Upload the surrogate weights of the study's variant, and take their plain weighted mean."""
        variant, weight, trained = self.options.variant, self.site_weight, self.shared_arrays()
        figures = {"mean_factor": self.scaler.mean_factor, "scaled_share": self.scaler.scaled_share}
        if variant in ("fedgs_norm", "fedavg_server_lr"):
            own = np.array([weight * self.scaler.mean_factor, weight])
            figures["federation_mean_factor"] = _ratio(self.communicator.sum(key_of(scope, "factor"), own))
        gains = {
            "fedavg_gain": self.scaler.mean_factor,
            "fedavg_server_lr": figures.get("federation_mean_factor", 1.0),
        }
        if variant in gains:
            uploaded = with_gain(self._round_start, trained, gains[variant])
        else:
            uploaded = to_arrays(self.scaler.surrogate(shared_tensors(self.shared_network)))
        figures["best_scalar"], figures["residual"] = against_plain(self._round_start, trained, uploaded)
        self.diagnostics = figures
        self.load_shared(self.communicator.mean(key_of(scope, self.MODEL), uploaded, weight))
        if variant == "fedgs_norm":
            self.scaler.normaliser = figures["federation_mean_factor"]

    def load_shared(self, arrays: dict[str, Array]) -> None:
        """Take received tensors into the network; they are the start of a round."""
        super().load_shared(arrays)
        self._begin_round(arrays)

    def _begin_round(self, arrays: dict[str, Array]) -> None:
        # parameters only: a variance that is moved on beyond what was seen may become negative
        self._round_start = {name: arrays[name] for name in self.scaler.parameters}
        self.scaler.restart()

    def catch_up(self, scope: str) -> None:
        """Take the mean factor by which the others divide in the coming round."""
        if self.options.variant == "fedgs_norm":
            first = round_of(scope) is None
            self.scaler.normaliser = 1.0 if first else _ratio(self.communicator.fetch(key_of(scope, "factor"))["value"])

    # ------------------------------------------------------------------------------------------- calibration

    def prepare(self) -> None:
        """Agree on the thresholds, from the patches that the sites' own loaders draw."""
        if self._thresholds is not None:
            return
        own = self._drawn_histogram()
        try:
            histogram = self.communicator.sum(CALIBRATION, own)
        except RoundClosedError:
            histogram = self.communicator.fetch(CALIBRATION)["value"]
        self._thresholds = calibrated_thresholds(histogram)
        if np.isinf(self._thresholds).all():
            raise FederationError(
                f"No patch of any site holds a whole lesion of the classes {', '.join(self._classes.names)}, so there "
                "is no lesion size to calibrate on. Check 'classes' in the method table and the labels of the training "
                "cases, set 'threshold' to a number, or set 'truncation_guard = false'."
            )
        found = ", ".join(f"{name} {tau:.5g}" for name, tau in zip(self._classes.names, self._thresholds, strict=True))
        self.print_to_log_file(f"Patches with small lesions have inverse areas of at least: {found}")

    def _drawn_histogram(self) -> Any:
        self.print_to_log_file(f"Calibrating on {CALIBRATION_PATCHES} patches.")
        states = checkpoint.random_states()  # so that training sees the batches that it sees without calibration
        batches = math.ceil(CALIBRATION_PATCHES / self.batch_size)
        areas = [self._classes.inverse_areas(next(self.dataloader_train)["target"]) for _ in range(batches)]
        checkpoint.restore_random_states(states)
        return histogram_of(np.concatenate(areas))

    # ------------------------------------------------------------------------------------------- checkpoints

    def method_state(self) -> dict[str, Any]:
        """Thresholds, what was accumulated in this round, and where it began."""
        start = (
            {name: torch.from_numpy(array) for name, array in self._round_start.items()} if self.scaler.steps else {}
        )
        return {"thresholds": self._thresholds, "scaler": self.scaler.state_dict(), "round_start": start}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`method_state`."""
        self._thresholds = state["thresholds"]
        self._begin_round({name: array.copy() for name, array in self.shared_arrays().items()})
        self.scaler.load_state_dict(state["scaler"])
        self._round_start.update({name: tensor.numpy() for name, tensor in state["round_start"].items()})


def _ratio(sums: Any) -> float:
    return float(sums[0] / sums[1])
