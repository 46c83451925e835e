"""Planners that are told medians and those that are told all cases plan the same: what nnU-Net plans for the pool."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncL,
    nnUNetPlannerResEncM,
    nnUNetPlannerResEncXL,
)
from planning_sites import OTHER, plan, pooled_fingerprint, preprocessed, set_paths, study, write_dataset
from rich.console import Console

from nnunet_fed.agreement.fingerprint import (
    LocalFingerprint,
    PooledGeometry,
    fingerprint_of,
    middle_shapes,
    pooled_geometry,
)
from nnunet_fed.agreement.fingerprint_files import OWN
from nnunet_fed.agreement.plan_digest import comparable
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.exchange.communicator import LocalFederation
from nnunet_fed.planners import planning
from nnunet_fed.planners.dataset import RawDataset, find_dataset
from nnunet_fed.planners.geometry import harmonised_planner
from nnunet_fed.planners.harmonised import planner_class

STOCK: dict[str, Any] = {
    "nnUNetPlannerFed": ExperimentPlanner,
    "nnUNetPlannerFedResEncM": nnUNetPlannerResEncM,
    "nnUNetPlannerFedResEncL": nnUNetPlannerResEncL,
    "nnUNetPlannerFedResEncXL": nnUNetPlannerResEncXL,
}
STOCK_ESTIMATE = ExperimentPlanner.static_estimate_VRAM_usage
Case = tuple[tuple[float, float, float], tuple[int, int, int]]
MANY = 30


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RawDataset]]:
    """Raw data sets of one tiny case each, of which the planners read nothing but names; the first is the pool's."""
    estimate = ExperimentPlanner.static_estimate_VRAM_usage
    known: dict[str, Any] = {}

    def remembered(*arguments: Any) -> Any:
        text = repr(arguments)
        if text not in known:
            with torch.device("meta"):  # the same without weights: see below
                known[text] = estimate(*arguments)
        return known[text]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExperimentPlanner, "static_estimate_VRAM_usage", staticmethod(remembered))
        raw = set_paths(patch, tmp_path_factory.mktemp("geometry"))
        for number in range(1, MANY + 2):
            write_dataset(raw, number, (number,), channels=("CT",), shape=(6, 6, 6))
            find_dataset(number).preprocessed.mkdir()
            (find_dataset(number).preprocessed / OWN).write_text("{}")
        yield [find_dataset(number) for number in range(1, MANY + 2)]


def local_fingerprint(cases: Sequence[Case], seed: int = 0) -> LocalFingerprint:
    rng = np.random.default_rng([seed, len(cases)])
    return LocalFingerprint(
        spacings=[spacing for spacing, _ in cases],
        shapes_after_crop=[shape for _, shape in cases],
        relative_sizes=list(rng.uniform(0.5, 1, len(cases))),
        intensities=[rng.normal(50, 9, 20 * len(cases)).astype(np.float32)],
    )


