"""A training that is over goes on with more rounds, from all that it had after its last one. Source: ours.

The study in the plans says with how many rounds a training began; ``more_rounds`` of the coordinator's says how many
follow. A site takes notice of them once its own are over, when it is started with ``--c``. From there on it trains as
nnU-Net does that is continued with a larger number of epochs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.prediction.checkpoint_files import BEST_CHECKPOINT, FINAL_CHECKPOINT, LATEST_CHECKPOINT
from nnunet_fed.trainers.parts.checkpoint import federation_state
from nnunet_fed.trainers.parts.coordinator_session import Course, course_of
from nnunet_fed.trainers.parts.own_best import OwnBestTrainer
from nnunet_fed.trainers.parts.ranks import from_rank_zero
from nnunet_fed.trainers.parts.sentences import sentences_for_users
from nnunet_fed.trainers.parts.starting_anew import begin_anew, set_aside


class MoreRoundsTrainer(OwnBestTrainer):
    """Trains as many rounds as its checkpoint says, and asks for more when these are over."""

    _loaded: Path | None = None
    _course: Course | None = None
    _rounds_before: int | None = None
    """How many rounds there were, in a process in which more of them begin."""

    @property
    def rounds_checkpoint(self) -> Path:
        """The checkpoint with all that the training had after its last round."""
        return Path(self.output_folder) / FINAL_CHECKPOINT

    @property
    def _continues(self) -> bool:
        """Whether the command said ``--c``."""
        return bool(self.logger.resume)

    def course(self) -> Course:
        """What the coordinator says of a training that is over; it is asked once."""
        if self._course is None:
            self._course = from_rank_zero(lambda: course_of(self.own_site))
        return self._course

    def load_checkpoint(self, filename_or_checkpoint: Any) -> None:
        """nnU-Net's checkpoint, with the number of rounds that it was written with."""
        with sentences_for_users():
            self._take_folder()
        self._loaded = Path(filename_or_checkpoint)
        state = federation_state(self._loaded) or {}
        more_rounds = state.get("more_rounds", self.study.more_rounds)
        if more_rounds != self.study.more_rounds:
            self._train_rounds(more_rounds)
        super().load_checkpoint(filename_or_checkpoint)

    def get_dataloaders(self) -> Any:
        """nnU-Net's loaders, then more rounds, if there are any: who has used gRPC must not fork."""
        loaders = super().get_dataloaders()
        if self._continues and self._resumed is not None and self.current_epoch >= self.study.epochs:
            more_rounds = self.course().more_rounds
            if more_rounds > self.study.more_rounds:
                self._go_on(more_rounds, self.rounds_checkpoint)
        return loaders

    def _go_on(self, more_rounds: int, checkpoint: Path | None) -> None:
        """Train so many rounds beyond those of the plans, from a checkpoint or from the start."""
        if checkpoint is not None and not checkpoint.is_file():
            raise ConfigurationError(
                f"The study has more rounds, and {checkpoint}, from which they begin here, is missing. Restore it, or "
                "move this fold's results away and start without --c in a new attempt."
            )
        self._rounds_before = self.study.all_rounds
        self._train_rounds(more_rounds)
        if checkpoint is not None:
            super().load_checkpoint(str(checkpoint))

    def _train_rounds(self, more_rounds: int) -> None:
        self.study = self.study.model_copy(update={"more_rounds": more_rounds})
        begin_anew(self)

    def _begin_more_rounds(self) -> None:
        """Once the training goes on: keep what the rounds so far gave aside, where ``--c`` does not look."""
        if self._rounds_before is None or self._resumed is None:
            return
        kept = [LATEST_CHECKPOINT]
        if self.rounds_checkpoint.name == FINAL_CHECKPOINT or not self.keeps_own_best:
            kept.append(BEST_CHECKPOINT)
        else:  # it is a fine-tuned one
            self._best_ema = None
        self.save_at_epoch_start(LATEST_CHECKPOINT)
        if self.local_rank == 0 and not self.disable_checkpointing:
            set_aside(Path(self.output_folder), f"after_{self._rounds_before}_rounds", kept)
        self._rounds_before = None

    def training_state(self) -> dict[str, Any]:
        """Also how many rounds follow those of the plans."""
        return {**super().training_state(), "more_rounds": self.study.more_rounds}
