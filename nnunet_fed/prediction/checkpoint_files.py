"""Names of the checkpoints in a fold's folder that a user meets. Their format is nnU-Net's."""

from __future__ import annotations

FINAL_CHECKPOINT = "checkpoint_final.pth"
"""nnU-Net's own name: what this site should deploy."""
GLOBAL_CHECKPOINT = "checkpoint_global.pth"
"""The last global model."""
