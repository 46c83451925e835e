"""Names of the checkpoints in a fold's folder that a user meets. Their format is nnU-Net's."""

from __future__ import annotations

FINAL_CHECKPOINT = "checkpoint_final.pth"
"""nnU-Net's own name: what this site should deploy."""
BEST_CHECKPOINT = "checkpoint_best.pth"
"""nnU-Net's own name: each site's own choice, or the federation's if the study says so (``best``)."""
LATEST_CHECKPOINT = "checkpoint_latest.pth"
"""nnU-Net's own name: from what a training that was stopped goes on."""
GLOBAL_CHECKPOINT = "checkpoint_global.pth"
"""The last global model."""
