"""``nnunet_fed plugin-path``: where nnU-Net finds the federated trainers."""

from __future__ import annotations


def plugin_path() -> None:
    """Print the folder for nnUNet_extTrainer, through which nnU-Net finds the federated trainers."""
    from nnunet_fed.simulation.simulate import plugin_folder

    print(plugin_folder())
