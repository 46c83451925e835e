"""A site's own settings: ``site.toml``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StrictInt, StrictStr, field_validator, model_validator

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.study.address import Address
from nnunet_fed.study.federation import LONGEST_MINUTES, SITE_NAME, Fold
from nnunet_fed.study.labels import LabelMap
from nnunet_fed.study.table import Table
from nnunet_fed.study.toml import read_table

SITE_FILE_VARIABLE = "nnUNet_fed_site"


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
    """This site's fold for the study's fold; ``None``: the same, or ``all``. ``all``: for each fold of the study."""
    folds: dict[str, Fold] = Field(default_factory=dict)
    """By the study's fold: this site's, before what :attr:`fold` says."""
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
            _checked_address(address)
            other = by_address.setdefault(str(Address.parse(address)).lower(), site)
            if other != site:
                raise ValueError(f"the sites {other!r} and {site!r} have one address, {address}: give each its own")
        return peers

    @field_validator("folds")
    @classmethod
    def _folds(cls, folds: dict[str, Fold]) -> dict[str, Fold]:
        for name in folds:
            if name != "all" and not name.isdecimal():
                raise ValueError(f"{name!r} is no fold of the study: use a whole number from 0 on, or 'all'")
        numbers = [own for own in folds.values() if own != "all"]
        if len(set(numbers)) < len(numbers):
            raise ValueError("two folds of the study are one fold of this site, whose folder can hold one only")
        return folds

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
        site = read_table(cls, path)
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
    if Address.parse(address).port == 0:
        raise ValueError(f"{address!r} is no HOST:PORT, for example 127.0.0.1:7464: nobody is reached at the port 0")
    return address
