"""Federated averaging inside nnU-Net's training."""

from typing import ClassVar

from nnunet_fed.study.method_table import MethodTable
from nnunet_fed.study.methods.fedavg_options import FedAvg
from nnunet_fed.trainers.parts.finetuning import FineTuningTrainer


class nnUNetTrainerFedAvg(FineTuningTrainer):  # noqa: N801
    """Every round ends with the weighted mean of the sites' weights (:mod:`nnunet_fed.methods.fedavg`)."""

    method = "fedavg"
    Options: ClassVar[type[MethodTable]] = FedAvg

    def exchange(self, scope: str) -> None:
        """Replace this site's weights by the mean over the sites of the round."""
        self.average(scope)
