"""Federated averaging inside nnU-Net's training."""

from nnunet_fed.exchange.keys import key_of
from nnunet_fed.trainers.parts.finetuning import FineTuningTrainer


class nnUNetTrainerFedAvg(FineTuningTrainer):  # noqa: N801
    """Every round ends with the weighted mean of the sites' weights (:mod:`nnunet_fed.methods.fedavg`)."""

    method = "fedavg"

    def exchange(self, scope: str) -> None:
        """Replace this site's weights by the mean over the sites of the round."""
        self.load_shared(self.communicator.mean(key_of(scope, self.MODEL), self.shared_arrays(), self.site_weight))
