"""Local fine-tuning after the rounds: what every method with a second, lonely phase shares. Source: ours.

The phase is a function of the epoch: federated before ``rounds * local_epochs``, fine-tuning after it. In the latter
nothing is frozen and nothing is sent; the best epoch by the site's own validation is what it deploys.
"""

from __future__ import annotations

import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

from nnunet_fed.files import replacing
from nnunet_fed.study.method_table import FineTuned, MethodTable
from nnunet_fed.trainers.parts.checkpoint import network_weights
from nnunet_fed.trainers.parts.federated_trainer import FederatedTrainer
from nnunet_fed.trainers.parts.further_validation import validate_weights
from nnunet_fed.trainers.parts.ranks import wait_for_all

BEST_CHECKPOINT = "checkpoint_finetuned.pth"
"""The best fine-tuned epoch so far; ``checkpoint_final.pth`` takes its place in the end."""


class TwoPhaseLRScheduler:
    """The base trainer's learning rate over the rounds, and nnU-Net's, lower, over the fine-tuning.

    Args:
        rounds: the base trainer's schedule.
        epochs: of the rounds.
        optimizer: whose learning rate it sets.
        finetune_lr: at the start of the fine-tuning.
        finetune_epochs: of the fine-tuning, at least 1.
    """

    def __init__(
        self, rounds: Any, epochs: int, optimizer: torch.optim.Optimizer, finetune_lr: float, finetune_epochs: int
    ):
        self._rounds, self._border = rounds, epochs
        self._finetuning: PolyLRScheduler | None = None
        self._make = partial(PolyLRScheduler, optimizer, finetune_lr, finetune_epochs)

    def step(self, epoch: int) -> None:
        """Set the learning rate of an epoch, counted from the start of the training."""
        if epoch < self._border:
            self._rounds.step(epoch)
            return
        if self._finetuning is None:  # not before: it sets the learning rate when it is made
            self._finetuning = self._make()
        self._finetuning.step(epoch - self._border)


class FineTuningTrainer(FederatedTrainer):
    """Federated rounds, then ``finetune_epochs`` epochs alone; with 0 of them, nothing but the rounds."""

    FEDERATED: ClassVar[str] = "global"
    """What the model after the rounds is called: ``checkpoint_NAME.pth``, and its validation ``NAME/validation``."""

    Options: ClassVar[type[MethodTable]] = FineTuned
    options: FineTuned

    def configure_study(self) -> None:
        """Take the number of fine-tuning epochs."""
        super().configure_study()
        self.num_epochs += self.options.finetune_epochs
        self._best_finetuned: float | None = None

    @property
    def is_finetuning(self) -> bool:
        """Whether the current epoch comes after the rounds."""
        return self.current_epoch >= self.study.epochs

    def configure_optimizers(self, *stage: Any) -> Any:
        """The base trainer's, with a schedule of two phases."""
        in_all, self.num_epochs = self.num_epochs, self.study.epochs
        try:
            optimizer, schedule = super().configure_optimizers(*stage)
        finally:
            self.num_epochs = in_all
        epochs, factor = self.options.finetune_epochs, self.options.finetune_lr_factor
        if epochs and not isinstance(schedule, TwoPhaseLRScheduler):  # nnU-Net's warm-up hands out the one that it has
            schedule = TwoPhaseLRScheduler(schedule, self.study.epochs, optimizer, factor * self.initial_lr, epochs)
        return optimizer, schedule

    def on_train_epoch_start(self) -> None:
        """Begin the fine-tuning when its first epoch does."""
        if self.current_epoch == self.study.epochs:
            self.begin_finetuning()
        super().on_train_epoch_start()

    def begin_finetuning(self) -> None:
        """Keep the model of the rounds, and start with a fresh optimizer and a fresh measure of what is best."""
        self.save_every = 1
        self.save_at_epoch_start(self._federated_checkpoint.name)  # --c may begin here again
        for optimizer in self.optimizers:
            optimizer.state.clear()
        if self.grad_scaler is not None:
            self.grad_scaler = torch.amp.GradScaler(self.device.type)
        self._best_ema = None
        self.print_to_log_file(f"Fine-tuning for {self.options.finetune_epochs} epochs, without the other sites")

    def on_epoch_end(self) -> None:
        """Keep a fine-tuned model that is better than the ones before on this site's validation cases.

        An epoch without a pseudo Dice is never better; if none has one, the last epoch is what is deployed.
        """
        if self.is_finetuning:
            # not nnU-Net's moving average, which is too slow for a few epochs
            dice = float(self.logger.get_value("mean_fg_dice", step=-1))
            if not math.isnan(dice) and (self._best_finetuned is None or dice > self._best_finetuned):
                self._best_finetuned = dice
                self.save_for_prediction(str(Path(self.output_folder) / BEST_CHECKPOINT))
                self.print_to_log_file(f"Best fine-tuned epoch so far: pseudo Dice {dice:.4f}")
        super().on_epoch_end()

    def on_train_end(self) -> None:
        """Let ``checkpoint_final.pth`` be the best fine-tuned model."""
        best = Path(self.output_folder) / BEST_CHECKPOINT
        wait_for_all()
        if self._best_finetuned is not None and best.is_file():
            self.bare(self.network).load_state_dict(network_weights(best))
        super().on_train_end()
        wait_for_all()
        if self.local_rank == 0:
            best.unlink(missing_ok=True)

    def save_models(self, folder: Path) -> None:
        """Without fine-tuning the final model is the one of the rounds."""
        if not self.options.finetune_epochs:
            with replacing(self._federated_checkpoint) as part:
                shutil.copyfile(folder / "checkpoint_final.pth", part)

    def validate(self, save_probabilities: bool) -> None:
        """nnU-Net's validation of the final model, and of the one after the rounds."""
        super().validate(save_probabilities)
        if self.options.finetune_epochs and self._federated_checkpoint.is_file():
            validate_weights(self, network_weights(self._federated_checkpoint), self.FEDERATED, save_probabilities)

    def method_state(self) -> dict[str, Any]:
        """The best pseudo Dice of the fine-tuning so far."""
        return {**super().method_state(), "best_finetuned": self._best_finetuned}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`method_state`."""
        super().load_method_state(state)
        best = state.get("best_finetuned")  # FedGS came to fine-tune after 0.1, and 0.1 may have kept a NaN
        self._best_finetuned = None if best is None or math.isnan(best) else best
        if self.is_finetuning:
            self.save_every = 1

    @property
    def rounds_checkpoint(self) -> Path:
        """With fine-tuning it is that of the federated model."""
        return self._federated_checkpoint if self.options.finetune_epochs else super().rounds_checkpoint

    @property
    def _federated_checkpoint(self) -> Path:
        return Path(self.output_folder) / f"checkpoint_{self.FEDERATED}.pth"
