"""Compare plans of different sites: what must be equal, a digest of it, and where it differs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nnunet_fed.agreement.fingerprint import INTENSITIES
from nnunet_fed.study.federation import PLANS_KEY, canonical_json, digest_of, study_in

_OF_ONE_SITE = (
    "dataset_name",
    "plans_name",
    "experiment_planner_used",
    "image_reader_writer",
    PLANS_KEY,
)
"""Keys of the plans that may differ from site to site and do not change the network or its input."""
_OF_OWN_CHANNELS = (INTENSITIES, "normalization_schemes", "use_mask_for_norm")
"""Keys of the plans and of each configuration that differ too where each site has input channels of its own."""


def comparable(plans: Mapping[str, Any]) -> dict[str, Any]:
    """All of nnU-Net's plans that must be equal at every site, in plain JSON types.

    Leaves out the names of data set, plans and planner, the file reader, the study, and each configuration's
    ``data_identifier``; where the study gives each site channels of its own, also what depends on these. Arrays and
    numpy's numbers become lists and numbers, keys become strings.
    """
    content: dict[str, Any] = json.loads(json.dumps(dict(plans), default=_plain))
    has_study = "study" in content.get(PLANS_KEY, {})
    own = _OF_OWN_CHANNELS if has_study and study_in(content).method.own_channels else ()
    for key in (*_OF_ONE_SITE, *own):
        content.pop(key, None)
    for configuration in content["configurations"].values():
        for key in ("data_identifier", *own):
            configuration.pop(key, None)
    return content


def plans_digest(plans: Mapping[str, Any]) -> str:
    """SHA-256 over :func:`comparable`, as 64 hexadecimal digits."""
    return digest_of(comparable(plans))


def differences(plans: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where comparable plans differ.

    Args:
        plans: :func:`comparable` plans by site.

    Returns:
        A line for each differing value, such as ``configurations.2d.batch_size: 12 (a, b), 13 (c)``, sorted.
    """
    flat = {site: _flatten(content) for site, content in plans.items()}
    lines = []
    for path in sorted({path for leaves in flat.values() for path in leaves}):
        sites_of: dict[str, list[str]] = {}
        for site, leaves in flat.items():
            sites_of.setdefault(leaves.get(path, "missing"), []).append(site)
        if len(sites_of) > 1:
            lines.append(f"{path}: " + ", ".join(f"{value} ({', '.join(sites)})" for value, sites in sites_of.items()))
    return lines


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy's arrays and numbers
        return value.tolist()
    raise TypeError(f"Plans hold a {type(value).__name__}, which is no JSON type: {value!r}")


def _flatten(value: Any, path: str = "") -> dict[str, str]:
    """JSON text of each leaf by its dotted path; lists are leaves."""
    if not isinstance(value, Mapping) or not value:
        return {path: canonical_json(value).decode()}
    leaves: dict[str, str] = {}
    for key, child in value.items():
        leaves.update(_flatten(child, f"{path}.{key}" if path else key))
    return leaves
