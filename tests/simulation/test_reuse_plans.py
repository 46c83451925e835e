"""Another study on planned data: what is taken over, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from serving import make_study

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.simulation.reuse_plans import adopt, check_same_planning
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.toml import to_toml


def planned(folder: Path, name: str = "Dataset001_a") -> Path:
    """What an earlier simulation left at one site."""
    dataset = folder / "nnUNet_preprocessed" / name
    (dataset / "cases").mkdir(parents=True)
    (dataset / "cases" / "case.b2nd").write_text("voxels")
    (dataset / "dataset.json").write_text("{}")
    carried = {"study": {}, "plans_digest": "p", "small_lesions": {"x": 1.5}}
    configurations = {"3d_fullres": {"data_identifier": "cases"}}
    plans = {"plans_name": "OldPlans", "configurations": configurations, "federation": carried}
    (dataset / "OldPlans.json").write_text(json.dumps(plans))
    return folder


def earlier(folder: Path, **sites: str) -> Path:
    """A simulation that has planned, with an addition to each site's ``site.toml``."""
    (folder / "federation.toml").write_text(to_toml(make_study(tuple(sites)).model_dump(mode="json")))
    for site, more in sites.items():
        (folder / "sites" / site).mkdir(parents=True)
        content = f'name = "{site}"\ncoordinator = "127.0.0.1:1"\n{more}\n'
        (folder / "sites" / site / "site.toml").write_text(content)
    return folder


def test_the_plans_carry_the_new_study_and_the_cases_are_shared(tmp_path: Path) -> None:
    study = make_study("ab", rounds=77, plans_name="NewPlans")
    adopt(planned(tmp_path / "old"), tmp_path / "new", study)
    dataset = tmp_path / "new" / "nnUNet_preprocessed" / "Dataset001_a"
    plans = json.loads((dataset / "NewPlans.json").read_text())
    carried = plans["federation"]
    assert Federation.model_validate(carried["study"]) == study
    assert (carried["digest"], carried["plans_digest"]) == (study.digest, "p")
    assert carried["small_lesions"] == {"x": 1.5}
    assert plans["plans_name"] == "NewPlans"
    assert not (dataset / "OldPlans.json").exists()
    assert (dataset / "cases").is_symlink()
    assert (dataset / "cases" / "case.b2nd").read_text() == "voxels"


def test_a_mapped_data_set_is_shared_as_it_was_built(tmp_path: Path) -> None:
    old, new = planned(tmp_path / "old", "Dataset002_a_mapped"), tmp_path / "new"
    (old / "nnUNet_preprocessed" / "Dataset001_a").mkdir()  # of the log of what was sent
    (old / "nnUNet_raw" / "Dataset002_a_mapped").mkdir(parents=True)
    (new / "nnUNet_raw" / "Dataset001_a").mkdir(parents=True)
    adopt(old, new, make_study("ab", plans_name="NewPlans"))
    assert [path.name for path in (new / "nnUNet_preprocessed").iterdir()] == ["Dataset002_a_mapped"]
    built = new / "nnUNet_raw" / "Dataset002_a_mapped"
    assert built.resolve() == old / "nnUNet_raw" / "Dataset002_a_mapped"


def test_without_plans_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="There are no plans in"):
        adopt(tmp_path, tmp_path / "new", make_study("ab", plans_name="NewPlans"))


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"rounds": 9, "seed": 5, "momentum": 0.5}, None),
        ({"planner": "other"}, "planner"),
        ({"geometry": "lists"}, "geometry"),
        ({"method": {"name": "fedoap"}}, None),
        ({"method": {"name": "fedoap", "private_stem": True}}, "method.own_channels"),
    ],
)
def test_what_planning_reads_must_be_the_same(tmp_path: Path, changes: dict[str, Any], refused: str | None) -> None:
    earlier(tmp_path, a="", b="")
    study = make_study("ab", **changes)
    if refused is None:
        check_same_planning(tmp_path, study, {}, {})
    else:
        with pytest.raises(ConfigurationError, match=f"planned with {refused} = "):
            check_same_planning(tmp_path, study, {}, {})


def test_a_site_with_other_data_is_named(tmp_path: Path) -> None:
    study = make_study("ab")
    earlier(tmp_path, a="", b="")
    data = {name: tmp_path / name for name in ("a", "b", "other")}
    for site in "ab":
        data[site].mkdir()
        raw = tmp_path / "sites" / site / "nnUNet_raw"
        raw.mkdir()
        (raw / "Dataset001_x").symlink_to(data[site])
        (raw / "Dataset002_x_mapped").symlink_to(tmp_path)  # taken over from one before, and no data of its own
    check_same_planning(tmp_path, study, {"a": data["a"], "b": data["b"]}, {})
    with pytest.raises(ConfigurationError, match="for site 'b', this one has .*other: plan anew"):
        check_same_planning(tmp_path, study, {"a": data["a"], "b": data["other"]}, {})


@pytest.mark.parametrize(
    ("labels", "refused"),
    [
        ({"b": {"lesion": ("tumour", 3), "edge": ()}}, None),
        ({}, r"planned with the label map \{'lesion'.* for site 'b', this one has no label map: plan anew"),
        ({"b": {"lesion": ("tumour",), "edge": ()}}, r"for site 'b', this one has the label map \{'lesion'"),
        ({"b": {"edge": (), "lesion": ("tumour", 3)}}, "for site 'b'"),
        (
            {"a": {"lesion": (1,)}, "b": {"lesion": ("tumour", 3), "edge": ()}},
            "planned with no label map for site 'a', this one has the label map",
        ),
    ],
)
def test_label_maps_must_be_the_same(tmp_path: Path, labels: dict[str, Any], refused: str | None) -> None:
    earlier(tmp_path, a="", b='mapped_dataset = 2\nlabels = { lesion = ["tumour", 3], edge = [] }')
    sites = {"a": tmp_path, "b": tmp_path}
    if refused is None:
        check_same_planning(tmp_path, make_study("ab"), sites, labels)
    else:
        with pytest.raises(ConfigurationError, match=refused):
            check_same_planning(tmp_path, make_study("ab"), sites, labels)
