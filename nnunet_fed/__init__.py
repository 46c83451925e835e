"""Federated training of one nnU-Net by several hospitals, without sharing an image."""

from importlib.metadata import version

__version__ = version("nnunet-fed")
