"""Training without the other sites: the control of all methods."""

from typing import ClassVar

from nnunet_fed.study.method_table import MethodTable
from nnunet_fed.study.methods.local_options import Local
from nnunet_fed.trainers.parts.finetuning import FineTuningTrainer


class nnUNetTrainerLocal(FineTuningTrainer):  # noqa: N801
    """Plain nnU-Net with a study's budget, from the start that all sites have in common. Source: ours."""

    method = "local"
    Options: ClassVar[type[MethodTable]] = Local

    def exchange(self, scope: str) -> None:
        """Nothing is exchanged."""
