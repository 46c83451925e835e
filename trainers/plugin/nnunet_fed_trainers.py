"""What ``nnUNet_extTrainer`` points nnU-Net at: it imports this file under a top-level name and forgets it again.

So the trainers themselves are not here but imported from the installed package, where each class exists once.
"""

from nnunet_fed.trainers.nnUNetTrainerDitto import nnUNetTrainerDitto
from nnunet_fed.trainers.nnUNetTrainerFedAdam import nnUNetTrainerFedAdam
from nnunet_fed.trainers.nnUNetTrainerFedAvg import nnUNetTrainerFedAvg
from nnunet_fed.trainers.nnUNetTrainerFedAvgM import nnUNetTrainerFedAvgM
from nnunet_fed.trainers.nnUNetTrainerFedGS import nnUNetTrainerFedGS
from nnunet_fed.trainers.nnUNetTrainerFedOAP import nnUNetTrainerFedOAP
from nnunet_fed.trainers.nnUNetTrainerFedProx import nnUNetTrainerFedProx
from nnunet_fed.trainers.nnUNetTrainerFedSM import nnUNetTrainerFedSM
from nnunet_fed.trainers.nnUNetTrainerGCML import nnUNetTrainerGCML
from nnunet_fed.trainers.nnUNetTrainerLocal import nnUNetTrainerLocal

__all__ = [
    "nnUNetTrainerDitto",
    "nnUNetTrainerFedAdam",
    "nnUNetTrainerFedAvg",
    "nnUNetTrainerFedAvgM",
    "nnUNetTrainerFedGS",
    "nnUNetTrainerFedOAP",
    "nnUNetTrainerFedProx",
    "nnUNetTrainerFedSM",
    "nnUNetTrainerGCML",
    "nnUNetTrainerLocal",
]
