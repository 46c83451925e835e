"""The methods' tables in ``federation.toml``: their options, defaults and bounds. Source of each: docs/methods.md.

pydantic only: the coordinator reads them, and it has no torch.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, StrictStr, model_validator

from nnunet_fed.study.table import Neutral, Table


class MethodTable(Table):
    """A method's table."""

    own_channels_option: ClassVar[str | None] = None
    """The option with which each site has input channels of its own; ``None``: the method has no such option."""

    @property
    def own_channels(self) -> bool:
        """Each site has input channels of its own: they need not agree, and are normalised by its own intensities."""
        return self.own_channels_option is not None and bool(getattr(self, self.own_channels_option))

    def check_sites(self, sites: tuple[str, ...]) -> None:
        """See that the method suits the study's sites; raises :class:`ValueError`."""

    def check_epochs(self, epochs: int) -> None:
        """See that the method suits the study's number of epochs; raises :class:`ValueError`."""

    def check_cross_site(self) -> None:
        """See that a site's model can be evaluated at the others; raises :class:`ValueError`."""
        if self.own_channels:
            raise ValueError(
                f"cross_site = true does not go with {self.own_channels_option} = true: with it each site has input "
                "channels of its own, and no model takes another site's images. Take one of them out"
            )


class FineTuned(MethodTable):
    """A method after whose rounds a site may train on alone; see :mod:`nnunet_fed.trainers.parts.finetuning`."""

    finetune_epochs: int = Field(default=0, ge=0)
    """Epochs of local fine-tuning after the last round. What is deployed is the best of them by the site's own
    validation; 0: what the rounds gave."""
    finetune_lr_factor: float = Field(default=0.1, gt=0)
    """Learning rate at the start of the fine-tuning, over the study's; nnU-Net's schedule begins anew with it."""


class Local(FineTuned):
    """Every site trains alone, by the harmonised plans and from the common start: the control of all methods."""

    name: Literal["local"]


class FedAvg(FineTuned):
    """Federated averaging (McMahan et al. 2017, Algorithm 1): the mean of the sites' weights after local training."""

    name: Literal["fedavg"]


class FedProx(FineTuned):
    """Federated averaging with a proximal term; see :mod:`nnunet_fed.methods.proximal`."""

    name: Literal["fedprox"]
    mu: float = Field(default=0.01, ge=0)
    """The source's mu; 0: federated averaging, bit for bit. The source has no default for all data: tune it."""


class FedAvgM(FineTuned):
    """Federated averaging with momentum of the global model; see :mod:`nnunet_fed.methods.server_optimizer`."""

    name: Literal["fedavgm"]
    server_lr: float = Field(default=1.0, gt=0)
    server_momentum: float = Field(default=0.9, ge=0, lt=1)
    """The source's beta; with 0, and ``server_lr`` 1, federated averaging, bit for bit."""


class FedAdam(FineTuned):
    """Adam on the mean of the sites' updates; see :mod:`nnunet_fed.methods.server_optimizer`."""

    name: Literal["fedadam"]
    server_lr: float = Field(default=0.01, gt=0)
    """The source's eta, which it tunes for each task; this value is ours."""
    beta_1: float = Field(default=0.9, ge=0, lt=1)
    beta_2: float = Field(default=0.99, ge=0, lt=1)
    tau: float = Field(default=1e-3, gt=0)
    """The source's degree of adaptivity: what is added to the root of the second moment."""


class Ditto(MethodTable):
    """Federated averaging, and a personalized model beside it; see :mod:`nnunet_fed.methods.proximal`."""

    name: Literal["ditto"]
    pull_strength: float = Field(default=1.0, ge=0)
    """The source's lambda: how strongly the personalized model is pulled to the global one; 0: it trains alone."""


def _number_per_class(value: Any) -> Any:
    numbers = list(value.values()) if isinstance(value, dict) else [value]
    if not numbers or not all(type(number) in (int, float) for number in numbers):
        raise ValueError("use a number, or a number for each class by its name")
    return {name: float(number) for name, number in value.items()} if isinstance(value, dict) else float(value)


PerClass = Annotated[float | dict[str, float], BeforeValidator(_number_per_class)]
"""One number for all classes, or one for each by its name."""
Threshold = Annotated[
    float | dict[str, float] | Literal["calibrate"],
    BeforeValidator(lambda value: value if value == "calibrate" else _number_per_class(value)),
]


class FedGS(FineTuned):
    """Federated gradient scaling: see :mod:`nnunet_fed.methods.fedgs` for the source and the symbols."""

    name: Literal["fedgs"]
    # of 0.2, where the other methods have had both since 0.1
    finetune_epochs: Annotated[int, Neutral(0, since=3)] = Field(default=0, ge=0)
    finetune_lr_factor: Annotated[float, Neutral(0.1, since=3)] = Field(default=0.1, gt=0)
    variant: Literal["fedgs", "fedgs_norm", "fedavg_gain", "fedavg_server_lr"] = "fedgs"
    """``fedgs``, or a control that tells it from a larger step: factors divided by the federation's mean of the round
    before (``fedgs_norm``), each site's update times its own mean factor (``fedavg_gain``), or all updates times the
    federation's mean factor (``fedavg_server_lr``)."""
    strength: float = Field(default=2.0, ge=0)
    """The source's lambda."""
    threshold: Threshold = "calibrate"
    """The source's tau: from which inverse area on a class is small in a patch; ``calibrate``: the 80th percentile."""
    log_base: PerClass | None = None
    """The source's l; ``None``: the threshold, as in the source's LiTS experiment."""
    classes: tuple[StrictStr, ...] | None = Field(default=None, min_length=1)
    """Names of the lesion classes in dataset.json; ``None``: all foreground classes."""
    truncation_guard: bool = True
    """In 3D a class that touches a face of the patch is not small."""
    warm_down: float = Field(default=0.0, ge=0, lt=1)
    """Share of the rounds, the last ones, over which the strength falls linearly to 0."""

    @model_validator(mode="after")
    def _sizes_are_possible(self) -> FedGS:
        thresholds = [] if self.threshold == "calibrate" else _values(self.threshold)
        if any(threshold < 1 for threshold in thresholds):
            raise ValueError("threshold is an inverse area, patch over lesion: use numbers of at least 1")
        if any(base <= 1 for base in (thresholds if self.log_base is None else _values(self.log_base))):
            raise ValueError(
                "the base of a logarithm is above 1: correct log_base (or the threshold, which is its base)"
            )
        return self


