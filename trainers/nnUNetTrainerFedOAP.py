"""FedOAP inside nnU-Net's training: a shared trunk, private parts that are not averaged, and fine-tuning."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any, ClassVar

import torch
from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import AbstractPrimus
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.methods.fedoap import STEM_NAMES, WRAPPED_AROUND, FedOAPArchitecture, is_private, wrap_network
from nnunet_fed.methods.perturbed_boundary import PerturbedBoundaryLoss, with_perturbed_boundary
from nnunet_fed.study.federation import study_in
from nnunet_fed.study.method_table import MethodTable
from nnunet_fed.study.methods.fedoap_options import FedOAP
from nnunet_fed.trainers.nnUNetTrainerFedAvg import nnUNetTrainerFedAvg
from nnunet_fed.trainers.parts.base_trainer import base_of
from nnunet_fed.trainers.parts.study_trainer import Step


class nnUNetTrainerFedOAP(nnUNetTrainerFedAvg):  # noqa: N801
    """Federated averaging of the shared tensors; private ones stay. The fine-tuning has the perturbed boundary loss.

    See :mod:`nnunet_fed.methods.fedoap` and :mod:`nnunet_fed.methods.perturbed_boundary`. The network is not a stock
    one: prediction needs nnunet_fed, and ``nnUNet_extTrainer`` as in training. What shapes it is in the plans.
    """

    method = "fedoap"
    Options: ClassVar[type[MethodTable]] = FedOAP
    options: FedOAP
    PREDICTED_AS = "nnUNetTrainerFedOAP"
    FEDERATED = "federated"

    _boundary_loss: PerturbedBoundaryLoss

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> torch.nn.Module:
        """The network of the plans, wrapped as the study in them says; the same in training and prediction.

        Raises:
            ConfigurationError: the plans were made for another method, or their network cannot be wrapped.
        """
        study = study_in(plans_manager.plans)
        if not isinstance(study.method, FedOAP):
            raise ConfigurationError(
                f"The plans '{plans_manager.plans_name}' were made for the method '{study.method.name}', not for "
                "'fedoap': they do not say how the network is shaped. Plan for a study of FedOAP."
            )
        options = study.method
        return wrap_network(
            base_of(study).build_network_architecture(
                plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
            ),
            FedOAPArchitecture(options.heads, options.query_branch, options.adapter),
        )

    @classmethod
    def check_base(cls, base: type[Any]) -> None:
        """See that it builds a U-Net, as far as that is known before there are plans."""
        if issubclass(base, AbstractPrimus):
            raise ConfigurationError(
                f"FedOAP does not go with the trainer '{base.__name__}': it puts its attention between the encoder and "
                "the decoder of a U-Net, and Primus is a transformer without them. Name another trainer or method."
            )
        if "plans_manager" not in inspect.signature(base.build_network_architecture).parameters:
            raise ConfigurationError(
                f"FedOAP does not go with the trainer '{base.__name__}': its build_network_architecture takes the "
                "arguments of an older nnU-Net, without the plans. Bring it up to date, or name another trainer."
            )
        super().check_base(base)

    def may_begin_anew(self) -> tuple[str, ...]:
        """What a stock network has not; and a private stem, whose input channels may be others."""
        stems = STEM_NAMES if self.options.private_stem else ()
        return (*WRAPPED_AROUND, *stems)

    def shared(self) -> dict[str, torch.Tensor]:
        """The tensors that are averaged (gamma); nothing else leaves the site while it trains."""
        private_stem = self.options.private_stem
        return {name: tensor for name, tensor in super().shared().items() if not is_private(name, private_stem)}

    def _build_loss(self) -> Any:
        def make(base: torch.nn.Module) -> PerturbedBoundaryLoss:
            self._boundary_loss = PerturbedBoundaryLoss(
                base, self.options.tau, self.options.sigma, weight=0.0,
                softmax=not self.label_manager.has_regions, ignore_label=self.label_manager.ignore_label,
            )  # fmt: skip
            return self._boundary_loss

        return with_perturbed_boundary(super()._build_loss(), make)

    def steps(self) -> dict[str, Step]:
        """Those of the fine-tuning have the loss twice, once of perturbed logits."""
        plain = super().steps()

        def perturbed(data: torch.Tensor, target: Any) -> Any:
            self._boundary_loss.weight = self.options.perturbation_weight
            self._boundary_loss.generator = torch.Generator()
            return plain["training"](data, target)

        return {**plain, "fine-tuning": perturbed} if self.options.finetune_epochs else plain

    def on_train_epoch_start(self) -> None:
        """Perturb in the fine-tuning only, with noise of this epoch's own."""
        super().on_train_epoch_start()
        self._boundary_loss.weight = self.options.perturbation_weight if self.is_finetuning else 0.0
        if self.is_finetuning:
            drawn_from = f"{self.study.seed}/{self.own_site().name}/{self.current_epoch}/{self.local_rank}"
            self._boundary_loss.reseed(int.from_bytes(hashlib.sha256(drawn_from.encode()).digest()[:7], "little"))
