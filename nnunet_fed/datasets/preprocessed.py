"""What planning leaves beside a configuration's preprocessed cases: whether these are all there."""

from __future__ import annotations

from pathlib import Path

PREFIX = "nnUNetFed_"
"""With which the names begin of all folders that a federation's planning fills."""


def complete_marker(folder: Path) -> Path:
    """The file that is there once a folder of preprocessed cases is complete.

    It stands beside the folder, in which nnU-Net would take it for a case.
    """
    return folder.with_name(f"{folder.name}.complete.json")


def is_complete(folder: Path) -> bool:
    """Whether all cases of a configuration are preprocessed; of a folder that is not ours, whether it is there."""
    return folder.is_dir() and (not folder.name.startswith(PREFIX) or complete_marker(folder).is_file())