def _values(per_class: float | dict[str, float] | str) -> list[float]:
    return list(per_class.values()) if isinstance(per_class, dict) else [float(per_class)]


class FedSM(MethodTable):
    """Personalized models by SoftPull, a global model and a selector; see :mod:`nnunet_fed.methods.fedsm`."""

    name: Literal["fedsm"]
    softpull_self_weight: float = Field(default=0.7, gt=0, le=1)
    """The source's lambda: weight of a site's own model in the pull, from 1/K (all equal) to 1 (no pull)."""
    softpull_schedule: Literal["lr_coupled", "constant"] = "lr_coupled"
    """``constant`` is the published code's; under nnU-Net's falling learning rate it makes all models equal."""
    gamma: float = Field(default=0.9, ge=0, le=1)
    """A case goes to a site's model if the selector's probability of that site is above it, else to the global one."""
    selector_mode: Literal["server_adam", "reference"] = "server_adam"
    """One Adam step on the sites' mean gradient, or the published code's mean of the sites' own steps."""
    selector_lr: float = Field(default=1e-2, gt=0)
    selector_patches: int = Field(default=8, ge=1)
    """At most so many patches of a case."""
    selector_steps_per_round: int = Field(default=1, ge=1)
    selector_class_balanced: bool = True
    """Every site weighs 1 in the selector's training; otherwise its number of training cases."""
    selector_header_features: bool = False
    """The selector also sees spacing, shape, mean and deviation of the image as it came."""
    selector_min_accuracy: float = Field(default=0.8, ge=0, le=1)
    """With a lower accuracy on all sites' validation cases, the super model is the global one."""
    warm_up_rounds: int = Field(default=0, ge=0)
    """So many rounds the personalized models are the global one."""
    personal_every: int = Field(default=1, ge=1)
    """The personalized model trains on every so many batches."""
    familiarity_gate: bool = True
    """Cases whose texture is unlike that of every site's images go to the global model."""
    share_personal: bool = True
    """Every site gets all personalized models at the end; otherwise a super model has its own and the global one."""
    best_model_gate: bool = False
    """Cases of a site whose personalized model is not better than the global one there go to the global one."""

    def check_sites(self, sites: tuple[str, ...]) -> None:
        """At least two, none with the global model's name, and a self-weight of at least 1/K."""
        if len(sites) < 2:
            raise ValueError("a study of FedSM needs at least two sites: it personalizes between them")
        if "global" in sites:
            raise ValueError("no site may be called 'global': it means the global model")
        if self.softpull_self_weight * len(sites) < 1:
            raise ValueError(
                f"softpull_self_weight is {self.softpull_self_weight:g}, but with {len(sites)} sites it must be at "
                f"least 1/{len(sites)}: below, a pull throws each model past the mean"
            )


class FedOAP(FineTuned):
    """A shared trunk, private parts and fine-tuning, across organs; see :mod:`nnunet_fed.methods.fedoap`."""

    own_channels_option = "private_stem"
    name: Literal["fedoap"]
    finetune_epochs: int = Field(default=2, ge=0)
    """As for :class:`FineTuned`; 2 is the public code's."""
    heads: int = Field(default=1, ge=1)
    """Heads of the attention; the public code's has one."""
    query_branch: Literal["copy", "light"] = "copy"
    """The private branch that gives the queries: as the encoder's last stage, or one convolution block."""
    adapter: Literal["res3", "none"] = "res3"
    """The private spatial adapter before the output."""
    private_stem: bool = False
    """The first convolution is private too: each site has input channels of its own, see docs/planning.md."""
    tau: float = Field(default=0.75, ge=0, le=1)
    """Fine-tuning: logits are perturbed where the error exceeds it; at 1 nowhere."""
    sigma: float = Field(default=0.1, ge=0)
    """Fine-tuning: standard deviation of the perturbation."""
    perturbation_weight: float = Field(default=0.1, ge=0, le=1)
    """Fine-tuning: weight of the perturbed loss, the source's lambda; 0: plain fine-tuning."""


class GCML(MethodTable):
    """Gossip between peers and mutual learning, without a server; see :mod:`nnunet_fed.methods.gcml` and
    :mod:`nnunet_fed.gossip.schedule` for sources and symbols. A round is an occasion to send and to receive."""

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


Method = Annotated[
    Local | FedAvg | FedProx | FedAvgM | FedAdam | Ditto | FedGS | FedSM | FedOAP | GCML, Field(discriminator="name")
]
"""The method's table: ``name`` and the options of that method. A new method adds its table to this union."""

METHOD_TABLES: dict[str, type[MethodTable]] = {
    "local": Local, "fedavg": FedAvg, "fedgs": FedGS, "fedsm": FedSM, "fedoap": FedOAP,
    "gcml": GCML, "fedprox": FedProx, "fedavgm": FedAvgM, "fedadam": FedAdam, "ditto": Ditto,
}  # fmt: skip
"""Table of each method, by its name."""
