"""Sites that plan together plan what nnU-Net plans for their pooled data."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.paths import nnUNet_raw
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from planning_sites import (
    LABELS,
    OTHER,
    POOL,
    SITE_A,
    SITE_B,
    SITE_C,
    few_samples,
    plan,
    preprocessed,
    read,
    set_paths,
    study,
    write_dataset,
)
from workers import workers_as_threads

from nnunet_fed.agreement.fingerprint import LocalFingerprint
from nnunet_fed.agreement.fingerprint_files import COMMON
from nnunet_fed.agreement.plan_digest import comparable, differences, plans_digest
from nnunet_fed.errors import ConfigurationError, DisagreementError, FederationError
from nnunet_fed.planners import planning
from nnunet_fed.planners.dataset import find_dataset
from nnunet_fed.planners.extraction import extract
from nnunet_fed.planners.harmonised import planner_class
from nnunet_fed.planners.mapping import prepare_dataset
from nnunet_fed.planners.nnUNetPlannerFed import nnUNetPlannerFed
from nnunet_fed.planners.nnUNetPlannerFedSmall import nnUNetPlannerFedSmall
from nnunet_fed.planners.planning import PlanningResult
from nnunet_fed.study.labels import LabelMap


def tolerant(plans: dict[str, Any]) -> dict[str, Any]:
    """nnU-Net adds float32 numbers up in float32: mean and standard deviation to six digits, all else exactly."""
    for channel in plans["foreground_intensity_properties_per_channel"].values():
        channel["mean"] = pytest.approx(channel["mean"], rel=1e-6)
        channel["std"] = pytest.approx(channel["std"], rel=1e-6)
    return plans


@pytest.fixture(scope="module", params=["private", "lists"])
def pooled(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Three sites planned by us, one of them with a single case, and the pool of their cases planned by nnU-Net.

    One time one of the sites has worker processes, as a user has it.
    """
    with pytest.MonkeyPatch.context() as patch:
        raw = set_paths(patch, tmp_path_factory.mktemp("pooled"))
        few_samples(patch)
        write_dataset(raw, POOL, range(6))
        write_dataset(raw, SITE_A, (0, 2, 4))
        write_dataset(raw, SITE_B, (1, 3))
        write_dataset(raw, SITE_C, (5,))
        phases: list[str] = []
        datasets = {"a": SITE_A, "b": SITE_B, "c": SITE_C}
        with pytest.MonkeyPatch.context() as meanwhile:
            workers_as_threads(meanwhile, but_the_first=request.param == "private")
            results = plan(datasets, geometry=request.param, report=phases.append)
            DatasetFingerprintExtractor(POOL, 1).run(overwrite_existing=True)
            ExperimentPlanner(POOL).plan_experiment()
        yield {"results": results, "phases": phases, "study": study(list(datasets), geometry=request.param)}


def test_fingerprint_is_that_of_the_pool(pooled: dict[str, Any]) -> None:
    stock, ours = read(POOL, "dataset_fingerprint.json"), read(SITE_A, COMMON)
    assert ours == read(SITE_B, COMMON) == read(SITE_C, COMMON)
    assert set(ours) == set(stock)
    key = "foreground_intensity_properties_per_channel"
    assert ours[key] == tolerant(stock)[key]
    assert ours["median_relative_size_after_cropping"] == stock["median_relative_size_after_cropping"]
    if pooled["study"].geometry == "lists":
        geometry = [sorted(zip(f["spacings"], f["shapes_after_crop"], strict=True)) for f in (ours, stock)]
        assert geometry[0] == geometry[1]
    else:
        fullres = read(POOL, "nnUNetPlans.json")["configurations"]["3d_fullres"]
        assert [sorted(spacing) for spacing in ours["spacings"]] == [sorted(fullres["spacing"])] * 2
        assert sorted(np.median(ours["shapes_after_crop"], 0)) == sorted(fullres["median_image_size_in_voxels"])


