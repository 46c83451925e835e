"""The pooled fingerprint says of all sites' cases what nnU-Net would say of them in one place."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from planning_sites import pooled_fingerprint

from nnunet_fed.agreement.fingerprint import LocalFingerprint, fingerprint_of, harmonise
from nnunet_fed.errors import FederationError
from nnunet_fed.exchange.communicator import LocalFederation


def some_site(seed: int, cases: int, channels: int = 2) -> LocalFingerprint:
    rng = np.random.default_rng(seed)
    return LocalFingerprint(
        spacings=[list(rng.choice([0.7, 1.0, 2.5], 3)) for _ in range(cases)],
        shapes_after_crop=[tuple(rng.integers(20, 40, 3)) for _ in range(cases)],
        relative_sizes=list(rng.uniform(0.5, 1, cases)),
        intensities=[rng.normal(10 * c, 3, 100 * cases).astype(np.float32) for c in range(channels)],
    )


def harmonised(sites: list[LocalFingerprint], seen: dict[str, Any] | None = None) -> dict[str, Any]:
    names = [f"site-{number}" for number in range(len(sites))]

    def function(communicator: Any) -> dict[str, Any]:
        if seen is not None:
            gather = communicator.gather
            communicator.gather = lambda key, value: gather(key, seen.setdefault(communicator.site, value))
        return harmonise(communicator, sites[names.index(communicator.site)])

    answers = list(LocalFederation(names, deadline=5).run(function).values())
    assert all(answer == answers[0] for answer in answers)
    return answers[0]


def approximately(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Mean and standard deviation to 12 digits; all else exactly."""
    copy: dict[str, Any] = json.loads(json.dumps(fingerprint))
    for channel in copy["foreground_intensity_properties_per_channel"].values():
        channel["mean"] = pytest.approx(channel["mean"], rel=1e-12)
        channel["std"] = pytest.approx(channel["std"], rel=1e-12)
    return copy


def test_sites_together_are_the_pool() -> None:
    sites = [some_site(seed, cases) for seed, cases in enumerate((4, 1, 7))]
    together = harmonised(sites)
    assert together == approximately(fingerprint_of(pooled_fingerprint(sites)))
    assert json.loads(json.dumps(together)) == together


def test_numbers_are_numpys() -> None:
    site = some_site(3, 5)
    fingerprint = fingerprint_of(site)
    for channel, values in enumerate(site.intensities):
        properties = fingerprint["foreground_intensity_properties_per_channel"][str(channel)]
        low, median, high = np.percentile(values, np.array((0.5, 50.0, 99.5)))
        assert properties == {
            "mean": pytest.approx(values.mean(dtype=np.float64), rel=1e-12),
            "median": median,
            "std": pytest.approx(values.std(dtype=np.float64), rel=1e-12),
            "min": values.min(),
            "max": values.max(),
            "percentile_99_5": high,
            "percentile_00_5": low,
        }
    assert fingerprint["median_relative_size_after_cropping"] == np.median(site.relative_sizes)


def test_the_order_of_cases_is_not_told() -> None:
    site = some_site(4, 6)
    seen: dict[str, Any] = {}
    fingerprint = harmonised([site, some_site(5, 2)], seen)
    assert seen["site-0"] == sorted(seen["site-0"])
    pairs = list(zip(fingerprint["spacings"], fingerprint["shapes_after_crop"], strict=True))
    assert pairs == sorted(pairs)
    assert len(pairs) == 8


def test_a_site_without_foreground_takes_part() -> None:
    site = some_site(6, 3)
    empty = LocalFingerprint([[1.0, 1.0, 1.0]], [[9, 9, 9]], [1.0], [np.array([]), np.array([])])
    together = harmonised([site, empty])
    assert together == approximately(fingerprint_of(pooled_fingerprint([site, empty])))
    with pytest.raises(FederationError, match="contain foreground"):
        fingerprint_of(empty)
