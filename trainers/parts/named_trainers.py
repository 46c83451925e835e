"""Trainers that a study names: of a method from outside the package, and the base trainer. Find and check them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.methods.custom_options import EXTERNAL_TRAINERS, Custom
from nnunet_fed.trainers.parts.base_trainer import base_of, code_digest, compose, external_folders, find_trainer
from nnunet_fed.trainers.parts.study_trainer import StudyTrainer


def check_named_trainers(study: Federation) -> str | None:
    """See that nnU-Net will find the trainers that the study names here, and that they go together.

    Returns:
        What the sites compare of the base trainer; ``None``: it is nnU-Net's own.

    Raises:
        ConfigurationError: a trainer is not there or is none, the method's is of another method or does not take the
            study's options, or does not go with the base trainer.
    """
    method = method_trainer(study)
    if not study.names_trainer:
        return None
    base = base_of(study)
    method.check_base(base)
    return f"{base.__name__} {code_digest(base)[:12]}"


def network_builder(study: Federation) -> Callable[..., Any]:
    """What builds the network of a study that names a base trainer; raises :class:`ConfigurationError`."""
    method, base = method_trainer(study), base_of(study)
    method.check_base(base)
    build: Callable[..., Any] = compose(method, base).build_network_architecture
    return build


def method_trainer(study: Federation) -> type[StudyTrainer]:
    """The trainer of a study's method; raises :class:`ConfigurationError`."""
    if isinstance(study.method, Custom):
        return _check_custom(study.method.trainer, study)
    name = study.method.trainer_name
    found: type[StudyTrainer] = getattr(import_module(f"nnunet_fed.trainers.{name}"), name)
    return found


def _check_custom(name: str, study: Federation) -> type[StudyTrainer]:
    found: Any = find_trainer(name)
    if found is None:
        raise ConfigurationError(
            f"There is no trainer '{name}' in the folders of {EXTERNAL_TRAINERS} ({external_folders()}). Put its file, "
            f"{name}.py, into one of them, as docs/new_method.md says."
        )
    if not issubclass(found, StudyTrainer):
        raise ConfigurationError(f"The trainer '{name}' is no federated one: derive it from one of nnunet_fed's.")
    method = getattr(found, "method", None)
    if method is None:
        raise ConfigurationError(f"The trainer '{name}' names no method: write method = \"custom\" into its class.")
    if method != study.method.name:
        raise ConfigurationError(
            f"The trainer '{name}' does the method '{method}': let the study name that one instead of "
            f"'custom' (name = \"{method}\" in federation.toml, --method {method} on a command line)."
        )
    found.options_of(study)
    return found
