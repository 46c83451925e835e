"""The sites' data as one data set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_sites import federation, planned
from serving import make_study

from nnunet_fed.comparison.pooled_data import Planned, fix_folds, pool, pooled_folds, pooled_names
from nnunet_fed.errors import ConfigurationError


def test_cases_keep_their_names_unless_two_sites_share_one() -> None:
    assert set(pooled_names({"a": ("x",), "b": ("y",)}).values()) == {"x", "y"}
    assert list(pooled_names({"a": ("x", "y"), "b": ("y",)}).values()) == ["a@x", "a@y", "b@y"]


def test_folds_are_unions_and_a_site_without_is_trained_on() -> None:
    folds = {
        "a": ({"train": ["x"], "val": ["y"]}, {"train": ["y"], "val": ["x"]}),
        "b": ({"train": ["u"], "val": ["v"]},),
        "c": (),
    }
    names = pooled_names({"a": ("x", "y"), "b": ("u", "v"), "c": ("w",)})
    assert pooled_folds(folds, names) == [{"train": ["u", "w", "x"], "val": ["v", "y"]}]


def test_one_data_set_out_of_two_that_share_names(tmp_path: Path) -> None:
    folds = [{"train": ["x"], "val": ["y"]}]
    planned(tmp_path, "a", ["x", "y"], folds)
    planned(tmp_path, "b", ["x", "x_1", "y"], [{"train": ["x", "x_1"], "val": ["y"]}])
    study = make_study(["pooled"], plans_name="SmallPlans")
    pool(federation(tmp_path, "a", "b"), tmp_path / "out", study)
    found = Planned.read("pooled", tmp_path / "out" / "sites" / "pooled")
    assert found.cases == ("a@x", "a@y", "b@x", "b@x_1", "b@y")
    assert found.folds == ({"train": ["a@x", "b@x", "b@x_1"], "val": ["a@y", "b@y"]},)
    assert found.dataset["numTraining"] == 5
    assert found.plans["dataset_name"] == found.folder.name
    for case in found.cases:
        origin = case[0]
        for ending in (".b2nd", "_seg.b2nd", ".pkl"):
            assert (found.folder / "cases_a" / (case + ending)).read_text() == origin
        assert (found.folder / "gt_segmentations" / f"{case}.nii.gz").read_text() == origin
        assert (found.raw / "imagesTr" / f"{case}_0000.nii.gz").read_text() == origin
        assert (found.raw / "labelsTr" / f"{case}.nii.gz").read_text() == origin
    origins = json.loads((tmp_path / "out" / "cases.json").read_text())
    assert origins["b@x_1"] == ["b", "x_1"]


def test_files_of_two_formats_are_refused(tmp_path: Path) -> None:
    planned(tmp_path, "a", ["x"])
    planned(tmp_path, "b", ["y"], image_reader_writer="NibabelIO")
    with pytest.raises(ConfigurationError, match="sites 'a' and 'b' keep their images in different formats"):
        pool(federation(tmp_path, "a", "b"), tmp_path / "out", make_study(["pooled"], plans_name="SmallPlans"))


def test_folds_are_fixed_as_nnunet_would_make_them(tmp_path: Path) -> None:
    own = [{"train": ["x"], "val": ["y"]}]
    cases = [f"case_{number}" for number in range(7)]
    for site, names, folds in (("many", cases, None), ("few", cases[:4], None), ("own", cases, own)):
        planned(tmp_path, site, names, folds)
        fix_folds(tmp_path / "sites" / site)
    many, few, kept = (Planned.read(site, tmp_path / "sites" / site) for site in ("many", "few", "own"))
    assert sorted(case for fold in many.folds for case in fold["val"]) == cases
    assert len(many.folds) == 5
    assert few.folds == ()
    assert list(kept.folds) == own
