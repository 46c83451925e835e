"""The best round of the federation, the same at all sites: ``best = "federation"``. Source: ours.

Judged is the model that a site has after the exchange of a round, the one that it would deploy: nnU-Net validates it at
the end of that epoch. The round with the highest mean of the sites' pseudo Dice, weighted as the models are, is the
best; the earliest of several. A site without a pseudo Dice has no vote.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_fed.errors import NoContributionError, RoundClosedError, UnknownCollectiveError
from nnunet_fed.exchange.keys import key_of, scope_of_round, source_key
from nnunet_fed.methods.tensors import digest_of_tensors, load_arrays, shared_tensors, to_arrays
from nnunet_fed.prediction.checkpoint_files import BEST_CHECKPOINT
from nnunet_fed.trainers.parts.catching_up import CatchingUpTrainer
from nnunet_fed.trainers.parts.checkpoint import federation_state, network_weights
from nnunet_fed.trainers.parts.further_validation import weights_kept
from nnunet_fed.trainers.parts.publishing import from_next_source, publish, require_equal

VOTE, AGREEMENT, BEST_MODEL = "pseudo-dice", "best", "best-model"
"""Names of the collectives, in the scope of the round; the last two in the last round only."""


@dataclass(frozen=True)
class Best:
    """The best round so far."""

    round: int
    """Counted from 0."""
    dice: float
    """Weighted mean of the sites' pseudo Dice."""
    digest: str
    """Of the tensors that the sites had in common."""


class FederationBestTrainer(CatchingUpTrainer):
    """Keeps the best round of the federation as ``checkpoint_best.pth``, where the study says so.

    Each round has one more collective then, a sum of two numbers. The last round has another one, in which the sites
    compare what they kept: a site that was away takes the best model from one that was there.
    """

    def configure_study(self) -> None:
        """No round has been voted on."""
        super().configure_study()
        self._best: Best | None = None

    @property
    def keeps_own_best(self) -> bool:
        """Whether ``checkpoint_best.pth`` is this site's own choice."""
        return self.study.best == "site"

    @property
    def deploys_common_model(self) -> bool:
        """Whether the model that a site deploys after a round is the one that all sites have."""
        own = self.bare(self.network)
        return self.shared_network is own and self.shared().keys() == shared_tensors(own).keys()

    def on_train_start(self) -> None:
        """nnU-Net's; a training that was killed before it could keep the best round keeps it now."""
        super().on_train_start()
        if self._best is None or self._pending is not None or not self._has_just_ended(self._best.round):
            return
        path = Path(self.output_folder) / BEST_CHECKPOINT
        state = federation_state(path) if path.is_file() else None
        if state is None or state.get("best") != asdict(self._best):
            self.save_at_epoch_start(BEST_CHECKPOINT)

    def on_epoch_end(self) -> None:
        """nnU-Net's; at a round's end the sites vote on it."""
        number = self.current_epoch // self.study.local_epochs
        ends_round = self.current_epoch < self.study.epochs and (self.current_epoch + 1) % self.study.local_epochs == 0
        votes = ends_round and not self.keeps_own_best
        is_best = votes and self._vote(number)
        super().on_epoch_end()
        if is_best:
            self.save_at_epoch_start(BEST_CHECKPOINT)
        if votes and self.current_epoch == self.study.epochs:
            self._agree_on_best(scope_of_round(number))

    def _has_just_ended(self, number: int) -> bool:
        return self.current_epoch == (number + 1) * self.study.local_epochs

    def _vote(self, number: int) -> bool:
        """Whether the model of a round, which this site has, is the one to keep."""
        if self._next_epoch > self.current_epoch + 1:
            return False  # the site was away, and has the model of a later round
        scope = scope_of_round(number)
        dice = self._mean_pseudo_dice(key_of(scope, VOTE))
        if dice is None:
            return self._best is None  # the newest is as good as any other
        is_best = self._best is None or dice > self._best.dice
        told = ", the best so far" if is_best else ""
        self.print_to_log_file(f"Pseudo Dice of the federation in {scope}: {dice:.4f}{told}")
        if self.tracker is not None:
            self.tracker.round_over(number + 1, {"pseudo_dice": dice})
        if is_best:
            self._best = Best(number, dice, digest_of_tensors(self.shared()))
        return is_best

    def _mean_pseudo_dice(self, key: str) -> float | None:
        """Of the sites of the round, weighted; ``None``: no site had one, or this site cannot know it any more."""
        own = float(self.logger.get_value("mean_fg_dice", step=-1))
        weight = self.site_weight if math.isfinite(own) else 0.0
        try:
            total, weights = self.communicator.sum(key, np.array([weight * own if weight else 0.0, weight]))
        except RoundClosedError:
            try:
                total, weights = self.communicator.fetch(key)["value"]
            except (RoundClosedError, UnknownCollectiveError):
                self.happened(f"{key} went on without this site")
                return None
        return float(total / weights) if weights else None

    def _agree_on_best(self, scope: str) -> None:
        """Let every site of the last round have the best round that any of them knows."""
        own = None if self._best is None else asdict(self._best)
        try:
            told = self.communicator.gather(key_of(scope, AGREEMENT), own)
        except RoundClosedError:
            self.happened("the sites have agreed on the best round without this one, which keeps its own choice")
            return
        known = {site: Best(**values) for site, values in told.items() if values is not None}
        if not known:
            return  # no site has ever had a pseudo Dice: all keep the newest model
        best = max(known.values(), key=lambda one: (one.dice, -one.round))
        sources = [site for site, one in known.items() if one == best]
        digests = {site: one.digest for site, one in known.items() if one.round == best.round}
        require_equal(digests, f"The sites' models of {scope_of_round(best.round)} differ")
        if len(sources) < len(told):
            self._take_best(scope, best, sources)
        self.note_facts(best_of_federation={"round": best.round, "pseudo_dice": best.dice})
        self.print_to_log_file(f"{BEST_CHECKPOINT} is of {scope_of_round(best.round)}, the federation's best.")

    def _take_best(self, scope: str, best: Best, sources: list[str]) -> None:
        """Have the best model from a site that kept it, at each site that did not."""
        has_it, path = self.communicator.site in sources, Path(self.output_folder) / BEST_CHECKPOINT
        if not self.deploys_common_model:
            if not has_it:
                self.happened(
                    f"this site was away in {scope_of_round(best.round)}, the federation's best: it has no model of "
                    f"its own of that round, and {BEST_CHECKPOINT} is the best of those that it was in"
                )
            return

        def kept() -> dict[str, Any]:
            weights = network_weights(path)
            return to_arrays({name: weights[name] for name in self.shared()})

        def from_source(numbered: tuple[int, str]) -> dict[str, Any]:
            number, source = numbered
            return publish(self.communicator, source_key(key_of(scope, BEST_MODEL), number), source, kept)

        try:
            received = from_next_source(enumerate(sources), from_source, "")
        except (NoContributionError, RoundClosedError):
            self.happened("the best model of the federation could not be handed on: the sites that kept it are away")
            return
        if not has_it:
            with weights_kept(self) as network:
                load_arrays(shared_tensors(network), received)
                self.save_for_prediction(str(path))
            self._best = best
            self.happened(f"took the federation's best model, of {scope_of_round(best.round)}, from a site that had it")

    def training_state(self) -> dict[str, Any]:
        """Also the best round so far."""
        return {**super().training_state(), "best": None if self._best is None else asdict(self._best)}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`training_state`."""
        super().load_training_state(state)
        best = state.get("best")  # of 0.2
        self._best = None if best is None else Best(**best)
