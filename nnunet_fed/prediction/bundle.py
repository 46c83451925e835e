"""``fedsm_bundle.json``: what a FedSM training leaves for its super model, fold by fold, and the files beside it.

In a fold's folder stand, each a checkpoint that ``nnUNetv2_predict -chk`` takes too: ``checkpoint_final.pth`` (this
site's personalized model), ``checkpoint_global.pth``, and ``checkpoint_personal_SITE.pth`` of the sites that shared
theirs; and ``fedsm_selector.pth``. Source: ours.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator

from nnunet_fed.errors import ConfigurationError, FederationError
from nnunet_fed.files import replacing, write_text
from nnunet_fed.leases import in_turn
from nnunet_fed.methods.familiarity import Familiarity
from nnunet_fed.methods.fedsm import GLOBAL
from nnunet_fed.methods.selector import Selector, SelectorConfiguration
from nnunet_fed.methods.selector_validation import SelectorValidation
from nnunet_fed.prediction.checkpoint_files import FINAL_CHECKPOINT, GLOBAL_CHECKPOINT
from nnunet_fed.prediction.safe_loading import read_checkpoint
from nnunet_fed.study.federation import SITE_NAME
from nnunet_fed.study.table import Table
from nnunet_fed.study.toml import explain

BUNDLE = "fedsm_bundle.json"
SELECTOR_FILE = "fedsm_selector.pth"
READ_BY_NNUNET = ("network_weights", "init_args", "trainer_name", "inference_allowed_mirroring_axes")

Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class ValidationDice(Table):
    """Mean Dice on a site's own validation cases."""

    personal: float
    """Of the site's personalized model."""
    common: float
    """Of the global model."""


class FoldBundle(Table):
    """One trained fold; complete in itself, so that folds may be trained one by one."""

    site: str
    """Where it was trained: ``checkpoint_final.pth`` is this site's personalized model."""
    sites: tuple[str, ...] = Field(min_length=1)
    """The study's sites, sorted: the selector's classes in their order."""
    gamma: Probability
    selector: SelectorConfiguration
    temperature: float = Field(gt=0)
    confusion: tuple[tuple[Count, ...], ...]
    """The selector on all sites' validation cases, by true site (row) and likeliest site (column)."""
    accuracy: Probability
    """Of the selector on all sites' validation cases."""
    selector_min_accuracy: Probability
    """The gate: with a lower accuracy every case is predicted by the global model."""
    familiarity: Familiarity | None = None
    """What the sites' images look like, if ``familiarity_gate`` is on."""
    validation_dice: dict[str, ValidationDice] | None
    """By site, if ``best_model_gate`` is on."""
    shared: tuple[str, ...]
    """Other sites whose personalized model is here."""
    sha256: dict[str, str]
    """Of each file of the fold that prediction reads."""

    @model_validator(mode="after")
    def _agrees(self) -> FoldBundle:
        if list(self.sites) != sorted(set(self.sites)) or not all(SITE_NAME.fullmatch(site) for site in self.sites):
            raise ValueError(f"the sites must be names, sorted and each once: {', '.join(self.sites)}")
        if GLOBAL in self.sites:
            raise ValueError(f"no site may be called '{GLOBAL}': it means the global model")
        if not {self.site, *self.shared, *(self.validation_dice or ())} <= set(self.sites):
            raise ValueError(f"all sites that it names must be among {', '.join(self.sites)}")
        sizes = {self.selector.classes, len(self.confusion), *map(len, self.confusion)}
        if sizes != {len(self.sites)}:
            raise ValueError(f"the selector and its confusion matrix must be of {len(self.sites)} sites")
        if set(self.sha256) != {GLOBAL_CHECKPOINT, SELECTOR_FILE, *self.personal_checkpoints.values()}:
            raise ValueError("there must be one hash for each checkpoint and for the selector")
        return self

    @property
    def personal_checkpoints(self) -> dict[str, str]:
        """File names of the personalized models that are here, by site."""
        return {self.site: FINAL_CHECKPOINT} | {site: personal_checkpoint(site) for site in self.shared}

    @property
    def trusted(self) -> bool:
        """Whether the selector passed its gate."""
        return self.accuracy >= self.selector_min_accuracy


class Bundle(Table):
    """All folds that were trained in a model folder, by the folds' names."""

    format_version: Literal[1] = 1
    folds: dict[str, FoldBundle] = Field(min_length=1)


def personal_checkpoint(site: str) -> str:
    """File name of another site's personalized model."""
    return f"checkpoint_personal_{site}.pth"


