"""How processes that exchange models take memory from the system. Source: ours; glibc's ``mallopt(3)``."""

from __future__ import annotations

import ctypes
import logging

logger = logging.getLogger(__name__)

ARENA_MAX, MMAP_THRESHOLD, TRIM_THRESHOLD = -8, -3, -1
"""Parameters of ``mallopt``."""
COORDINATOR = {ARENA_MAX: 1, MMAP_THRESHOLD: 8 << 20, TRIM_THRESHOLD: 32 << 20}
"""One store for all threads: what the process holds grows less with the number of sites."""
SITE = {MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20}
"""The largest that glibc comes to by itself, once a process has freed blocks of this size."""


def keep_buffers(settings: dict[int, int]) -> None:
    """Let glibc use the buffers of messages again instead of returning each to the system.

    By default a buffer of 1 MiB is fetched from the system and given back, and each of its pages is a page fault. On
    systems without glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    refused = [parameter for parameter, value in settings.items() if mallopt(parameter, value) != 1]
    if refused:
        logger.debug("mallopt refused the parameters %s", refused)
