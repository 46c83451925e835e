"""The study: who takes part, which method, how long. Read from ``federation.toml`` (and ``site.toml`` at a site)."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
    model_validator,
)

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.exchange.precision import WireDtype
from nnunet_fed.study.labels import LabelMap
from nnunet_fed.study.method_tables import METHOD_TABLES, Method, Table

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SITE_FILE_VARIABLE = "nnUNet_fed_site"
PLANS_KEY = "federation"
"""Key of nnU-Net's plans under which the study travels to the trainers."""

_T = TypeVar("_T", bound=BaseModel)
LONGEST_MINUTES = 366 * 24 * 60.0
SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
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


Spacing = Annotated[float, Field(gt=0)]
Fold = Annotated[int | Literal["all"], BeforeValidator(_is_fold)]


class Federation(Table):
    """A study as all sites agree on it.

    Fields marked *operational* may change while the study runs; all others change the mathematics, and with it
    :attr:`digest`. Source: ours; the names of the training settings are nnU-Net's.
    """

    name: str = Field(min_length=1, max_length=100)
    sites: tuple[str, ...] = Field(min_length=1)
    """*Operational.* Names of the sites, sorted."""
    method: Method
    planner: str = "nnUNetPlannerFed"
    geometry: Literal["private", "lists"] = "private"
    """What the sites tell each other of spacings and shapes: sums from which medians are found, or every case's
    (sorted, without names). The plans are the same; ``lists`` leaves nnU-Net's complete fingerprint file."""
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
    """Cross-validation fold that the sites train; a site may map it to another one or to ``all`` (site.toml)."""
    rounds: int = Field(ge=1)
    local_epochs: int = Field(default=1, ge=1)
    iterations_per_epoch: int = Field(default=250, ge=1)
    val_iterations_per_epoch: int = Field(default=50, ge=1)
    initial_lr: float = Field(default=1e-2, gt=0, lt=float("inf"))
    momentum: float = Field(default=0.99, ge=0, lt=1)
    momentum_on_round: Literal["keep", "reset"] = "keep"
    weighting: Literal["cases", "uniform"] = "cases"
    """Weight of a site in a mean: its number of training cases, or 1."""
    wire_dtype: WireDtype = "float32"
    """Dtype in which models travel (:mod:`nnunet_fed.exchange.precision`): ``float32`` loses nothing, the others halve
    the bytes."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    min_sites: int | None = Field(default=None, ge=1)
    """*Operational.* A round closes at its deadline with at least so many sites; ``None``: all."""
    deadline_minutes: float = Field(default=720.0, gt=0, le=LONGEST_MINUTES)
    """*Operational.* From a round's first contribution until it closes without the sites that are missing."""
    planning_deadline_minutes: float = Field(default=720.0, gt=0, le=LONGEST_MINUTES)
    """*Operational.* The same for planning, which fails at its deadline, since it is exact only with all sites."""
    keep_rounds: int = Field(default=3, ge=2)
    """*Operational.* Means of so many rounds are kept at the coordinator; the newest are never deleted."""
    max_update_norm: float | None = Field(default=None, gt=0, lt=float("inf"))
    """*Operational.* A model whose distance to the last one is above so many times the median of recent rounds' is
    refused, and the round goes on without its site; ``None``: no bound."""
    cross_site: bool = False
    """*Operational.* After the training the model that each site deploys is evaluated at every other site. It counts
    where the plans, with which a site trains, say so too: no site's model leaves it by what is edited later."""

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
    def _sites_are_enough(self) -> Federation:
        if self.min_sites is not None and self.min_sites > len(self.sites):
            raise ValueError(f"min_sites is {self.min_sites}, but the study has only {len(self.sites)} sites")
        self.method.check_sites(self.sites)
        self.method.check_epochs(self.epochs)
        if self.cross_site:
            self.method.check_cross_site()
        return self

    @property
    def quorum(self) -> int:
        """Least number of sites with which a training round may close."""
        return len(self.sites) if self.min_sites is None else self.min_sites

    @property
    def epochs(self) -> int:
        """nnU-Net epochs of the whole training."""
        return self.rounds * self.local_epochs

    @property
    def digest(self) -> str:
        """SHA-256 of everything that changes the mathematics (rule 6 of the protocol)."""
        return digest_of(self.model_dump(mode="json", exclude=OPERATIONAL))

    @classmethod
    def read(cls, path: Path) -> Federation:
        """Read and check ``federation.toml``; raises :class:`ConfigurationError` that names file, key and remedy."""
        return _read(cls, path)