def write_fold(
    model_folder: Path,
    fold: int | str,
    *,
    site: str,
    gamma: float,
    selector: SelectorConfiguration,
    validation: SelectorValidation,
    selector_min_accuracy: float,
    shared: Sequence[str],
    familiarity: Familiarity | None = None,
    validation_dice: Mapping[str, ValidationDice] | None = None,
) -> None:
    """Enter a fold into the bundle, with the hashes of its files as they are now; other folds' entries stay.

    To be called whenever one of these files was written anew, and last.

    Args:
        model_folder: nnU-Net's, with ``plans.json`` and the folds' folders.
        fold: number, or ``all``.
        site: this site.
        gamma: threshold of the super model.
        selector: configuration of the selector in ``fedsm_selector.pth``.
        validation: what the federation found of it; its sites are the classes.
        selector_min_accuracy: least accuracy with which the selector is used.
        shared: other sites whose ``checkpoint_personal_SITE.pth`` stands in the fold's folder.
        familiarity: what the sites' images look like, if images of nobody are to be recognised.
        validation_dice: of every site, if ``best_model_gate`` is on.

    Raises:
        ConfigurationError: a bundle is there that cannot be read.
        FederationError: a file is missing.
    """
    names = [GLOBAL_CHECKPOINT, SELECTOR_FILE, FINAL_CHECKPOINT, *map(personal_checkpoint, shared)]
    entry = FoldBundle(
        site=site,
        sites=validation.sites,
        gamma=gamma,
        selector=selector,
        temperature=validation.temperature,
        confusion=validation.confusion,
        accuracy=validation.accuracy,
        selector_min_accuracy=selector_min_accuracy,
        familiarity=familiarity,
        validation_dice=None if validation_dice is None else dict(validation_dice),
        shared=tuple(sorted(shared)),
        sha256={name: _sha256(model_folder / f"fold_{fold}" / name) for name in names},
    )
    path = model_folder / BUNDLE
    with in_turn(path.with_suffix(".lock")):  # other folds may end at the same time
        others = read_bundle(model_folder).folds if path.is_file() else {}
        bundle = Bundle(folds=dict(sorted({**others, str(fold): entry}.items())))
        write_text(path, bundle.model_dump_json(indent=2))


def read_bundle(model_folder: Path) -> Bundle:
    """Read and check the bundle; raises :class:`ConfigurationError`. The files are checked by :func:`verify_fold`."""
    path = model_folder / BUNDLE
    try:
        return Bundle.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be read: {error.strerror}. Give the folder of a model that was trained with FedSM, in "
            f"which {BUNDLE} stands beside plans.json."
        ) from None
    except ValidationError as error:
        raise ConfigurationError(f"{path}: {explain(error, Bundle)}") from None
    except (ValueError, ConfigurationError) as error:
        raise ConfigurationError(f"{path} is no valid bundle: {error}") from None


def fold_of(model_folder: Path, fold: int | str) -> FoldBundle | None:
    """A fold's entry, if there is a bundle with one; raises :class:`ConfigurationError` for one that cannot be read."""
    return read_bundle(model_folder).folds.get(str(fold)) if (model_folder / BUNDLE).is_file() else None


def verify_fold(model_folder: Path, fold: str, entry: FoldBundle) -> None:
    """Compare the fold's files with their hashes; raises :class:`FederationError` for a missing or another one."""
    for name, expected in entry.sha256.items():
        path = model_folder / f"fold_{fold}" / name
        if _sha256(path) != expected:
            raise FederationError(
                f"{path} is not the file that {BUNDLE} describes: its SHA-256 is another. Copy the model folder again, "
                "or train the fold anew."
            )


def write_selector(path: Path, configuration: SelectorConfiguration, network: Selector) -> None:
    """Write a selector's configuration and weights; the file holds tensors and plain values only."""
    with replacing(path) as part:
        torch.save({"configuration": asdict(configuration), "network_weights": network.state_dict()}, part)


def read_selector(path: Path, configuration: SelectorConfiguration) -> Selector:
    """The selector in a file, which must be of this configuration; raises :class:`FederationError`."""
    content = load_tensors(path)
    if content.get("configuration") != asdict(configuration):
        raise FederationError(
            f"{path} holds the selector {content.get('configuration')}, but {BUNDLE} describes "
            f"{asdict(configuration)}. Copy the model folder again, or train the fold anew."
        )
    network = Selector(configuration)
    network.load_state_dict(content["network_weights"])
    return network.eval()


def write_checkpoint(path: Path, like: Path, network_weights: Mapping[str, torch.Tensor]) -> None:
    """Write a checkpoint with other weights, for prediction only: what nnU-Net reads, and no optimizer.

    Args:
        path: the new file.
        like: a checkpoint of this training, from which all but the weights come.
        network_weights: the whole ``state_dict`` of the network.
    """
    training = read_checkpoint(like)
    content = {name: training[name] for name in READ_BY_NNUNET} | {"network_weights": dict(network_weights)}
    with replacing(path) as part:
        torch.save(content, part)


def load_tensors(path: Path) -> dict[str, Any]:
    """A checkpoint, or what :func:`write_selector` wrote, memory-mapped; runs no code that a file holds."""
    try:
        content: dict[str, Any] = read_checkpoint(path)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise FederationError(f"{path} cannot be read ({reason}). Copy the model folder again.") from None
    return content


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise FederationError(
            f"{path} cannot be read: {error.strerror}. {BUNDLE} needs it; copy the model folder again, or train the "
            "fold anew."
        ) from None
    return digest.hexdigest()
