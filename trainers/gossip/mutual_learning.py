"""Two models on the same batches, each with the other as its teacher, by nnU-Net's own training step."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any, ClassVar, get_args

import torch

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.methods.gcml import Contrast, MutualLoss, Outputs, Plan, execution_plan, ramped_weight
from nnunet_fed.study.method_table import MethodTable
from nnunet_fed.study.methods.gcml_options import GCML
from nnunet_fed.trainers.gossip.peer_model import Computed, PeerModel, with_non_finite_replaced
from nnunet_fed.trainers.parts.more_rounds import MoreRoundsTrainer
from nnunet_fed.trainers.parts.ranks import of_all_ranks
from nnunet_fed.trainers.parts.study_trainer import Step

PLAN_VARIABLE = "nnUNet_fed_mutual_plan"
"""``simultaneous`` or ``two_pass``: how mutual steps run, whatever memory is free."""


class MutualTrainer(MoreRoundsTrainer):
    """Trains as nnU-Net does, and while there is an incoming model trains that one, too. Source: GCML's notes, 5.3."""

    Options: ClassVar[type[MethodTable]] = GCML
    options: GCML
    HOLDS_OPTIMIZER = "trains a second model with an optimizer like the first one"
    loss: Any

    def configure_study(self) -> None:
        """No model has come yet."""
        super().configure_study()
        self._peer_model: PeerModel | None = None
        self._step_bytes: int | None = None

    def _build_loss(self) -> MutualLoss:
        options, labels = self.options, self.label_manager
        contrast = Contrast(
            softmax=not labels.has_regions, contrast=options.contrast, contrast_weight=options.contrast_weight,
            margin=options.margin, background_weight=options.background_weight, temperature=options.temperature,
            roi=options.roi, class_mean=options.class_mean, ignore_label=labels.ignore_label,
        )  # fmt: skip
        return MutualLoss(super()._build_loss(), contrast, heads=options.contrast_heads, mix=options.mix)

    def on_train_epoch_start(self) -> None:
        """Give the incoming model the site's learning rate."""
        super().on_train_epoch_start()
        if self._peer_model is not None:
            self._peer_model.begin_epoch(self)

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Note, once, what a plain step needs."""
        super().on_train_epoch_end(train_outputs)
        if self._peer_model is None and self._step_bytes is None and self.device.type == "cuda":
            self._step_bytes = torch.cuda.max_memory_allocated(self.device)

    def steps(self) -> dict[str, Step]:
        """Those of a mutual phase run one graph after the other, unless the variable wants both at once."""

        def mutual(data: torch.Tensor, target: Any) -> Any:
            with torch.set_grad_enabled(os.environ.get(PLAN_VARIABLE) == "simultaneous"):
                outputs = self.network(data)  # the other model's, which has the same network
            self.loss.weight = self.options.mutual_weight
            return outputs, self.loss(self.network(data), target, self.loss.lesson(outputs))

        return {**super().steps(), "mutual learning": mutual}

    def _plan_of_choice(self) -> Plan:
        chosen: Any = os.environ.get(PLAN_VARIABLE)
        if chosen:
            if chosen not in get_args(Plan):
                raise ConfigurationError(f"{PLAN_VARIABLE} is {chosen!r}: use one of {', '.join(get_args(Plan))}.")
            plan: Plan = chosen
            return plan
        here: Plan = "two_pass"
        if self._step_bytes is not None:  # a plain epoch was measured
            free, _ = torch.cuda.mem_get_info(self.device)
            here = execution_plan(free, self._step_bytes)
        # the ranks compute one step together, though each has a device and memory of its own
        return "simultaneous" if all(plan == "simultaneous" for plan in of_all_ranks(here)) else "two_pass"

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """nnU-Net's step; in a mutual phase one of each model, with what the other said before either of them."""
        peer_model = self._peer_model
        if peer_model is None:
            return super().train_step(batch)
        self.loss.weight = ramped_weight(peer_model.steps, self.options.mutual_weight, self.options.ramp_steps)
        peer_model.steps += 1
        batch = {**batch, **{name: self._on_device(batch[name]) for name in ("data", "target")}}
        at_once = peer_model.plan == "simultaneous"
        with torch.autocast("cuda") if self.device.type == "cuda" else nullcontext(), torch.set_grad_enabled(at_once):
            outputs = peer_model.network(batch["data"])
        network = Computed(peer_model.network, outputs) if at_once else None
        result, said = self._taught_step(batch, self.loss.lesson(outputs))
        with peer_model.in_place_of_own(self, network):
            self._taught_step(batch, said)
        return result

    def _taught_step(self, batch: dict[str, Any], teacher: Outputs) -> tuple[dict[str, Any], Outputs]:
        """nnU-Net's step with a teacher; also what the model itself said, for the other one."""
        mutual, said = self.loss, []

        def loss(outputs: Outputs, targets: Outputs) -> torch.Tensor:
            said.append(mutual.lesson(outputs))
            value: torch.Tensor = mutual(outputs, targets, with_non_finite_replaced(teacher, outputs))
            return value

        self.loss = loss
        try:
            result = super().train_step(batch)
        finally:
            self.loss = mutual
        if not said:
            raise ConfigurationError(
                f"The trainer '{self.base_trainer.__name__}' does not call its loss (self.loss) in a step of training, "
                "and GCML teaches a model by its loss. Plan for a study of another method or trainer."
            )
        return result, said[0]

    def _on_device(self, tensors: Any) -> Any:
        if isinstance(tensors, list):
            return [self._on_device(tensor) for tensor in tensors]
        return tensors.to(self.device, non_blocking=True)
