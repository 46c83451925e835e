"""Planning's helpers without processes of their own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import SpawnContext
from multiprocessing.pool import ThreadPool

import pytest

from nnunet_fed.planners import extraction


def workers_as_threads(patch: pytest.MonkeyPatch) -> None:
    """Our workers and nnU-Net's, each of which would import PyTorch for a moment's work."""
    patch.setattr(extraction, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(workers))
    patch.setattr(SpawnContext, "Pool", lambda self, *arguments, **options: ThreadPool(*arguments, **options))
