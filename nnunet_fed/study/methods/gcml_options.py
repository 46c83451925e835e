"""GCML: gossip between peers and mutual learning. Options and facts; docs/methods.md explains them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from nnunet_fed.study.method_table import MethodTable


class GCML(MethodTable):
    """Gossip between peers and mutual learning, without a server; see :mod:`nnunet_fed.methods.gcml` and
    :mod:`nnunet_fed.gossip.schedule` for sources and symbols. A round is an occasion to send and to receive."""

    TITLE = "GCML"
    NEEDS_PEERS = True
    MODELS = 2
    SCOPES_BEFORE = ()
    EXCHANGES = False
    name: Literal["gcml"]
    contrast: Literal["full", "region", "foreground_background", "correctness", "agreement"] = "correctness"
    """D, the notes' V0 to V4: where a model follows the other one, and where it keeps off."""
    contrast_weight: float = Field(default=0.1, ge=0)
    """gamma: weight of what keeps off, in ``correctness`` and ``agreement``."""
    margin: float = Field(default=2.0, gt=0)
    """m, in nats: how far to keep off."""
    background_weight: float = 0.1
    """Weight of the background in ``foreground_background``; below 0 it keeps off."""
    temperature: float = Field(default=1.0, gt=0)
    """tau: divides the logits of both models in D."""
    roi: Literal["union", "reference"] = "union"
    """Where ``correctness`` and ``agreement`` look: the foreground of reference and predictions, or the reference's."""
    class_mean: bool | None = None
    """Every class weighs the same in D; ``None``: with more than two classes."""
    contrast_heads: Literal["full_resolution", "all"] = "full_resolution"
    """Outputs of the deep supervision that D is of."""
    mix: Literal["additive", "convex"] = "additive"
    """The loss is L + lambda D, or (1 - lambda) L + lambda D."""
    mutual_weight: float = Field(default=0.5, ge=0)
    """lambda at the end of the ramp; 0: the two models train side by side and learn nothing of each other."""
    ramp_steps: int = Field(default=50, ge=0)
    """Steps since a model arrived in which lambda rises from 0."""
    warm_up_epochs: int | None = Field(default=None, ge=0)
    """Epochs before a site sends or receives; ``None``: a twentieth of all, so 50 of nnU-Net's 1000."""
    mutual_epochs: int = Field(default=1, ge=1)
    """Epochs with a model that has arrived."""
    topology: Literal["bernoulli", "uniform_push", "derangement", "matching", "ring", "exponential"] = "bernoulli"
    """Who sends to whom, see :class:`nnunet_fed.gossip.schedule.Schedule`."""
    expected_senders: float | None = Field(default=None, gt=0)
    """c of ``bernoulli``: how many sites send in a round, on average; ``None``: half of them."""
    mode: Literal["push", "pull"] = "push"
    """A site whose turn it is gives its model to a peer, or fetches the peer's."""
    max_tries: int = Field(default=3, ge=1)
    """Peers that are tried in a round until one answers."""
    max_epoch_distance: int = Field(default=100, ge=0)
    """Models whose training is more epochs ahead or behind are not wanted; 0: all are."""
    keep: Literal["local", "best", "merge"] = "local"
    """With which model a site goes on, see :func:`nnunet_fed.gossip.schedule.kept`."""
    keep_tolerance: float = Field(default=0.005, ge=0)
    """Of ``best``: by how much another model's Dice must be above that of the site's own."""
    merge_weight: float = Field(default=0.5, ge=0, le=1)
    """Weight of the site's own model in a merged one."""
    common_init: bool = True
    """All sites start from the same weights; otherwise each from its own. Without it no models are merged."""
    lockstep: bool = False
    """For tests and simulations, to be reproducible: before a round a site waits for the models that the last one's
    schedule promises it, and for its own last one to arrive, up to the study's deadline. Otherwise no site ever waits
    for another."""

    def warm_up(self, epochs: int) -> int:
        """Epochs of the warm-up in a study of so many."""
        return epochs // 20 if self.warm_up_epochs is None else self.warm_up_epochs

    @model_validator(mode="after")
    def _options_go_together(self) -> GCML:
        if self.keep == "merge" and not self.common_init:
            raise ValueError(
                "keep = 'merge' needs common_init = true: the mean of models that started differently is none"
            )
        if self.mix == "convex" and self.mutual_weight > 1:
            raise ValueError("with mix = 'convex' mutual_weight is a share: use at most 1")
        if self.expected_senders is not None and self.topology != "bernoulli":
            raise ValueError(f"expected_senders is for the topology 'bernoulli', not for '{self.topology}': remove it")
        if self.lockstep and self.mode == "pull":
            raise ValueError("lockstep = true needs mode = 'push': who pulls waits for nobody's turn")
        return self

    def check_sites(self, sites: tuple[str, ...]) -> None:
        """At least two, and no more senders than sites."""
        if len(sites) < 2:
            raise ValueError("a study of GCML needs at least two sites: models go from one to another")
        if self.expected_senders is not None and self.expected_senders > len(sites):
            raise ValueError(f"expected_senders is {self.expected_senders:g}, but the study has {len(sites)} sites")

    def check_cross_site(self) -> None:
        """Never: the sites have no coordinator while they train."""
        raise ValueError(
            "cross_site = true needs the coordinator after the training, and sites that train with GCML do not call "
            "it: take cross_site out"
        )

    def check_epochs(self, epochs: int) -> None:
        """A warm-up and a mutual phase fit into them."""
        if self.warm_up(epochs) + self.mutual_epochs > epochs:
            raise ValueError(
                f"warm_up_epochs ({self.warm_up(epochs)}) and mutual_epochs ({self.mutual_epochs}) do not fit into the "
                f"study's {epochs} epochs: no model would ever be learnt from"
            )
