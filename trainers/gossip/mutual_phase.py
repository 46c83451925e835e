"""A mutual phase: a model that has come trains beside the site's own, then the site decides which one it keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from nnunetv2.utilities.helpers import empty_cache

from nnunet_fed.errors import FederationError
from nnunet_fed.exchange.payload import Array, Tensors, check_finite, open_payload
from nnunet_fed.exchange.precision import widen
from nnunet_fed.gossip.mailbox import Letter
from nnunet_fed.gossip.schedule import Candidate, kept, merged, uniform
from nnunet_fed.methods.tensors import load_arrays, shared_tensors, to_arrays
from nnunet_fed.trainers.gossip.gossip_session import GossipSession, Standing
from nnunet_fed.trainers.gossip.mutual_learning import MutualTrainer
from nnunet_fed.trainers.gossip.patch_dice import foreground_dice
from nnunet_fed.trainers.gossip.peer_model import PeerModel
from nnunet_fed.trainers.parts.ranks import from_rank_zero, of_all_ranks

T = TypeVar("T")


class PhaseTrainer(MutualTrainer):
    """Begins and ends mutual phases; of the others it knows what rank 0 has from the mailbox."""

    _standing: Standing

    def configure_study(self) -> None:
        """Nobody is there to talk to yet."""
        super().configure_study()
        self._session: GossipSession | None = None
        self._group: Any = None

    def _here(self) -> GossipSession:
        if self._session is None:
            raise RuntimeError("rank 0 alone has the mailbox, and only while it trains")
        return self._session

    def _from_rank_zero(self, question: Callable[[GossipSession], T]) -> T:
        return from_rank_zero(lambda: question(self._here()), self._group)

    def _happened(self, text: str) -> None:
        if self._session is not None:
            self._session.happened(text)

    def _begin_phase(self, letter: Letter, payload: Path) -> None:
        try:
            arrays = _received(payload)
            before = {name: array.copy() for name, array in self.shared_arrays().items()}
            self._peer_model = PeerModel.beside(
                self, version=letter.version, initial=letter.initial, size=letter.size, plan=self._plan_of_choice(),
                began=self.current_epoch, epochs_left=self.options.mutual_epochs,
                before=before if self.options.keep == "best" else None,
            )  # fmt: skip
            load_arrays(shared_tensors(self.bare(self._peer_model.network)), arrays)
        except FederationError as error:  # whatever a peer sends, this training goes on
            self._peer_model = None
            self._standing.received[letter.version.site] = letter.version.counter
            self._happened(f"the model of {letter.version.site} cannot be used. {error}")
        else:
            self._happened(
                f"trains with the model that {letter.version.site} had after {letter.version.epoch} epochs "
                f"({self._peer_model.plan})"
            )

    def _end_phase(self) -> None:
        """Decide which model stays, and forget the peer's."""
        if self._peer_model is not None:
            self._keep_one(self._peer_model)
        self._peer_model = None  # the last reference, or its memory would not be free yet
        empty_cache(self.device)

    def _keep_one(self, peer_model: PeerModel) -> None:
        options, standing, site = self.options, self._standing, peer_model.version.site
        own, theirs = self.shared_arrays(), to_arrays(shared_tensors(self.bare(peer_model.network)))
        models: dict[Candidate, Tensors] = {"incoming": theirs}
        if peer_model.before is not None:
            models["before"] = peer_model.before
        if options.keep != "local" and peer_model.initial == standing.initial:
            models["merged"] = merged(
                own, theirs, options.merge_weight, own_initial=standing.initial, incoming_initial=peer_model.initial
            )
        scores = self._scores(models) if options.keep == "best" else {}
        choice = kept(options.keep, scores, options.keep_tolerance)
        if choice != "local":
            self.load_shared(dict(models[choice]))
        if choice != "local" or self.study.momentum_on_round == "reset":
            self.optimizer.state.clear()
        if choice != "before":
            standing.version = standing.version.influenced_by(peer_model.version)
        standing.received[site] = peer_model.version.counter
        standing.used[site] = standing.used.get(site, 0) + 1
        phase = {
            "from": site, "counter": peer_model.version.counter, "epoch": peer_model.version.epoch,
            "bytes": peer_model.size, "began": peer_model.began, "ended": self.current_epoch,
            "plan": peer_model.plan, "kept": choice,
            "scores": {name: score for name, score in scores.items() if np.isfinite(score)},
        }  # fmt: skip
        standing.phases.append(phase)
        self._happened(f"keeps the {choice} model after the phase with {site}'s")

    def _scores(self, models: dict[Candidate, Tensors]) -> dict[Candidate, float]:
        own = self.bare(self.network)
        networks: dict[Candidate, torch.nn.Module] = {"local": own}
        for name, arrays in models.items():
            networks[name] = copy.deepcopy(own)
            load_arrays(shared_tensors(networks[name]), arrays)
        seed = int(2**32 * uniform(self.study.seed, "patches", self._standing.version.site))
        return foreground_dice(self, networks, seed)


def _received(payload: Path) -> dict[str, Array]:
    """The tensors of a model that has come, as float32; called on every rank, and all have them or none.

    Raises:
        FederationError: what has come cannot be used.
    """
    arrays, trouble = {}, ""
    try:
        arrays = widen(open_payload(payload))
        check_finite(arrays)
    except FederationError as error:
        trouble = str(error)
    troubles = list(filter(None, of_all_ranks(trouble)))
    if troubles:
        raise FederationError(troubles[0])
    return arrays
