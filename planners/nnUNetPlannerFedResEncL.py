"""nnU-Net's planner of residual encoders for about 24 GB of GPU memory, for a federation."""

from typing import Any, ClassVar

from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncL,
)

from nnunet_fed.planners.harmonised import HarmonisedPlanner


class nnUNetPlannerFedResEncL(HarmonisedPlanner, nnUNetPlannerResEncL):  # noqa: N801
    """Plans what nnU-Net's ``nnUNetPlannerResEncL`` would plan if all sites' cases lay in one place."""

    defaults: ClassVar[dict[str, Any]] = {"plans_name": "nnUNetFedResEncLPlans"}
