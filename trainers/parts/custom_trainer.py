"""A trainer from outside the package, which a study of the method ``custom`` names: find it, and check its options."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stdout
from typing import Any

from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.methods.custom_options import EXTERNAL_TRAINERS, Custom
from nnunet_fed.trainers.parts.study_trainer import StudyTrainer


def check_custom_trainer(study: Federation) -> None:
    """See that nnU-Net will find the trainer that the study names, and that it takes the study's options.

    Nothing is checked for a method of the package, whose options the study has checked.

    Raises:
        ConfigurationError: the trainer is not there, is of another method, or does not take the options.
    """
    if not isinstance(study.method, Custom):
        return
    found = find_trainer(study.method.trainer)
    if not issubclass(found, StudyTrainer):
        raise ConfigurationError(
            f"The trainer '{study.method.trainer}' is no federated one: derive it from one of nnunet_fed's."
        )
    method = getattr(found, "method", None)
    if method is None:
        raise ConfigurationError(
            f"The trainer '{study.method.trainer}' names no method: write method = \"custom\" into its class."
        )
    if method != study.method.name:
        raise ConfigurationError(
            f"The trainer '{study.method.trainer}' does the method '{method}': let the study name that one instead of "
            f"'custom' (name = \"{method}\" in federation.toml, --method {method} on a command line)."
        )
    found.options_of(study)


def find_trainer(name: str) -> type[Any]:
    """The class that nnU-Net's command finds by a name.

    Raises:
        ConfigurationError: there is none, or a file of the user's cannot be imported.
    """
    try:
        with redirect_stdout(io.StringIO()):  # nnU-Net prints where it looks, and that it is not there yet
            found: type[Any] = recursive_find_trainer_class_by_name(name)
    except RuntimeError:
        given = os.environ.get(EXTERNAL_TRAINERS) or "not set"
        raise ConfigurationError(
            f"There is no trainer '{name}' in the folders of {EXTERNAL_TRAINERS} ({given}). Put its file, {name}.py, "
            "into one of them, as docs/new_method.md says."
        ) from None
    except Exception as error:  # whatever a file of the user's does when it is imported
        raise ConfigurationError(
            f"Looking for the trainer '{name}' in the folders of {EXTERNAL_TRAINERS} ended in "
            f"{type(error).__name__}: {error}. Correct that file."
        ) from error
    return found
