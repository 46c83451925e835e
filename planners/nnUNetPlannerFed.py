"""nnU-Net's default planner for a federation."""

from typing import Any, ClassVar

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from nnunet_fed.planners.harmonised import HarmonisedPlanner


class nnUNetPlannerFed(HarmonisedPlanner, ExperimentPlanner):  # noqa: N801
    """Plans what nnU-Net's ``ExperimentPlanner`` would plan if all sites' cases lay in one place."""

    defaults: ClassVar[dict[str, Any]] = {"plans_name": "nnUNetFedPlans"}