OPERATIONAL = {
    "name", "sites", "plans_name", "configuration", "min_cases", "min_sites", "deadline_minutes",
    "planning_deadline_minutes", "keep_rounds", "max_update_norm", "cross_site",
}  # fmt: skip


def _is_label_source(source: Any) -> Any:
    sources = source if isinstance(source, list | tuple) else (source,)
    if not all(type(entry) in (int, str) for entry in sources):
        raise ValueError("use a label's name or number, or a list of them, as dataset.json has them")
    return sources


LabelSource = Annotated[tuple[StrictInt | StrictStr, ...], BeforeValidator(_is_label_source)]


KEY_FILES = ("certificate", "key", "ca")
"""Keys of ``site.toml`` that name the PEM files for TLS."""


class Site(Table):
    """A site's own settings: ``site.toml``, found through the environment variable ``nnUNet_fed_site``."""

    name: str
    coordinator: str
    """``host:port`` of the coordinator."""
    certificate: Path | None = None
    """PEM file of this site's certificate, which says its name. As the next two, relative to ``site.toml``'s folder."""
    key: Path | None = None
    """PEM file of the certificate's private key."""
    ca: Path | None = None
    """PEM file of the authorities whose certificate the coordinator may show."""
    server_name: str | None = Field(default=None, min_length=1)
    """Host in the coordinator's certificate, if it is reached under another name (through a tunnel)."""
    insecure: bool = False
    """Talk without TLS instead; accepted for a loopback address only."""
    fold: Fold | None = None
    """This site's fold for the study's fold; ``None``: the same, or ``all``."""
    listen: str | None = None
    """``host:port`` at which this site takes other sites' models (GCML)."""
    peers: dict[str, str] = Field(default_factory=dict)
    """By site, this one included: ``host:port`` at which others reach it. The same at all sites."""
    peer_megabytes_per_second: float | None = Field(default=None, ge=1)
    """At most so much leaves for all peers together, and as much comes from them; ``None``: what the line allows."""
    revoked: Path | None = None
    """File of the certificates that are no longer accepted from peers; relative to ``site.toml``'s folder."""
    connect_minutes: float = Field(default=1.0, gt=0, le=LONGEST_MINUTES)
    """How long to wait for a coordinator that does not answer when a command starts."""
    tensorboard: bool = False
    """Write TensorBoard scalars beside the checkpoints; needs tensorboardX."""
    mapped_dataset: int | None = Field(default=None, ge=1, le=999)
    """Free number for the data set with the federation's labels, which is built beside this site's own."""
    labels: dict[str, LabelSource] | None = Field(default=None, min_length=1)
    """By the federation's label, in the order of its numbers 1, 2, ...: this site's labels that become it."""

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        if not SITE_NAME.fullmatch(name):
            raise ValueError(f"site name {name!r}: use letters, digits, '_', '-' and '.', at most 63 of them")
        return name

    @field_validator("coordinator", "listen")
    @classmethod
    def _address(cls, address: str | None) -> str | None:
        return address if address is None else _checked_address(address)

    @field_validator("peers")
    @classmethod
    def _peers(cls, peers: dict[str, str]) -> dict[str, str]:
        by_address: dict[str, str] = {}
        for site, address in peers.items():
            cls._name(site)
            other = by_address.setdefault(_checked_address(address).lower(), site)
            if other != site:
                raise ValueError(f"the sites {other!r} and {site!r} have one address, {address}: give each its own")
        return peers

    @model_validator(mode="after")
    def _peers_are_complete(self) -> Site:
        if (self.listen is None) != (not self.peers):
            raise ValueError("listen and peers go together: give both, or neither")
        if self.peers and self.name not in self.peers:
            raise ValueError(
                f"peers lacks this site, {self.name!r}: the list is the same at all sites, with the address at which "
                "the others reach this one"
            )
        return self

    @model_validator(mode="after")
    def _keys_are_complete(self) -> Site:
        given = [name for name in KEY_FILES if getattr(self, name) is not None]
        beside = [*given, *(name for name in ("server_name", "revoked") if getattr(self, name) is not None)]
        if self.insecure and beside:
            raise ValueError(
                f"insecure = true goes without {', '.join(beside)}: it means that nothing is "
                "encrypted and nobody shows who they are. Remove the one or the other"
            )
        if given and len(given) < len(KEY_FILES):
            raise ValueError(f"{', '.join(KEY_FILES)} go together, but only {' and '.join(given)} is given")
        return self

    @model_validator(mode="after")
    def _map_is_complete(self) -> Site:
        if (self.labels is None) != (self.mapped_dataset is None):
            raise ValueError("labels and mapped_dataset go together: give both, or neither")
        return self

    @property
    def label_map(self) -> LabelMap | None:
        """Of ``labels`` and ``mapped_dataset``; ``None``: this site's labels are the federation's."""
        if self.labels is None or self.mapped_dataset is None:
            return None
        return LabelMap(self.mapped_dataset, self.labels)

    @classmethod
    def read(cls, path: Path) -> Site:
        """Read and check ``site.toml``; raises :class:`ConfigurationError` that names file, key and remedy."""
        site = _read(cls, path)
        names = (*KEY_FILES, "revoked")
        files = {name: path.parent / getattr(site, name) for name in names if getattr(site, name) is not None}
        return site.model_copy(update=files)

    @classmethod
    def from_environment(cls) -> Site:
        """Read the file that ``nnUNet_fed_site`` names; raises :class:`ConfigurationError`."""
        path = os.environ.get(SITE_FILE_VARIABLE)
        if not path:
            raise ConfigurationError(
                f"The environment variable {SITE_FILE_VARIABLE} is not set. Point it at this site's site.toml "
                "('nnunet_fed init' writes one to start from)."
            )
        return cls.read(Path(path))


