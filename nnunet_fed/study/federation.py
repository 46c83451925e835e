"""The study: who takes part, which method, how long. Read from ``federation.toml``."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.exchange.precision import WireDtype
from nnunet_fed.study.methods import METHODS, Method
from nnunet_fed.study.table import NEWEST_PROTOCOL, OLDEST_PROTOCOL, Neutral, Table, neutral_of
from nnunet_fed.study.toml import explain, read_table

PLANS_KEY = "federation"
"""Key of nnU-Net's plans under which the study travels to the trainers."""

LONGEST_MINUTES = 366 * 24 * 60.0
SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
TRAINER_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
STOCK_TRAINER = "nnUNetTrainer"
"""nnU-Net's own, on which the federated trainers build unless a study names another one."""
DIGEST = re.compile(r"[0-9a-f]{64}")
COORDINATOR, WATCHER = "coordinator", "watcher"
"""Names in certificates that are no site's: the coordinator's own, and one for reading the status."""


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes. NaN and infinity are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """SHA-256 over :func:`canonical_json`, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def _is_fold(fold: Any) -> Any:
    if fold != "all" and (type(fold) is not int or fold < 0):
        raise ValueError("use a whole number from 0 on, or 'all'")
    return fold


def _is_digest(text: Any) -> Any:
    if text is not None and not (isinstance(text, str) and DIGEST.fullmatch(text)):
        raise ValueError("use the 64 hexadecimal digits that 'nnunet_fed digest FILE' prints")
    return text


Spacing = Annotated[float, Field(gt=0)]
Fold = Annotated[int | Literal["all"], BeforeValidator(_is_fold)]


class Federation(Table):
    """A study as all sites agree on it.

    Fields marked *operational* may change while the study runs; all others change the mathematics, and with it
    :attr:`digest`. A field that is added, or whose default is changed, is marked
    :class:`nnunet_fed.study.table.Neutral`. Source: ours; the names of the training settings are nnU-Net's.
    """

    OPERATIONAL = frozenset({
        "name", "sites", "plans_name", "configuration", "fold", "folds", "min_cases", "min_sites", "deadline_minutes",
        "planning_deadline_minutes", "keep_rounds", "keep_every", "max_update_norm", "cross_site", "more_rounds",
    })  # fmt: skip

    name: str = Field(min_length=1, max_length=100)
    sites: tuple[str, ...] = Field(min_length=1)
    """*Operational.* Names of the sites, sorted."""
    method: Method
    planner: str = "nnUNetPlannerFed"
    geometry: Literal["private", "lists"] = "private"
    """What the sites tell each other of spacings and shapes: sums from which medians are found, or every case's
    (sorted, without names). The plans are the same; ``lists`` leaves a fingerprint of every case at all sites."""
    overwrite_target_spacing: tuple[Spacing, Spacing, Spacing] | None = None
    """Voxel size in mm of 3d_fullres along the array's axes; ``None``: the planner's choice."""
    gpu_memory_target_in_gb: float | None = Field(default=None, gt=0)
    """Memory for which the planner chooses patches and batches; ``None``: the planner's own default."""
    preprocessor_name: str = "DefaultPreprocessor"
    """A class in ``nnunetv2.preprocessing``."""
    min_cases: int = Field(default=1, ge=1)
    """*Operational.* A site with fewer training cases refuses to plan, before anything about them leaves it: sums over
    few cases tell what these are."""
    plans_name: str | None = None
    """*Operational.* Name of the plans file; ``None``: the planner's own name."""
    configuration: str = "3d_fullres"
    """*Operational.* What sites preprocess and train unless they say otherwise; part of a run's identity."""
    fold: Fold = 0
    """*Operational.* Cross-validation fold that the sites train; a site may map it to another one or to ``all``
    (site.toml). Part of a run's identity."""
    folds: Annotated[tuple[Fold, ...] | None, Field(min_length=1), Neutral(None, since=3)] = None
    """*Operational.* Folds that the sites train, each in a run of its own, in turn or at once; ``None``: :attr:`fold`
    alone, which else is the one that a site of version 0.1 trains."""
    rounds: int = Field(ge=1)
    more_rounds: Annotated[int, Field(ge=0), Neutral(0, since=3)] = 0
    """*Operational.* Further rounds, which a training that is over goes on with from its last state; it only grows."""
    local_epochs: int = Field(default=1, ge=1)
    iterations_per_epoch: int = Field(default=250, ge=1)
    val_iterations_per_epoch: int = Field(default=50, ge=1)
    trainer: Annotated[str, Neutral(STOCK_TRAINER, since=3)] = STOCK_TRAINER
    """The base trainer: the trainer of nnU-Net on which the method's trainer builds, with its augmentation, loss,
    network and optimizer. It stands in nnunetv2, or at every site in a folder of ``nnUNet_extTrainer``."""
    initial_lr: float | None = Field(default=1e-2, gt=0, lt=float("inf"))
    """``None``: that of :attr:`trainer`, which is so unless a study that names one says otherwise."""
    momentum: float | None = Field(default=0.99, ge=0, lt=1)
    """``None``: likewise."""
    momentum_on_round: Literal["keep", "reset"] = "keep"
    weighting: Literal["cases", "uniform"] = "cases"
    """Weight of a site in a mean: its number of training cases, or 1."""
    best: Annotated[Literal["site", "federation"], Neutral("site", since=3)] = "site"
    """Whose choice ``checkpoint_best.pth`` is: each site's own by nnU-Net's rule, or the round with the highest
    weighted mean of the sites' pseudo Dice, the same at all sites."""
    wire_dtype: WireDtype = "float32"
    """Dtype in which models travel (:mod:`nnunet_fed.exchange.precision`): ``float32`` loses nothing, the others halve
    the bytes."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    pretrained: Annotated[str | None, BeforeValidator(_is_digest), Neutral(None, since=3)] = None
    """Digest of the pretrained weights from which the training of :attr:`configuration` starts (``nnunet_fed digest
    FILE``); every site names the file with ``-pretrained_weights``. ``None``: the sites say, and must agree."""
    min_sites: int | None = Field(default=None, ge=1)
    """*Operational.* A round closes at its deadline with at least so many sites; ``None``: all."""
    deadline_minutes: float = Field(default=720.0, gt=0, le=LONGEST_MINUTES)
    """*Operational.* From a round's first contribution until it closes without the sites that are missing."""
    planning_deadline_minutes: float = Field(default=720.0, gt=0, le=LONGEST_MINUTES)
    """*Operational.* The same for planning, which fails at its deadline, since it is exact only with all sites."""
    keep_rounds: int = Field(default=3, ge=2)
    """*Operational.* Means of so many rounds are kept at the coordinator; the newest are never deleted."""
    keep_every: Annotated[int | None, Field(ge=1), Neutral(None, since=3)] = None
    """*Operational.* Besides those, the means of every so manyth round are kept for good, so that the study can go back
    to them (``nnunet_fed rewind``); ``None``: no others."""
    max_update_norm: float | None = Field(default=None, gt=0, lt=float("inf"))
    """*Operational.* A model whose distance to the last one is above so many times the median of recent rounds' is
    refused, and the round goes on without its site; ``None``: no bound."""
    cross_site: bool = False
    """*Operational.* After the training the model that each site deploys is evaluated at every other site. It counts
    where the plans, with which a site trains, say so too: no site's model leaves it by what is edited later."""

    @model_validator(mode="before")
    @classmethod
    def _a_base_trainer_has_its_own_optimizer(cls, content: Any) -> Any:
        """nnU-Net's own learning rate and momentum are the defaults for nnU-Net's own trainer only."""
        if isinstance(content, Mapping) and content.get("trainer", STOCK_TRAINER) != STOCK_TRAINER:
            return {**dict.fromkeys(_OF_THE_OPTIMIZER), **content}
        return content

    @field_validator("trainer")
    @classmethod
    def _trainer_is_a_name(cls, trainer: str) -> str:
        if not TRAINER_NAME.fullmatch(trainer):
            raise ValueError("use the name of a class of nnU-Net's trainers, such as 'nnUNetTrainerDA5'")
        return trainer

    @model_validator(mode="before")
    @classmethod
    def _first_fold(cls, values: Any) -> Any:
        folds = values.get("folds") if isinstance(values, Mapping) else None
        return {"fold": folds[0], **values} if isinstance(folds, list | tuple) and folds else values

    @field_validator("folds")
    @classmethod
    def _folds_differ(cls, folds: tuple[Fold, ...] | None) -> tuple[Fold, ...] | None:
        if folds is not None and len(set(folds)) < len(folds):
            raise ValueError("name each fold once")
        return folds

    @model_validator(mode="after")
    def _fold_is_among_folds(self) -> Federation:
        if self.fold not in self.trained_folds:
            raise ValueError(f"fold is {self.fold!r}, which is none of folds: give one of these two only")
        return self

    @field_validator("sites")
    @classmethod
    def _sites_are_names(cls, sites: tuple[str, ...]) -> tuple[str, ...]:
        for site in sites:
            if not SITE_NAME.fullmatch(site):
                raise ValueError(f"site name {site!r}: use letters, digits, '_', '-' and '.', at most 63 of them")
            if site in (COORDINATOR, WATCHER):
                raise ValueError(f"no site can be called {site!r}: such a certificate is no site's")
        twice = sorted({site for site in sites if sites.count(site) > 1})
        if twice:
            raise ValueError(f"site name given twice: {', '.join(twice)}")
        return tuple(sorted(sites))

    @model_validator(mode="after")
    def _the_stock_trainer_is_told_its_optimizer(self) -> Federation:
        missing = [name for name in _OF_THE_OPTIMIZER if getattr(self, name) is None]
        if missing and not self.names_trainer:
            raise ValueError(
                f"{' and '.join(missing)} may be left to a trainer that the study names only: give a number"
            )
        return self

    @model_validator(mode="after")
    def _sites_are_enough(self) -> Federation:
        if self.min_sites is not None and self.min_sites > len(self.sites):
            raise ValueError(f"min_sites is {self.min_sites}, but the study has only {len(self.sites)} sites")
        self.method.check_sites(self.sites)
        self.method.check_epochs(self.epochs)
        if self.best == "federation":
            self.method.check_best()
        if self.cross_site:
            self.method.check_cross_site()
            if self.more_rounds and not self.method.EXCHANGES:
                raise ValueError(
                    "more_rounds does not go with cross_site = true for a method whose sites train alone: their models "
                    "have been evaluated at each other once. Set cross_site = false"
                )
        return self

    @property
    def names_trainer(self) -> bool:
        """Whether the base trainer is another one than nnU-Net's own."""
        return self.trainer != STOCK_TRAINER

    @property
    def quorum(self) -> int:
        """Least number of sites with which a training round may close."""
        return len(self.sites) if self.min_sites is None else self.min_sites

    @property
    def trained_folds(self) -> tuple[Fold, ...]:
        """The folds that the sites train."""
        return self.folds or (self.fold,)

    @property
    def all_rounds(self) -> int:
        """Rounds of the whole training."""
        return self.rounds + self.more_rounds

    @property
    def epochs(self) -> int:
        """nnU-Net epochs of the whole training, without fine-tuning."""
        return self.all_rounds * self.local_epochs

    @property
    def digest(self) -> str:
        """SHA-256 of everything that changes the mathematics (rule 6 of the protocol)."""
        return self.digest_of_fold(0)

    def digest_of_fold(self, fold: Fold) -> str:
        """The digest by which the runs of a fold are known.

        It covers all fields of version 0.1 that change the mathematics, as 0.1 did, and newer ones where they are not
        neutral: a study has the same digest in every version that knows it.
        """
        content = self.stored()
        for name in (*self.OPERATIONAL, _OPERATIONAL_KEY):
            content.pop(name, None)
        return digest_of({**content, "fold": fold})

    def stored(self, protocol: int = NEWEST_PROTOCOL) -> dict[str, Any]:
        """See :meth:`Table.stored`; names the operational fields that an older version may ignore."""
        content = super().stored(protocol)
        newer = [
            name for name in sorted(self.OPERATIONAL & content.keys())
            if neutral_of(type(self).model_fields[name]).since > OLDEST_PROTOCOL
        ]  # fmt: skip
        return {**content, _OPERATIONAL_KEY: newer} if newer else content

    @classmethod
    def restore(cls, stored: Mapping[str, Any]) -> Federation:
        """The study that :meth:`stored` gave, in this or another version of nnunet_fed, older or newer.

        What is not named is neutral, whatever this version's defaults are. Operational fields that this version does
        not know are left out.

        Raises:
            ConfigurationError: this version does not know what the study asks for.
        """
        content = dict(stored)
        for name in set(content.pop(_OPERATIONAL_KEY, ())) - cls.model_fields.keys():
            content.pop(name, None)
        content, method = cls.complete(content), content.get("method", {})
        table = METHODS.get(method.get("name", ""))
        try:
            return cls.model_validate({**content, "method": method if table is None else table.complete(method)})
        except ValidationError as error:
            raise ConfigurationError(
                f"The study was made by another version of nnunet_fed, which this one does not understand: "
                f"{explain(error, cls)} Install the version that the coordinator has."
            ) from None

    def with_defaults(self, defaults: Mapping[str, Any]) -> Federation:
        """This study with the defaults of the version that opened it, for all that ``federation.toml`` does not set.

        Args:
            defaults: as :meth:`defaults` gave them then; none: those of 0.1.
        """
        return type(self).model_validate(self.filled(defaults))

    @classmethod
    def read(cls, path: Path) -> Federation:
        """Read and check ``federation.toml``; raises :class:`ConfigurationError` that names file, key and remedy."""
        return read_table(cls, path)


def study_in(plans: Mapping[str, Any]) -> Federation:
    """The study with which nnU-Net's plans were made.

    Raises:
        ConfigurationError: they were not made for a federation, or by a version that this one does not understand.
    """
    if "study" not in plans.get(PLANS_KEY, {}):
        raise ConfigurationError(
            f"The plans '{plans.get('plans_name')}' were not made for a federation. Run 'nnunet_fed "
            "plan_and_preprocess' and train with the plans that it names, for example -p nnUNetFedPlans."
        )
    return Federation.restore(plans[PLANS_KEY]["study"])


_OF_THE_OPTIMIZER = ("initial_lr", "momentum")
_OPERATIONAL_KEY = "operational"
"""Key of a stored study under which the newer operational fields are named."""
