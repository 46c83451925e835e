"""nnU-Net's planner of residual encoders for about 40 GB of GPU memory, for a federation."""

from typing import Any, ClassVar

from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncXL,
)

from nnunet_fed.planners.harmonised import HarmonisedPlanner


class nnUNetPlannerFedResEncXL(HarmonisedPlanner, nnUNetPlannerResEncXL):  # noqa: N801
    """Plans what nnU-Net's ``nnUNetPlannerResEncXL`` would plan if all sites' cases lay in one place."""

    defaults: ClassVar[dict[str, Any]] = {"plans_name": "nnUNetFedResEncXLPlans"}
