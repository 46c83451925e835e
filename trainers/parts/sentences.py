"""What a user of a trainer reads when it cannot go on: a sentence in the place of a traceback."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nnunetv2.paths import nnUNet_results

from nnunet_fed.errors import FederationError
from nnunet_fed.files import NEXT_TO_NOTHING, free_bytes, in_words, no_room

DEBUG_VARIABLE = "nnUNet_fed_debug"


@contextmanager
def sentences_for_users() -> Iterator[None]:
    """End the process with the error's sentence instead of a traceback, unless ``nnUNet_fed_debug`` is set.

    So end full disks and other users' files, too.
    """
    try:
        yield
    except (FederationError, OSError, RuntimeError) as error:
        told = _in_words(error)
        if told is None or os.environ.get(DEBUG_VARIABLE):
            raise
        raise SystemExit(f"Error: {told}") from None


def _in_words(error: Exception) -> FederationError | None:
    results = nnUNet_results or None
    if isinstance(error, FederationError):
        return error
    if isinstance(error, OSError):
        return in_words(error, results)
    # libraries in C++ do not say why they could not write
    return no_room(Path(results)) if results and free_bytes(Path(results)) < NEXT_TO_NOTHING else None
