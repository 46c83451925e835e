"""The base trainer that a study names: find nnU-Net's class, and compose a federated trainer with it. Source: ours.

nnU-Net finds a trainer by its name before it has read the plans, and names the results folder by it. So the command
names the method's trainer, and its class is composed with the base when it is constructed: the study is in the plans.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from contextlib import redirect_stdout
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import nnunetv2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.methods import METHODS
from nnunet_fed.study.methods.custom_options import EXTERNAL_TRAINERS

STOCK: type[Any] = nnUNetTrainer
BASE_TRAINER = "base trainer"
"""Under which the sites compare it."""
SAME_TRAINER = "Put the same file of it into nnUNet_extTrainer, or install the same nnunetv2, at all sites."
_PACKAGE = __name__.partition(".")[0]
_COMPOSED: dict[tuple[type[Any], type[Any]], type[Any]] = {}
_NOT_FOUND = "Could not find requested nnunet trainer"
"""How nnU-Net's complaint begins where no file has the class."""
_BENCHMARK = "nnUNetTrainerBenchmark"
"""How the names of those begin that measure nnU-Net's speed."""


def external_folders() -> str:
    """The folders of ``nnUNet_extTrainer``, for a sentence."""
    return os.environ.get(EXTERNAL_TRAINERS) or "not set"


def find_trainer(name: str) -> type[Any] | None:
    """The trainer of a name, as nnU-Net finds it; ``None``: it is neither in nnunetv2 nor in ``nnUNet_extTrainer``.

    Raises:
        ConfigurationError: what has the name is no trainer of nnU-Net, or a file there cannot be imported.
    """
    try:
        with redirect_stdout(StringIO()):  # nnU-Net tells each file at which it looks
            found: type[Any] = recursive_find_trainer_class_by_name(name)
    except (AssertionError, TypeError):  # nnU-Net asserts it of classes
        raise ConfigurationError(
            f"'{name}' is no trainer of nnU-Net: it is not derived from nnUNetTrainer. Name one that is."
        ) from None
    except Exception as error:  # whatever a file of the user's does when it is imported
        if isinstance(error, RuntimeError) and str(error).startswith(_NOT_FOUND):
            return None
        raise ConfigurationError(
            f"Looking for the trainer '{name}' in the folders of {EXTERNAL_TRAINERS} ended in "
            f"{type(error).__name__}: {error}. Correct that file."
        ) from error
    return found


def base_of(study: Federation) -> type[Any]:
    """The base trainer of a study.

    Raises:
        ConfigurationError: this site does not have it, or it is nothing on which a federated trainer can build.
    """
    if not study.names_trainer:
        return STOCK
    name = study.trainer
    is_ours = name in {table.own_trainer() for table in METHODS.values()}  # also where nnU-Net does not look for them
    found = None if is_ours else find_trainer(name)
    if found is None and not is_ours:
        raise ConfigurationError(
            f"The study '{study.name}' names the trainer '{name}', and there is none here: neither in nnunetv2 "
            f"{version('nnunetv2')} ({_own_folder()}) nor in the folders of {EXTERNAL_TRAINERS} "
            f"({external_folders()}). Put its file into one of these folders, at every site the same, or correct "
            "'trainer' in federation.toml."
        )
    if found is None or any(part.__module__.partition(".")[0] == _PACKAGE for part in found.__mro__):
        raise ConfigurationError(
            f"The study '{study.name}' names the trainer '{name}', which is federated itself. Name the trainer of "
            "nnU-Net on which the federated one shall build ('trainer'), and the method in its table ([method])."
        )
    if any(part.__name__.startswith(_BENCHMARK) for part in found.__mro__):
        raise ConfigurationError(
            f"The study '{study.name}' names the trainer '{name}', which measures nnU-Net's speed and keeps no "
            "checkpoint. Name one that trains a network."
        )
    if getattr(found.build_network_architecture, "__isabstractmethod__", False):
        raise ConfigurationError(
            f"The study '{study.name}' names the trainer '{name}', which builds no network: others derive from it. "
            "Name one of these."
        )
    return found


def _own_folder() -> Path:
    return Path(nnunetv2.__path__[0]) / "training" / "nnUNetTrainer"


def compose(federated: type[Any], base: type[Any]) -> type[Any]:
    """A federated trainer that builds on ``base``: what the former does not do itself, static hooks too, the latter
    does. Its name is the federated trainer's, by which nnU-Net names the folder of the results.

    Raises:
        ConfigurationError: Python cannot bring the two classes into an order.
    """
    if issubclass(federated, base):
        return federated
    known = _COMPOSED.get((federated, base))
    if known is not None:
        return known
    facts = {"__module__": federated.__module__, "__qualname__": federated.__qualname__, "__doc__": federated.__doc__}
    try:
        made: type[Any] = type(federated.__name__, (federated, base), facts)
    except TypeError as error:
        raise ConfigurationError(
            f"The trainer '{federated.__name__}' cannot build on '{base.__name__}': {error}."
        ) from None
    _COMPOSED[federated, base] = made
    return made


def code_digest(base: type[Any]) -> str:
    """SHA-256 over the files in which a base trainer stands, and the trainers between it and nnU-Net's own.

    Ends of lines do not count. What these files import does not either: nnU-Net's version is compared for itself.
    """
    digest = hashlib.sha256()
    for part in base.__mro__[: base.__mro__.index(STOCK)]:
        if issubclass(part, STOCK):
            digest.update(f"{part.__name__}\n{_text_of(part)}\n".encode())
    return digest.hexdigest()


def _text_of(part: type[Any]) -> str:
    """The file of a class; nnU-Net forgets the modules that it imports from ``nnUNet_extTrainer``."""
    module = sys.modules.get(part.__module__)
    if module is not None and hasattr(module, part.__name__):
        return Path(inspect.getfile(module)).read_text(encoding="utf-8")
    inside = Path(*part.__module__.split(".")).with_suffix(".py")
    for folder in filter(None, os.environ.get(EXTERNAL_TRAINERS, "").split(os.pathsep)):
        if (Path(folder) / inside).is_file():
            return (Path(folder) / inside).read_text(encoding="utf-8")
    return part.__qualname__