def federated_plans(
    datasets: list[RawDataset], sites: list[LocalFingerprint], **options: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Plans, and fingerprint, on which all sites agree."""
    names = [f"site-{number:02d}" for number in range(len(sites))]
    agreed = study(names, **options)
    total = sum(len(site.spacings) for site in sites)

    def site(seat: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        number = names.index(seat.site)

        def planner_of(fingerprint: dict[str, Any]) -> Any:
            return planning.make_planner(
                planner_class(agreed.planner), datasets[1 + number], agreed, total, fingerprint
            )

        planner = harmonised_planner(seat, sites[number], agreed.geometry, planner_of)
        plans = comparable(planner.plan_experiment())
        return plans, planner.dataset_fingerprint

    with redirect_stdout(StringIO()):
        answers = list(LocalFederation(names).run(site).values())
    assert all(answer == answers[0] for answer in answers)
    return answers[0]


def stock_plans(
    dataset: RawDataset, fingerprint: dict[str, Any], total: int, planner: str, **options: Any
) -> dict[str, Any]:
    """What nnU-Net plans from a fingerprint, untouched by us."""
    dataset.preprocessed.mkdir(exist_ok=True)
    (dataset.preprocessed / OWN).write_text(json.dumps(fingerprint))
    (dataset.preprocessed / "Stock.json").unlink(missing_ok=True)  # its configurations would live on in the new plans
    stock = STOCK[planner](dataset.id, plans_name="Stock", **options)
    stock.dataset_json["numTraining"] = total
    with redirect_stdout(StringIO()):
        return comparable(stock.plan_experiment())


def approximately(plans: dict[str, Any]) -> dict[str, Any]:
    """Intensity mean and standard deviation to 12 digits (sums in another order), all else exactly."""
    for channel in plans["foreground_intensity_properties_per_channel"].values():
        channel["mean"] = pytest.approx(channel["mean"], rel=1e-12)
        channel["std"] = pytest.approx(channel["std"], rel=1e-12)
    return plans


def cases_of(kind: str) -> st.SearchStrategy[Case]:
    """A case of a thick-sliced, an isotropic, a 2D or any data set."""
    fine, coarse, plane = st.floats(0.3, 1.2), st.floats(2.0, 8.0), st.integers(40, 140)
    if kind == "thick":
        return st.tuples(st.tuples(coarse, fine, fine), st.tuples(st.integers(4, 24), plane, plane))
    if kind == "2d":
        return st.tuples(st.tuples(st.just(999.0), fine, fine), st.tuples(st.just(1), plane, plane))
    steps = st.sampled_from([0.5, 0.9, 1.0, 1.3]) if kind == "few" else st.floats(0.3, 6.0)
    return st.tuples(st.tuples(steps, steps, steps), st.tuples(*[st.integers(8, 90)] * 3))


FEDERATIONS = st.sampled_from(["thick", "thick", "few", "any", "2d"]).flatmap(
    lambda kind: st.lists(st.lists(cases_of(kind), min_size=1, max_size=5), min_size=2, max_size=5)
)
THICK: list[Case] = [
    ((5.0, 0.7, 0.7), (12, 200, 210)),
    ((3.0, 0.5, 0.6), (20, 220, 180)),
    ((9.0, 1.0, 1.0), (9, 99, 99)),
]
LARGE: list[Case] = [((1.2, 0.9, 0.9), (260, 330, 350)), ((1.7, 0.8, 0.8), (220, 400, 390))]
"""Large enough for 3d_lowres."""


@settings(max_examples=15, deadline=None)
@given(sites=FEDERATIONS, planner=st.sampled_from(sorted(STOCK)))
@example(sites=[THICK[:1], THICK[1:2]], planner="nnUNetPlannerFed")
@example(sites=[THICK, THICK[:1]], planner="nnUNetPlannerFedResEncM")
@example(sites=[LARGE[:1], LARGE], planner="nnUNetPlannerFed")
def test_plans_are_those_of_the_pool(datasets: list[RawDataset], sites: list[list[Case]], planner: str) -> None:
    local = [local_fingerprint(cases, seed) for seed, cases in enumerate(sites)]
    pool = fingerprint_of(pooled_fingerprint(local))
    total = len(pool["spacings"])
    expected = approximately(stock_plans(datasets[0], pool, total, planner))
    private, two_cases = federated_plans(datasets, local, planner=planner)
    assert private == expected
    assert len(two_cases["spacings"]) == len(two_cases["shapes_after_crop"]) == 2
    assert federated_plans(datasets, local, planner=planner, geometry="lists")[0] == expected

    # whoever plans again from the file of two cases gets the same networks
    again = stock_plans(datasets[0], two_cases, total, planner)
    for key in ("original_median_spacing_after_transp", "original_median_shape_after_transp"):
        again[key] = expected[key]
    assert again == expected


@pytest.mark.parametrize("planner", ["nnUNetPlannerFed", "nnUNetPlannerFedResEncM"])
def test_the_memory_that_a_network_needs_is_estimated_as_in_stock_nnunet(
    datasets: list[RawDataset], planner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    told = ExperimentPlanner.static_estimate_VRAM_usage
    monkeypatch.setattr(
        ExperimentPlanner,
        "static_estimate_VRAM_usage",
        staticmethod(lambda *arguments: asked.append(arguments) or told(*arguments)),
    )
    federated_plans(datasets, [local_fingerprint(THICK)], planner=planner)
    assert asked
    monkeypatch.undo()
    assert planner_class(planner).static_estimate_VRAM_usage(*asked[0]) == STOCK_ESTIMATE(*asked[0])


@pytest.mark.parametrize("geometry", ["private", "lists"])
def test_options_of_the_stock_command(datasets: list[RawDataset], geometry: str) -> None:
    local = [local_fingerprint(THICK, 1), local_fingerprint(THICK[1:], 2)]
    options: dict[str, Any] = {"overwrite_target_spacing": [2.0, 0.8, 0.9], "gpu_memory_target_in_gb": 3.0}
    expected = stock_plans(datasets[0], fingerprint_of(pooled_fingerprint(local)), 5, "nnUNetPlannerFed", **options)
    assert expected["configurations"]["3d_fullres"]["spacing"] == [2.0, 0.8, 0.9]
    assert federated_plans(datasets, local, geometry=geometry, **options)[0] == approximately(expected)
    assert federated_plans(datasets, local, geometry=geometry)[0] != expected


def test_thirty_sites(datasets: list[RawDataset]) -> None:
    rng = np.random.default_rng(0)

    def some_cases() -> list[Case]:
        spacings = rng.uniform([2, 0.5, 0.5], [6, 1, 1], (rng.integers(1, 41), 3))
        return [(tuple(row), tuple(rng.integers([10, 80, 80], [40, 200, 200]).tolist())) for row in spacings]  # type: ignore[misc]

    local = [local_fingerprint(some_cases(), seed) for seed in range(MANY)]
    pool = fingerprint_of(pooled_fingerprint(local))
    expected = stock_plans(datasets[0], pool, len(pool["spacings"]), "nnUNetPlannerFed")
    began = time.perf_counter()
    plans, _ = federated_plans(datasets, local)
    Console(stderr=True).print(f"{MANY} sites, {len(pool['spacings'])} cases: {time.perf_counter() - began:.1f} s")
    assert plans == approximately(expected)


def found_geometry(sites: list[LocalFingerprint]) -> tuple[PooledGeometry, list[list[int]]]:
    def function(seat: Any) -> tuple[PooledGeometry, list[list[int]]]:
        local = sites[int(seat.site)]
        return pooled_geometry(seat, local), middle_shapes(seat, local.shapes_after_crop)

    return LocalFederation([str(number) for number in range(len(sites))]).run(function)["0"]


def test_medians_are_numpys_in_every_bit() -> None:
    rng = np.random.default_rng(1)
    for sizes in ([1], [1, 1], [1, 2], [3, 4, 2], [1, 1, 8], [30, 1]):
        sites = [
            local_fingerprint([(tuple(rng.uniform(0.1, 9, 3)), tuple(rng.integers(5, 99, 3))) for _ in range(size)])
            for size in sizes
        ]
        found, shapes = found_geometry(sites)
        pool = pooled_fingerprint(sites)
        np.testing.assert_array_equal(found.spacing_10, np.percentile(np.vstack(pool.spacings), 10, 0))
        np.testing.assert_array_equal(found.spacing_50, np.percentile(np.vstack(pool.spacings), 50, 0))
        np.testing.assert_array_equal(found.median_spacing, np.median(pool.spacings, 0))
        np.testing.assert_array_equal(found.median_shape, np.percentile(np.vstack(pool.shapes_after_crop), 50, 0))
        assert found.median_relative_size == np.median(pool.relative_sizes)
        np.testing.assert_array_equal(np.median(shapes, 0), np.median(pool.shapes_after_crop, 0))


def test_residual_encoders_share_preprocessed_cases_only_with_a_federation(datasets: list[RawDataset]) -> None:
    agreed = study(["a"])
    cases = local_fingerprint([((1.0, 1.0, 1.0), (40, 40, 40))] * 2)
    identifiers = []
    for name in ("nnUNetPlannerFed", "nnUNetPlannerFedResEncM"):
        make = planner_class(name)
        planner = planning.make_planner(make, datasets[1], agreed, 2, fingerprint_of(cases))
        with redirect_stdout(StringIO()):
            plans = planner.plan_experiment()
        assert plans["plans_name"] == name.replace("Planner", "") + "Plans"
        identifiers.append(plans["configurations"]["3d_fullres"]["data_identifier"])
    assert identifiers[0] == identifiers[1]  # nnU-Net's own would be nnUNetPlans_3d_fullres, of local plans
    assert identifiers[0].startswith("nnUNetFed_3d_fullres_")


def test_too_few_cases(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(set_paths(monkeypatch, tmp_path), OTHER, (0, 1))
    with pytest.raises(ConfigurationError, match=r"Site 'a' has 2 training cases .* at least 3, .*Nothing was sent"):
        plan({"a": OTHER}, min_cases=3)
    assert [file.name for file in preprocessed(OTHER).iterdir()] == ["data_check.json"]


def test_unknown_preprocessor(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(set_paths(monkeypatch, tmp_path), OTHER, (0,))
    with pytest.raises(ConfigurationError, match=r"no preprocessor 'Nope' in .*Set 'preprocessor_name'"):
        plan({"a": OTHER}, preprocessor_name="Nope")
