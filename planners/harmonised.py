"""What makes a planner of nnU-Net a planner of a federation; a planner is a file and a class of the same name here."""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import nnunetv2.preprocessing
import torch
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

import nnunet_fed.planners
from nnunet_fed.agreement.fingerprint import INTENSITIES
from nnunet_fed.agreement.plan_digest import plans_digest
from nnunet_fed.agreement.quantiles import Floats
from nnunet_fed.datasets.description import channel_names
from nnunet_fed.datasets.preprocessed import PREFIX
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.files import move
from nnunet_fed.inspection.reading import choose_reader, reader_class
from nnunet_fed.planners.dataset import file_states
from nnunet_fed.study.federation import PLANS_KEY, digest_of

logger = logging.getLogger(__name__)
_ENVIRONMENT = threading.Lock()
_NOT_PREPROCESSING = (
    "architecture",
    "batch_dice",
    "batch_size",
    "data_identifier",
    "median_image_size_in_voxels",
    "next_stage",
    "previous_stage",
    "resampling_fn_probabilities",
    "resampling_fn_probabilities_kwargs",
)
"""Entries of a configuration that preprocessing does not read; whatever else a planner adds counts as read."""


class HarmonisedPlanner:
    """Mixin before a planner of nnU-Net, which plans from the fingerprint of all sites.

    The fingerprint takes the place of the one that nnU-Net reads (``dataset_fingerprint.json``), which is this site's
    own. The mixin adds the number of cases at all sites, the study, and data identifiers that several plans on the
    same data share. Source: ours, on nnunetv2's ``ExperimentPlanner``.

    Args:
        dataset_name_or_id: of this site's data set.
        fingerprint: of all sites, in nnU-Net's format.
        total_cases: number of training cases at all sites, for the cap of the batch size.
        study: what the plans carry under the key ``federation``; the planner adds ``plans_digest``.
        options: other arguments of nnU-Net's planner.
    """

    defaults: ClassVar[dict[str, Any]] = {}
    """Arguments of nnU-Net's planner, unless others are given."""
    original_medians: tuple[Floats, Floats] | None = None
    """Median spacing and shape of all sites' cases along the array's axes, if the fingerprint does not tell them."""

    # of nnU-Net's planner
    dataset: dict[str, dict[str, Any]]
    dataset_fingerprint: dict[str, Any]
    dataset_json: dict[str, Any]
    dataset_name: str
    plans_identifier: str

    def __init__(
        self,
        dataset_name_or_id: str | int,
        *,
        fingerprint: dict[str, Any],
        total_cases: int,
        study: dict[str, Any],
        **options: Any,
    ):
        super().__init__(dataset_name_or_id, **{**self.defaults, **options})  # type: ignore[call-arg]
        self.dataset_fingerprint = fingerprint
        self.dataset_json["numTraining"] = total_cases
        # nnU-Net takes the n-th name for the n-th channel, whatever its key says
        self.dataset_json[self._channels_key] = channel_names(self.dataset_json)
        self.study = study

    @property
    def _channels_key(self) -> str:
        return "channel_names" if "channel_names" in self.dataset_json else "modality"

    def determine_reader_writer(self) -> Any:
        """As nnU-Net chooses it; nnU-Net itself prints the traceback of each class that does not fit."""
        return reader_class(choose_reader(self.dataset_json, [files["images"][0] for files in self.dataset.values()]))

    @property
    def plans_file(self) -> Path:
        """Where the plans go."""
        return Path(nnUNet_preprocessed) / self.dataset_name / f"{self.plans_identifier}.json"

    @classmethod
    def static_estimate_VRAM_usage(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: N802
        """As in nnU-Net, which fails where ``nnUNet_n_proc_DA`` is 0, since torch takes no 0 threads.

        nnU-Net builds each network whose memory it estimates from the shapes; most of planning is to draw weights that
        nobody reads. On this device there are none.
        """
        with _some_augmentation_process(), torch.device("meta"):
            return super().static_estimate_VRAM_usage(*args, **kwargs)  # type: ignore[misc]

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Complete the plans and save them; an old plans file is kept beside them as ``*.previous.json``."""
        if self.original_medians is not None:
            spacing, shape = (median[plans["transpose_forward"]] for median in self.original_medians)
            plans["original_median_spacing_after_transp"] = [float(step) for step in spacing]
            plans["original_median_shape_after_transp"] = [round(float(length)) for length in shape]
        recursive_fix_for_json_export(plans)
        for name, configuration in plans["configurations"].items():
            if "inherits_from" not in configuration:
                digest = digest_of(self._preprocessing_inputs(plans, configuration))
                configuration["data_identifier"] = f"{PREFIX}{name}_{digest[:8]}"
        plans[PLANS_KEY] = self.study  # which says what may differ
        plans[PLANS_KEY] = {**self.study, "plans_digest": plans_digest(plans)}
        if self.plans_file.exists():
            # nnU-Net would merge its configurations into the new plans, and these would differ from the other sites'
            previous = self.plans_file.with_suffix(".previous.json")
            logger.info("%s is kept as %s", self.plans_file.name, previous.name)
            move(self.plans_file, previous)
        super().save_plans(plans)  # type: ignore[misc]

    def _preprocessing_inputs(self, plans: dict[str, Any], configuration: dict[str, Any]) -> dict[str, Any]:
        """All that preprocessing reads, in JSON types: if it is the same, so are the preprocessed cases."""
        return {
            "nnunetv2": version("nnunetv2"),
            "configuration": {key: value for key, value in configuration.items() if key not in _NOT_PREPROCESSING},
            "plans": [plans[key] for key in ("image_reader_writer", "transpose_forward", INTENSITIES)],
            "dataset": [
                self.dataset_json.get(key) for key in ("channel_names", "modality", "labels", "regions_class_order")
            ],
            "files": file_states(self.dataset),
        }


def planner_class(name: str) -> Any:
    """The planner of a given name: a class in the module of the same name in ``nnunet_fed.planners``.

    Raises:
        ConfigurationError: there is no such module or class; lists those there are.
    """
    known = [module.name for module in pkgutil.iter_modules(nnunet_fed.planners.__path__)]
    known = sorted(module for module in known if module.startswith("nnUNetPlanner"))
    if name in known:
        planner = getattr(importlib.import_module(f"nnunet_fed.planners.{name}"), name, None)
        if planner is not None:
            return planner
    raise ConfigurationError(
        f"There is no planner '{name}' in nnunet_fed.planners; known are {', '.join(known)}. "
        "Set 'planner' in federation.toml to one of them, or add a file and class of that name."
    )


def check_preprocessor(name: str) -> None:
    """Look a preprocessor up as nnU-Net does; raises :class:`ConfigurationError` if there is none of that name."""
    folder = Path(nnunetv2.preprocessing.__path__[0])
    if recursive_find_python_class(str(folder), name, "nnunetv2.preprocessing") is None:
        raise ConfigurationError(
            f"There is no preprocessor '{name}' in {folder}. "
            "Set 'preprocessor_name' in federation.toml to a class there, or add it at every site."
        )


@contextmanager
def _some_augmentation_process() -> Iterator[None]:
    variable = "nnUNet_n_proc_DA"
    # sites that are threads of one process share its environment
    with _ENVIRONMENT:
        given = os.environ.get(variable)
        if given == "0":
            os.environ[variable] = "1"
        try:
            yield
        finally:
            if given == "0":
                os.environ[variable] = given
