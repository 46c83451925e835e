"""A planner of small networks, for demonstrations and tests on a CPU."""

from typing import Any, ClassVar

from nnunet_fed.planners.nnUNetPlannerFed import nnUNetPlannerFed


class nnUNetPlannerFedSmall(nnUNetPlannerFed):  # noqa: N801
    """Small networks: 8 features at the top instead of 32, at most 64, and always batches of 2.

    The memory target of 0.1 GB was measured with ``static_estimate_VRAM_usage``. At 8 features, a batch of two volumes
    of 48^3 voxels takes 0.088 GB in nnU-Net's reckoning (0.090 GB with four channels and four labels), 40 x 56 x 40
    takes 0.071 GB. So volumes up to about 48^3 voxels are one patch (the Medical Segmentation Decathlon's hippocampi,
    our phantoms), and larger ones get patches of about that size.
    """

    defaults: ClassVar[dict[str, Any]] = {"plans_name": "nnUNetFedSmallPlans", "gpu_memory_target_in_gb": 0.1}

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.UNet_base_num_features = 8
        self.UNet_max_features_2d = 64
        self.UNet_max_features_3d = 64
        # nothing of the data set may be covered by a batch, which leaves nnU-Net's least batch
        self.UNet_min_batch_size = 2
        self.max_dataset_covered = 0.0
