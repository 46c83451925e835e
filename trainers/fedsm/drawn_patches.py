"""Patches of the selector that were drawn once, on disk beside the preprocessed cases. Source: ours.

A round looks at every training case, and drawing again would read and pool whole images while a GPU waits.
"""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from nnunet_fed.files import PARTIAL, move, replacing
from nnunet_fed.methods.selector import SelectorConfiguration
from nnunet_fed.strict_json import to_json

logger = logging.getLogger(__name__)

LARGEST_BYTES = 16 * 2**30
"""Patches are kept on disk up to here; those of further cases are drawn again for each pass."""


class DrawnPatches:
    """Keeps patches in float16, or in float32 where that holds more than float16 can.

    Args:
        preprocessed: folder of the preprocessed cases of a configuration.
        configuration: of the selector.
    """

    def __init__(self, preprocessed: Path, configuration: SelectorConfiguration):
        self._cases = preprocessed
        drawn_by = {**asdict(configuration), "classes": None, "header_features": None}
        digest = hashlib.sha256(to_json(drawn_by).encode()).hexdigest()[:12]
        # beside the folder, in which nnU-Net would take them for cases
        self._folder: Path | None
        self._folder = preprocessed.with_name(f"{preprocessed.name}_selector") / digest
        self._bytes = sum(file.stat().st_size for file in self._folder.glob("*.npz"))

    def of(self, case: str, draw: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The patches of a case in float32, the same bits whether they were drawn before or not.

        Args:
            case: its name.
            draw: gives them in float32.
        """
        stamp = [[file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(self._cases.glob(f"{case}.*"))]
        kept = self._read(case, stamp)
        if kept is None:
            patches = draw()
            narrow = patches.half()
            kept = narrow if bool(narrow.isfinite().all()) else patches
            self._write(case, stamp, kept)
        return kept.float()

    def _read(self, case: str, stamp: list[list[int]]) -> torch.Tensor | None:
        if self._folder is None:
            return None
        try:
            with np.load(self._folder / f"{case}.npz") as file:
                return torch.from_numpy(file["patches"]) if file["stamp"].tolist() == stamp else None
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):  # none, or not whole after a power cut
            return None

    def _write(self, case: str, stamp: list[list[int]], patches: torch.Tensor) -> None:
        size = patches.numel() * patches.element_size()
        if self._folder is None or self._bytes + size > LARGEST_BYTES:
            return
        self._bytes += size
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # ranks, and trainings of other folds, may draw the same case at the same time
            own = self._folder / f"{case}.{os.getpid()}{PARTIAL}"
            with replacing(own, durable=False) as part, part.open("wb") as file:
                np.savez(file, patches=patches.numpy(), stamp=np.array(stamp))
            move(own, self._folder / f"{case}.npz")
        except OSError as error:
            logger.warning("The selector's patches are drawn again for each pass: %s", error)
            self._folder = None
