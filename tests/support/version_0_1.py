"""What version 0.1 left on disk (``data/v0.1``), and version 0.1 itself, with which later versions have to go on."""

from __future__ import annotations

import json
import os
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parents[1] / "data" / "v0.1"
STUDIES: dict[str, dict[str, Any]] = json.loads((FIXTURES / "studies.json").read_text())
"""By method: trainer, fold, digest of the study, ids of the runs, and by key who had contributed to what was open."""
SITES = ("site_a", "site_b")
CONFIGURATION, PLANS = "3d_fullres", "nnUNetFedSmallPlans"
NNUNET_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


class LeftBehind:
    """A study that version 0.1 was killed in the middle of, or ``finished``; with the sites' preprocessed data.

    Args:
        name: of the method, or ``finished``.
        folder: where it is unpacked.
    """

    def __init__(self, name: str, folder: Path):
        self.folder = folder
        for archive in ("preprocessed", name):
            with tarfile.open(FIXTURES / f"{archive}.tar.xz") as packed:
                packed.extractall(folder, filter="data")
        self.state = folder / "coordinator"
        self.study_file = folder / "federation.toml"
        self.images = folder / "imagesTs"

    def site(self, name: str) -> Path:
        return self.folder / "sites" / name

    def fold(self, site: str) -> Path:
        """nnU-Net's folder of the fold that the site trains."""
        (found,) = self.site(site).glob(f"nnUNet_results/*/*__{PLANS}__{CONFIGURATION}/fold_*")
        return found

    def paths(self, site: str) -> dict[str, str]:
        """nnU-Net's three variables."""
        return {name: str(self.site(site) / name) for name in NNUNET_FOLDERS}


def old_python_environment(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """``environment``, but that Python finds version 0.1, which is unpacked into ``folder``, before any other.

    Start such a process in another folder than the repository: ``python -m nnunet_fed`` looks for the package in the
    present one first.
    """
    if not folder.exists():
        (wheel,) = FIXTURES.glob("nnunet_fed-0.1*.whl")
        with zipfile.ZipFile(wheel) as packed:  # all that installing a wheel of pure Python is
            packed.extractall(folder)
    path = os.pathsep.join(filter(None, [str(folder), environment.get("PYTHONPATH")]))
    return {**environment, "PYTHONPATH": path, "nnUNet_extTrainer": str(folder / "nnunet_fed" / "trainers" / "plugin")}