def test_stock_planning_beside_is_that_of_the_site(pooled: dict[str, Any]) -> None:
    """nnU-Net plans from the fingerprint that it finds: the site's own, not that of all sites."""
    name, key = "dataset_fingerprint.json", "foreground_intensity_properties_per_channel"
    found, plans = [], []
    for _ in range(2):
        found.append(read(SITE_A, name))
        ExperimentPlanner(SITE_A).plan_experiment()
        plans.append(read(SITE_A, "nnUNetPlans.json"))
        (preprocessed(SITE_A) / "nnUNetPlans.json").unlink()  # nnU-Net would keep what it says
        DatasetFingerprintExtractor(SITE_A, 1).run(overwrite_existing=True)
    for geometry in ("spacings", "shapes_after_crop"):
        assert sorted(found[0][geometry]) == sorted(found[1][geometry])
    ours, own = (each.pop(key) for each in plans)
    assert plans[0] == plans[1]
    assert ours == found[0][key] != read(SITE_A, COMMON)[key]
    for channel, properties in own.items():  # of which nnU-Net alone draws more voxels of each case
        assert ours[channel]["mean"] == pytest.approx(properties["mean"], abs=0.5)


def test_plans_are_those_of_the_pool(pooled: dict[str, Any]) -> None:
    stock = comparable(read(POOL, "nnUNetPlans.json"))
    ours = [read(number, "nnUNetFedPlans.json") for number in (SITE_A, SITE_B, SITE_C)]
    assert comparable(ours[0]) == comparable(ours[1]) == comparable(ours[2])
    assert comparable(ours[0]) == tolerant(stock)
    assert "3d_fullres" in stock["configurations"]
    assert ours[0]["experiment_planner_used"] == "nnUNetPlannerFed"


def test_study_travels_in_the_plans(pooled: dict[str, Any]) -> None:
    plans = read(SITE_B, "nnUNetFedPlans.json")
    agreed = pooled["study"]
    assert plans["federation"] == {
        "name": "test",
        "digest": agreed.digest,
        "study": agreed.stored(),
        "small_lesions": plans["federation"]["small_lesions"],
        "plans_digest": plans_digest(plans),
    }
    assert pooled["results"]["b"] == PlanningResult(
        "Dataset012_Test", "nnUNetFedPlans", plans_digest(plans), ("3d_fullres",), 6, 2, fold="all"
    )
    phases = ["checking", "extracting", "harmonising", "planning", "preprocessing", "planned"]
    assert sorted(pooled["phases"]) == sorted(3 * phases)
    assert list(dict.fromkeys(pooled["phases"])) == phases


def test_thresholds_of_small_lesions_are_those_of_the_pool(pooled: dict[str, Any]) -> None:
    agreed = [read(number, "nnUNetFedPlans.json")["federation"]["small_lesions"] for number in (SITE_A, SITE_B, SITE_C)]
    assert agreed[0] == agreed[1] == agreed[2]
    volumes: dict[str, list[float]] = {"organ": [], "lesion": []}
    for case in (0, 1, 2, 4, 5):  # a block of 8 x 8 x 8 voxels each
        label = Path(nnUNet_raw) / "Dataset001_Test" / "labelsTr" / f"case_{case:03d}.nii.gz"
        volumes["lesion" if case % 2 else "organ"].append(
            512 * math.prod(sorted(sitk.ReadImage(str(label)).GetSpacing()))
        )
    assert agreed[0] == {name: np.quantile(values, 0.2) for name, values in volumes.items()}


