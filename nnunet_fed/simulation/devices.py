"""Which GPU each site of a simulation sees. Source: ours; CUDA numbers devices within ``CUDA_VISIBLE_DEVICES``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from nnunet_fed.errors import ConfigurationError

VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"
CUDA_DEVICE = re.compile(r"cuda:(\d+)")


def cuda_devices(text: str) -> tuple[int, ...]:
    """The numbers in ``cuda:0,cuda:1``; raises :class:`ConfigurationError`."""
    found = [CUDA_DEVICE.fullmatch(part.strip()) for part in text.split(",")]
    if not all(found):
        raise ConfigurationError(f"--devices {text}: name GPUs with commas between them, as in cuda:0,cuda:1.")
    return tuple(int(one[1]) for one in found if one is not None)


def visible_devices(
    sites: Iterable[str], devices: Sequence[int], environment: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """What each site's processes have in their environment, so that each sees one GPU, which it calls ``cuda:0``.

    Args:
        sites: take the devices in turn, in the order of their names.
        devices: CUDA's numbers as this process counts them; none: nothing is set.
        environment: of this process. If it has ``CUDA_VISIBLE_DEVICES``, the numbers count what stands there.

    Raises:
        ConfigurationError: ``CUDA_VISIBLE_DEVICES`` does not have so many.
    """
    names, seen = sorted(sites), environment.get(VISIBLE_VARIABLE)
    if not devices:
        return {name: {} for name in names}
    given = None if seen is None else [one.strip() for one in seen.split(",") if one.strip()]
    if given is not None and max(devices) >= len(given):
        raise ConfigurationError(
            f"--devices cuda:{max(devices)}: {VISIBLE_VARIABLE}={seen} leaves {len(given)} GPUs, which are counted "
            "from cuda:0. Name others, or change the variable."
        )
    identifiers = [str(number) if given is None else given[number] for number in devices]
    return {name: {VISIBLE_VARIABLE: identifiers[turn % len(identifiers)]} for turn, name in enumerate(names)}
