"""Planning's helpers without processes of their own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import SpawnContext
from multiprocessing.pool import ThreadPool
from typing import Any

import pytest

from nnunet_fed.inspection import workers
from nnunet_fed.planners import extraction


def workers_as_threads(patch: pytest.MonkeyPatch, but_the_first: bool = False) -> None:
    """Our workers and nnU-Net's, each of which would import PyTorch for a moment's work.

    Args:
        patch: undoes it.
        but_the_first: who asks for workers first gets processes, of ours as of nnU-Net's.
    """
    look_in_threads(patch)
    for owner, name, threads in (
        (extraction, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(workers)),
        (SpawnContext, "Pool", lambda self, *arguments, **options: ThreadPool(*arguments, **options)),
    ):
        kinds = itertools.chain([getattr(owner, name)] if but_the_first else [], itertools.repeat(threads))
        patch.setattr(owner, name, _next_kind(kinds))


def look_in_threads(patch: pytest.MonkeyPatch) -> None:
    """The look at a data set without processes."""
    patch.setattr(workers, "ProcessPoolExecutor", lambda number, context, begin: ThreadPoolExecutor(number))


def _next_kind(kinds: Iterator[Any]) -> Any:
    return lambda *arguments, **options: next(kinds)(*arguments, **options)