def test_lesions_are_measured_with_the_mapped_labels(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_samples(monkeypatch)
    workers_as_threads(monkeypatch)
    write_dataset(raw, OTHER, (0, 1))
    mapped = prepare_dataset(OTHER, LabelMap(501, {"anything": ("organ", "lesion"), "nothing": ()}), 1)
    volumes = extract(mapped.id, 2, 1).lesion_volumes
    assert {name: len(values) for name, values in volumes.items()} == {"anything": 2, "nothing": 0}


def test_preprocessed_cases(pooled: dict[str, Any]) -> None:
    for number, cases in ((SITE_A, 3), (SITE_B, 2), (SITE_C, 1)):
        identifier = read(number, "nnUNetFedPlans.json")["configurations"]["3d_fullres"]["data_identifier"]
        assert re.fullmatch(r"nnUNetFed_3d_fullres_[0-9a-f]{8}", identifier)
        folder = preprocessed(number) / identifier
        assert len(infer_dataset_class(str(folder))(str(folder)).identifiers) == cases
        assert read(number, f"{identifier}.complete.json")["cases"] == cases
        assert len(list((preprocessed(number) / "gt_segmentations").iterdir())) == cases
        # nnU-Net's copy of dataset.json keeps the site's own number
        assert read(number, "dataset.json")["numTraining"] == cases


def test_preprocessing_is_shared_and_redone_when_needed(raw: Path, instant: list[list[str]]) -> None:
    folder = write_dataset(raw, OTHER, (0, 1))
    datasets = {"a": OTHER}
    plan(datasets)
    plan(datasets, plans_name="AnotherStudy", rounds=5)
    assert instant == [["3d_fullres"], []]
    first = read(OTHER, "nnUNetFedPlans.json")["configurations"]["3d_fullres"]["data_identifier"]
    assert first == read(OTHER, "AnotherStudy.json")["configurations"]["3d_fullres"]["data_identifier"]

    plan(datasets, configurations=["2d", "3d_fullres", "2d"])
    assert instant[2:] == [["2d"]]

    (preprocessed(OTHER) / f"{first}.complete.json").unlink()  # as after a crash
    (preprocessed(OTHER) / first).rmdir()
    plan(datasets)
    assert instant[3:] == [["3d_fullres"]]

    os.utime(folder / "labelsTr" / "case_000.nii.gz", (1, 1))
    plan(datasets)
    assert instant[4:] == [["3d_fullres"]]
    assert first != read(OTHER, "nnUNetFedPlans.json")["configurations"]["3d_fullres"]["data_identifier"]


def test_references_are_brought_up_to_date(
    raw: Path, instant: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    label = write_dataset(raw, OTHER, (0, 1)) / "labelsTr" / "case_000.nii.gz"
    plan({"a": OTHER})
    monkeypatch.undo()
    monkeypatch.setenv("nnUNet_raw", str(raw))
    monkeypatch.setenv("nnUNet_preprocessed", str(raw.with_name("nnUNet_preprocessed")))
    plans, copy = read(OTHER, "nnUNetFedPlans.json"), preprocessed(OTHER) / "gt_segmentations" / label.name

    def again() -> None:
        planning.preprocess("a", find_dataset(OTHER), "nnUNetFedPlans", plans, ["3d_fullres"], 1)

    again()
    assert copy.read_bytes() == label.read_bytes()
    shutil.copy(label.with_name("case_001.nii.gz"), label)
    os.utime(label, (1, 1))  # an older version restored
    again()
    assert copy.read_bytes() == label.read_bytes()


def test_old_configurations_do_not_survive(raw: Path, instant: list[list[str]]) -> None:
    write_dataset(raw, OTHER, (0, 1))
    plan({"a": OTHER})
    file = preprocessed(OTHER) / "nnUNetFedPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["mine"] = {"inherits_from": "3d_fullres"}
    file.write_text(json.dumps(plans))
    plan({"a": OTHER})
    assert "mine" not in read(OTHER, "nnUNetFedPlans.json")["configurations"]
    assert "mine" in read(OTHER, "nnUNetFedPlans.previous.json")["configurations"]


def test_no_augmentation_processes(raw: Path, instant: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(raw, OTHER, (0, 1))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    plan({"a": OTHER})
    assert get_allowed_n_proc_DA() == 0


@pytest.mark.parametrize(
    ("changes", "row"),
    [
        ({"channels": ("CT", "T2")}, r"channels +CT, MRI +CT, T2 \* +CT, MRI"),
        (
            {"labels": {"background": 0, "organ": 1, "tumour": 2}},
            r"labels +background=0, organ=1, lesion=2 +background=0, organ=1, tumour=2 \* ",
        ),
        ({"two_d": True}, r"dimensions +3 +2 \* +3"),
    ],
)
def test_sites_that_differ(raw: Path, changes: dict[str, Any], row: str) -> None:
    write_dataset(raw, SITE_A, (0, 1))
    write_dataset(raw, SITE_B, (0, 1, 2), **changes)
    write_dataset(raw, OTHER, (4,))
    with pytest.raises(DisagreementError, match=row) as error:
        plan({"a": SITE_A, "b": SITE_B, "c": OTHER})
    assert re.search(r"training cases +2 +3 +1", str(error.value))
    assert str(error.value).count("*") == 2  # the odd one, and the sentence on the star


def test_order_of_labels_is_not_a_difference_but_for_regions(raw: Path, instant: list[list[str]]) -> None:
    write_dataset(raw, SITE_A, (0, 1))
    write_dataset(raw, SITE_B, (0, 1), labels=dict(reversed(LABELS.items())))
    plan({"a": SITE_A, "b": SITE_B})
    regions = {"background": 0, "all": [1, 2], "lesion": 2}
    for number, labels in ((31, regions), (32, {"background": 0, "lesion": 2, "all": [1, 2]})):
        path = write_dataset(raw, number, (0,), labels=labels) / "dataset.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "regions_class_order": [1, 2]}))
    with pytest.raises(DisagreementError, match=r"differ in labels:"):
        plan({"a": 31, "b": 32})


def test_plans_that_differ_are_set_aside(raw: Path, instant: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(raw, SITE_A, (0, 1))
    write_dataset(raw, SITE_B, (0, 1))
    harmonised: Callable[..., Any] = planning.harmonised_planner

    def broken(communicator: Any, *arguments: Any) -> Any:
        planner = harmonised(communicator, *arguments)
        if communicator.site == "b":
            planner.original_medians[0][:] = 1.0, 1.0, 2.0
        return planner

    monkeypatch.setattr(planning, "harmonised_planner", broken)
    with pytest.raises(DisagreementError, match=r"original_median_spacing_after_transp: \[1.0,1.0,1.0\] \(a\), \[1.0,"):
        plan({"a": SITE_A, "b": SITE_B})
    assert instant == []
    for number in (SITE_A, SITE_B):
        assert not (preprocessed(number) / "nnUNetFedPlans.json").exists()
        assert (preprocessed(number) / "nnUNetFedPlans.refused.json").exists()


def test_differences() -> None:
    plans = {
        "a": {"configurations": {"2d": {"batch_size": 12}}, "x": [1, 2]},
        "b": {"configurations": {"2d": {"batch_size": 13}}, "x": [1, 2]},
        "c": {"configurations": {"2d": {"batch_size": 12}, "mine": {}}, "x": [1, 2]},
    }
    assert differences(plans) == [
        "configurations.2d.batch_size: 12 (a, c), 13 (b)",
        "configurations.mine: missing (a, b), {} (c)",
    ]


def test_comparable_is_plain_json() -> None:
    numpys: dict[Any, Any] = {
        "configurations": {"2d": {"spacing": np.ones(2), "data_identifier": "x"}},
        "n": np.int64(3),
        4: (1.5,),
    }
    assert comparable(numpys | {"dataset_name": "y"}) == {
        "configurations": {"2d": {"spacing": [1.0, 1.0]}},
        "n": 3,
        "4": [1.5],
    }


def test_a_configuration_that_is_not_there(raw: Path, instant: list[list[str]]) -> None:
    write_dataset(raw, OTHER, (0, 1), two_d=True)
    with pytest.raises(ConfigurationError, match=r"no configuration 3d_lowres; there are 2d, 3d_fullres"):
        plan({"a": OTHER}, configurations=["3d_lowres"])
    large = r"no configuration 3d_cascade_fullres; .* only where images are much larger than a patch\.$"
    with pytest.raises(ConfigurationError, match=large):
        plan({"a": OTHER}, configurations=["3d_cascade_fullres"])


@pytest.mark.parametrize(
    ("study_says", "command_says", "prepared"),
    [
        ("3d_cascade_fullres", None, ["3d_lowres", "3d_fullres"]),
        ("3d_fullres", ["2d", "3d_cascade_fullres", "3d_lowres"], ["2d", "3d_lowres", "3d_fullres"]),
        ("3d_lowres", None, ["3d_lowres"]),
    ],
)
def test_both_stages_of_a_cascade_are_preprocessed(
    raw: Path,
    instant: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    study_says: str,
    command_says: list[str] | None,
    prepared: list[str],
) -> None:
    small = planning.extract

    def large(*arguments: Any) -> LocalFingerprint:
        return replace(small(*arguments), shapes_after_crop=[[28, 32, 32]] * 2)

    monkeypatch.setattr(planning, "extract", large)
    write_dataset(raw, OTHER, (0, 1))
    options = {"planner": "nnUNetPlannerFedSmall", "gpu_memory_target_in_gb": 0.003, "configuration": study_says}
    result = plan({"a": OTHER}, configurations=command_says, **options)["a"]
    assert instant == [prepared]
    assert result.configurations == tuple(prepared)


def test_unknown_planner(raw: Path) -> None:
    write_dataset(raw, OTHER, (0,))
    with pytest.raises(
        ConfigurationError, match=r"no planner 'Nope'.*known are nnUNetPlannerFed, nnUNetPlannerFedResEncL, "
    ):
        plan({"a": OTHER}, planner="Nope")
    assert planner_class("nnUNetPlannerFedSmall") is nnUNetPlannerFedSmall


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed"])
def test_paths_that_are_not_set(raw: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.delenv(variable)
    with pytest.raises(ConfigurationError, match=f"{variable} is not set"):
        plan({"a": OTHER})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: shutil.rmtree(folder), r"no data set with the id 21"),
        (lambda folder: folder.with_name("Dataset021_Two").mkdir(), r"more than one data set with the id 21"),
        (lambda folder: (folder / "dataset.json").unlink(), r"dataset.json does not exist"),
        (
            lambda folder: (folder / "dataset.json").write_text("{}"),
            r"lacks labels, numTraining, file_ending, channel_names",
        ),
        (
            lambda folder: [file.unlink() for file in (folder / "imagesTr").iterdir()],
            r"imagesTr holds no training case",
        ),
        (lambda folder: shutil.rmtree(folder / "imagesTr"), r"there is no folder .*imagesTr"),
        (
            lambda folder: (folder / "labelsTr" / "case_001.nii.gz").unlink(),
            r"case case_001, labelsTr/case_001.nii.gz: the file is not there",
        ),
        (
            lambda folder: (folder / "imagesTr" / "case_001_0001.nii.gz").unlink(),
            r"case case_001, imagesTr.*: 1 image file,",
        ),
        (
            lambda folder: [
                (folder / name).unlink() for name in ("imagesTr/case_001_0000.nii.gz", "imagesTr/case_001_0001.nii.gz")
            ],
            r"numTraining = 2, but there are 1",
        ),
        (lambda folder: (folder / "imagesTr" / "case_000_0000.nii.gz").write_text("no image"), r"cannot be read"),
    ],
)
def test_data_sets_that_are_not_in_order(raw: Path, spoil: Callable[[Path], Any], message: str) -> None:
    spoil(write_dataset(raw, OTHER, (0, 1)))
    with pytest.raises(ConfigurationError, match=message):
        plan({"a": OTHER})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_value_that_is_not_finite(raw: Path, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    few_samples(monkeypatch)
    workers_as_threads(monkeypatch)
    folder = write_dataset(raw, OTHER, (0, 1))
    content = json.loads((folder / "dataset.json").read_text())
    content["overwrite_image_reader_writer"] = "NibabelIO"  # ITK reads 0 where a NIfTI file is not finite
    (folder / "dataset.json").write_text(json.dumps(content))
    file = str(folder / "imagesTr" / "case_001_0001.nii.gz")
    image = sitk.ReadImage(file)
    image[4:8, 4:8, 4:8] = value
    sitk.WriteImage(image, file)
    with pytest.raises(FederationError, match=r"Case case_001 .*case_001_0001.nii.gz.* holds NaN or infinite"):
        extract(OTHER, 2, 1)


def test_lesions_that_cannot_be_measured(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workers_as_threads(monkeypatch)
    write_dataset(raw, OTHER, (0, 1))
    monkeypatch.setattr(DatasetFingerprintExtractor, "analyze_case", staticmethod(spoil_label))
    with pytest.raises(FederationError, match=r"Case case_000 .*case_000.nii.gz\) cannot be analysed"):
        extract(OTHER, 2, 1)


def spoil_label(images: list[str], label: str, *_: Any) -> tuple[Any, ...]:
    """A label file that breaks once nnU-Net has read it."""
    Path(label).write_text("no image")
    return (), [1.0, 1.0, 1.0], [], [], 1.0


def die(*_: Any) -> None:
    """A worker that the operating system kills."""
    os._exit(1)


def test_worker_that_dies(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(raw, OTHER, (0, 1))
    monkeypatch.setattr(DatasetFingerprintExtractor, "analyze_case", staticmethod(die))
    with pytest.raises(FederationError, match=r"A worker died while it analysed case case_000 \(.*use fewer processes"):
        extract(OTHER, 2, 1)


@pytest.mark.parametrize(
    ("shape", "cases", "patch"),
    [((35, 50, 36), 260, [40, 56, 40]), ((44, 44, 44), 300, [48, 48, 48]), ((32, 38, 44), 9, None)],
)
def test_small_planner(raw: Path, shape: tuple[int, int, int], cases: int, patch: list[int] | None) -> None:
    write_dataset(raw, OTHER, (0,), channels=("MRI",))
    preprocessed(OTHER).mkdir()
    properties = dict.fromkeys(("mean", "median", "std", "min", "max", "percentile_99_5", "percentile_00_5"), 1.0)
    fingerprint = {
        "spacings": [[1.0, 1.0, 1.0]] * cases,
        "shapes_after_crop": [list(shape)] * cases,
        "foreground_intensity_properties_per_channel": {"0": properties},
        "median_relative_size_after_cropping": 1.0,
    }
    (preprocessed(OTHER) / "dataset_fingerprint.json").write_text("{}")
    planner = nnUNetPlannerFedSmall(OTHER, fingerprint=fingerprint, total_cases=cases, study={})
    plans = planner.plan_experiment()
    fullres = plans["configurations"]["3d_fullres"]
    assert list(fullres["patch_size"]) == (patch or [32, 40, 48])
    assert fullres["batch_size"] == 2
    assert list(fullres["architecture"]["arch_kwargs"]["features_per_stage"]) == [8, 16, 32, 64]
    assert list(plans["configurations"]) == ["2d", "3d_fullres"]


def test_total_cases_cap_the_batch(pooled: dict[str, Any]) -> None:
    given = read(SITE_A, COMMON)
    few, many = (
        nnUNetPlannerFed(SITE_A, plans_name=f"P{n}", fingerprint=given, total_cases=n, study={}) for n in (5, 5000)
    )
    assert few.plan_experiment()["configurations"]["3d_fullres"]["batch_size"] == 2
    assert many.plan_experiment()["configurations"]["3d_fullres"]["batch_size"] > 2
