"""nnU-Net's planner of residual encoders for about 9 to 11 GB of GPU memory, for a federation."""

from typing import Any, ClassVar

from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncM,
)

from nnunet_fed.planners.harmonised import HarmonisedPlanner


class nnUNetPlannerFedResEncM(HarmonisedPlanner, nnUNetPlannerResEncM):  # noqa: N801
    """Plans what nnU-Net's ``nnUNetPlannerResEncM`` would plan if all sites' cases lay in one place."""

    defaults: ClassVar[dict[str, Any]] = {"plans_name": "nnUNetFedResEncMPlans"}
