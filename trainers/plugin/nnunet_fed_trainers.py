"""What ``nnUNet_extTrainer`` points nnU-Net at: it imports this file under a top-level name and forgets it again.

So the trainers themselves are not here but imported from the installed package, where each class exists once.
"""

from importlib import import_module

from nnunet_fed.study.methods import METHODS

__all__ = [table.own_trainer() for name, table in METHODS.items() if name != "custom"]

globals().update({name: getattr(import_module(f"nnunet_fed.trainers.{name}"), name) for name in __all__})