def _checked_address(address: str) -> str:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{address!r} is no HOST:PORT, for example 127.0.0.1:7464")
    return address


def _read(cls: type[_T], path: Path) -> _T:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"{path} cannot be read: {error}. 'nnunet_fed init' writes one to start from."
        ) from None
    try:
        return cls.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path} is no valid TOML: {error}.") from None
    except ValidationError as error:
        raise ConfigurationError(f"{path}: {explain(error, cls)}") from None


def explain(error: ValidationError, cls: type[BaseModel]) -> str:
    """All of pydantic's complaints as a sentence each, with the nearest known key for a typo."""
    sentences = []
    for problem in error.errors(include_url=False):
        path, table = list(problem["loc"]), cls
        if path[:1] == ["method"] and len(path) > 1:
            table = METHOD_TABLES[str(path.pop(1))]  # pydantic names the chosen table in between
        place = ".".join(str(part) for part in path) or "the file"
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(path[-1]), list(table.model_fields), n=1)
            sentences.append(f"unknown key '{place}'" + (f", did you mean '{near[0]}'?" if near else "."))
        elif problem["type"] == "union_tag_not_found":
            sentences.append(f"the key '{place}.name' is missing.")
        elif problem["type"] == "missing":
            sentences.append(f"the key '{place}' is missing.")
        elif problem["type"] in ("literal_error", "union_tag_invalid"):
            context = problem["ctx"]
            given = context.get("tag", problem["input"])
            known = context.get("expected_tags") or context["expected"]
            sentences.append(f"{place}: there is no {given!r}; known: {known}.")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            found = "" if isinstance(problem["input"], dict) else f" (found {problem['input']!r})"
            sentences.append(f"{place}: {message[0].lower() + message[1:]}{found}.")
    return " ".join(sentences)
