"""nnU-Net's own losses, and batches for them."""

from __future__ import annotations

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import nn

SIZES = {2: (7, 9), 3: (4, 5, 6)}
CLASSES = 3
IGNORED = 3
MODES = pytest.mark.parametrize("softmax", [True, False], ids=["labels", "regions"])
IGNORES = pytest.mark.parametrize("ignore", [None, IGNORED], ids=["all", "ignore"])


def base_loss(softmax: bool, ignore: int | None = None) -> nn.Module:
    """As nnU-Net's trainer builds it."""
    dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": not softmax, "ddp": False}
    if softmax:
        return DC_and_CE_loss(dice, {}, ignore_label=ignore, dice_class=MemoryEfficientSoftDiceLoss)
    return DC_and_BCE_loss({}, dice, use_ignore_label=ignore is not None, dice_class=MemoryEfficientSoftDiceLoss)


class Counting(nn.Module):
    """How often the base loss is asked, and for what."""

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss, self.seen = loss, []

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.seen.append(logits.detach().clone())
        value: torch.Tensor = self.loss(logits, target)
        return value


def batch(
    softmax: bool, ignore: int | None = None, dimensions: int = 2, seed: int = 0, scale: float = 3.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are often wrong, and a target as nnU-Net hands it over."""
    random = torch.Generator().manual_seed(seed)
    size = (2, CLASSES, *SIZES[dimensions])
    logits = (scale * torch.randn(size, generator=random)).requires_grad_()
    if softmax:
        labels = CLASSES if ignore is None else CLASSES + 1  # the ignore label is the highest
        return logits, torch.randint(labels, (2, 1, *SIZES[dimensions]), generator=random).float()
    channels = CLASSES if ignore is None else CLASSES + 1
    return logits, torch.randint(2, (2, channels, *SIZES[dimensions]), generator=random).bool()
