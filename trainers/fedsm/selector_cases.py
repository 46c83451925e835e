"""A site's cases as FedSM's selector sees them: patches without labels or augmentation. Source: ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from nnunetv2.paths import nnUNet_raw
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_fed.errors import FederationError
from nnunet_fed.methods.selector import SelectorCase, SelectorConfiguration, draw_patches, header_features
from nnunet_fed.trainers.fedsm.drawn_patches import DrawnPatches

if TYPE_CHECKING:
    from nnunet_fed.trainers.nnUNetTrainerFedSM import nnUNetTrainerFedSM


def configuration_of(trainer: nnUNetTrainerFedSM) -> SelectorConfiguration:
    """Of the selector, from the plans and the study."""
    return SelectorConfiguration(
        channels=len(trainer.dataset_json.get("channel_names") or trainer.dataset_json["modality"]),
        classes=len(trainer.study.sites),
        patch_size=tuple(trainer.configuration_manager.patch_size),
        patches=trainer.options.selector_patches,
        header_features=trainer.options.selector_header_features,
    )


class SelectorCases:
    """Cases of a trainer's data set, in the order of their names; can be gone through any number of times.

    Args:
        trainer: whose preprocessed cases these are.
        cases: their names.
        configuration: of the selector.
    """

    def __init__(self, trainer: nnUNetTrainer, cases: Sequence[str], configuration: SelectorConfiguration):
        self.names = sorted(cases)
        self._configuration = configuration
        self._dataset = trainer.dataset_class(
            trainer.preprocessed_dataset_folder, self.names,
            folder_with_segs_from_previous_stage=trainer.folder_with_segs_from_previous_stage,
        )  # fmt: skip
        self._header = _header_reader(trainer) if configuration.header_features else lambda case: None
        self._drawn = DrawnPatches(Path(trainer.preprocessed_dataset_folder), configuration)
        self._headers: dict[str, torch.Tensor | None] = {}

    def __iter__(self) -> Iterator[SelectorCase]:
        for name in self.names:
            yield self[name]

    def items(self) -> Iterator[tuple[str, SelectorCase]]:
        """Names and cases."""
        for name in self.names:
            yield name, self[name]

    def __getitem__(self, name: str) -> SelectorCase:
        """One case; raises :class:`FederationError` that names it if no patch fits."""
        if name not in self._headers:
            self._headers[name] = self._header(name)
        return SelectorCase(self._drawn.of(name, lambda: self._draw(name)), self._headers[name])

    def _draw(self, name: str) -> torch.Tensor:
        data, *_ = self._dataset.load_case(name)
        try:
            return draw_patches(torch.from_numpy(data[:]), self._configuration)
        except FederationError as error:
            raise FederationError(f"Case {name}: {error}") from None


def _header_reader(trainer: nnUNetTrainer) -> Callable[[str], torch.Tensor]:
    folder = Path(nnUNet_raw or ".") / trainer.plans_manager.dataset_name
    files: dict[str, dict[str, Any]] = {}
    if (folder / "imagesTr").is_dir() or "dataset" in trainer.dataset_json:  # a list of files
        files = get_filenames_of_train_images_and_targets(str(folder), trainer.dataset_json)
    reader = trainer.plans_manager.image_reader_writer_class()

    def of_case(name: str) -> torch.Tensor:
        if name not in files:
            raise FederationError(
                f"Case {name} has no raw image in {folder / 'imagesTr'}, of which the selector needs spacing, shape "
                "and intensities. Put the raw data there, or set 'selector_header_features = false' in the study."
            )
        image, properties = reader.read_images(files[name]["images"])
        return header_features(image, properties["spacing"])

    return of_case
