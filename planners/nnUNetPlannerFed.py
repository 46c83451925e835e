"""nnU-Net's own planner, for a federation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from nnunet_fed.planners.harmonised import HarmonisedPlanner


class nnUNetPlannerFed(HarmonisedPlanner, ExperimentPlanner):  # noqa: N801
    """Plans what nnU-Net's ``ExperimentPlanner`` would plan if all sites' cases lay in one place.

    Positional arguments are those of ``ExperimentPlanner``, keywords those of :class:`HarmonisedPlanner`.
    """

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 8,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = "nnUNetFedPlans",
        overwrite_target_spacing: Sequence[float] | None = None,
        suppress_transpose: bool = False,
        *,
        total_cases: int,
        study: dict[str, Any],
    ):
        super().__init__(
            dataset_name_or_id,
            gpu_memory_target_in_gb,
            preprocessor_name,
            plans_name,
            overwrite_target_spacing,
            suppress_transpose,
            total_cases=total_cases,
            study=study,
        )
