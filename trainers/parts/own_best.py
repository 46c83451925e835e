"""A usable ``checkpoint_best.pth`` at a site whose pseudo Dice is undefined in some epochs, or in all. Source: ours.

The pseudo Dice is not a number where an epoch's validation patches hold no foreground and the network predicts none.
nnU-Net's moving average stays so for ever after one such epoch, and what it kept first then stays the best.
"""

from __future__ import annotations

import math
from pathlib import Path

from nnunet_fed.prediction.checkpoint_files import BEST_CHECKPOINT
from nnunet_fed.trainers.parts.pretrained_start import PretrainedTrainer


class OwnBestTrainer(PretrainedTrainer):
    """nnU-Net's choice of the best epoch, in which an epoch without a pseudo Dice does not count.

    Where every epoch has one, the choice is nnU-Net's, bit for bit.
    """

    _best_ema: float | None

    def on_epoch_end(self) -> None:
        """nnU-Net's; as long as no epoch had a pseudo Dice, the newest model is kept as the best."""
        undefined = not math.isfinite(leave_out_undefined(self.logger.get_checkpoint(), self.current_epoch))
        if undefined or not self.keeps_own_best:
            self._best_ema = math.nan  # with which nothing is better, for nnU-Net
        elif self._best_ema is not None and math.isnan(self._best_ema):
            self._best_ema = None
        super().on_epoch_end()
        if undefined and self.keeps_own_best:
            self.print_to_log_file(
                "No epoch has had a pseudo Dice so far (no foreground in the validation patches, and none predicted): "
                f"{BEST_CHECKPOINT} is the newest model."
            )
            self.save_at_epoch_start(BEST_CHECKPOINT)

    @property
    def keeps_own_best(self) -> bool:
        """Whether ``checkpoint_best.pth`` is this site's own choice."""
        return True

    def save_at_epoch_start(self, name: str) -> None:
        """Save a checkpoint from which the training goes on with the current epoch."""
        self.current_epoch -= 1  # nnU-Net writes the number of the next epoch
        try:
            self.save_checkpoint(str(Path(self.output_folder) / name))
        finally:
            self.current_epoch += 1


def leave_out_undefined(log: dict[str, list[float]], epoch: int) -> float:
    """Let nnU-Net's moving average go over the epochs that have a pseudo Dice.

    Args:
        log: nnU-Net's, in which the average of the epoch stands already; changed in place.
        epoch: the last one.

    Returns:
        The average; not a number if no epoch had a pseudo Dice.
    """
    average, dice = log["ema_fg_dice"], log["mean_fg_dice"]
    if not math.isfinite(average[epoch]):
        before = average[epoch - 1] if epoch else math.nan
        average[epoch] = dice[epoch] if math.isnan(before) else before
    return average[epoch]
