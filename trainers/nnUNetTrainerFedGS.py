"""Federated gradient scaling inside nnU-Net's training, and the controls that tell it from a larger step."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import distributed as dist

from nnunet_fed.exchange.keys import key_of, round_of
from nnunet_fed.exchange.payload import Array
from nnunet_fed.methods.fedgs import GradientScaler, against_plain, difficulty, strength_in_round, with_gain
from nnunet_fed.methods.lesion_classes import LesionClasses
from nnunet_fed.methods.tensors import shared_tensors, to_arrays
from nnunet_fed.study.labels import in_numbers
from nnunet_fed.study.method_table import MethodTable
from nnunet_fed.study.methods.fedgs_options import FedGS
from nnunet_fed.trainers.fedgs.calibration import agreed_thresholds
from nnunet_fed.trainers.parts.finetuning import FineTuningTrainer


class nnUNetTrainerFedGS(FineTuningTrainer):  # noqa: N801
    """Federated averaging on surrogate weights omega + R (:mod:`nnunet_fed.methods.fedgs`).

    Local training is that of federated averaging, bit for bit; only what is uploaded differs.
    """

    method = "fedgs"
    Options: ClassVar[type[MethodTable]] = FedGS
    options: FedGS
    HOLDS_OPTIMIZER = "counts the steps of the first one"
    scaler: GradientScaler

    def configure_study(self) -> None:
        """Find the lesion classes and their thresholds; raises :class:`ConfigurationError` if they do not fit."""
        super().configure_study()
        options, labels = self.options, self.label_manager
        self._classes = LesionClasses.named(
            options.classes, in_numbers(self.dataset_json["labels"]), labels.has_regions, labels.ignore_label,
            options.truncation_guard,
        )  # fmt: skip
        threshold, log_base = options.threshold, options.log_base
        self._thresholds = None if threshold == "calibrate" else self._classes.numbers("threshold", threshold)
        self._given_bases = None if log_base is None else self._classes.numbers("log_base", log_base)
        self._round_start: dict[str, Array] = {}

    def prepare(self) -> None:
        """Agree on the thresholds, if the study gives none."""
        if self._thresholds is None:
            self._thresholds = agreed_thresholds(self, self._classes)

    # ------------------------------------------------------------------------------------------- training

    def initialize(self) -> None:
        """As in nnU-Net; then watch the optimizer's steps."""
        super().initialize()
        parameters = {name: tensor for name, tensor in self.shared_network.named_parameters() if tensor.requires_grad}
        self.scaler = GradientScaler(
            self.optimizer, parameters, accumulate=self.options.variant in ("fedgs", "fedgs_norm")
        )

    def on_train_epoch_start(self) -> None:
        """The steps of a site that fine-tunes alone count nowhere."""
        if self.is_finetuning:
            self.scaler.release()
        super().on_train_epoch_start()

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """nnU-Net's step; how much it will count is read from the target beforehand."""
        if not self.is_finetuning:
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
        strength = strength_in_round(self.options.strength, self.options.warm_down, round_number, self.study.all_rounds)
        return 1 + strength * total / samples

    # ------------------------------------------------------------------------------------------- the exchange

    def exchange(self, scope: str) -> None:
        """Upload the surrogate weights of the study's variant, and take their plain weighted mean."""
        variant, trained = self.options.variant, self.shared_arrays()
        figures = {"mean_factor": self.scaler.mean_factor, "scaled_share": self.scaler.scaled_share}
        if variant in ("fedgs_norm", "fedavg_server_lr"):
            own = self.site_weight * np.array([self.scaler.mean_factor, 1])
            figures["federation_mean_factor"] = _ratio(self.communicator.sum(key_of(scope, "factor"), own))
        gain = {"fedavg_gain": "mean_factor", "fedavg_server_lr": "federation_mean_factor"}.get(variant)
        if gain is not None:
            uploaded = with_gain(self._round_start, trained, figures[gain])
        else:
            uploaded = to_arrays(self.scaler.surrogate(shared_tensors(self.shared_network)))
        figures["best_scalar"], figures["residual"] = against_plain(self._round_start, trained, uploaded)
        self.diagnostics = figures
        self.average(scope, uploaded)
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

    # ------------------------------------------------------------------------------------------- checkpoints

    def method_state(self) -> dict[str, Any]:
        """Thresholds, what was accumulated in this round, and where it began."""
        start = self._round_start if self.scaler.steps else {}
        return {
            **super().method_state(),
            "thresholds": self._thresholds,
            "scaler": self.scaler.state_dict(),
            "round_start": {name: torch.from_numpy(array) for name, array in start.items()},
        }

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`method_state`."""
        super().load_method_state(state)
        self._thresholds = state["thresholds"]
        self._begin_round({name: array.copy() for name, array in self.shared_arrays().items()})
        self.scaler.load_state_dict(state["scaler"])
        self._round_start.update({name: tensor.numpy() for name, tensor in state["round_start"].items()})


def _ratio(sums: Any) -> float:
    return float(sums[0] / sums[1])
