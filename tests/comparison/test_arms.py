"""Arms: who is trained, what is kept, what is refused. No process runs here."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_sites import federation, planned, raw
from rich.console import Console

from nnunet_fed.comparison import arms
from nnunet_fed.comparison.arms import Comparison, compare, remember
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.simulation.simulate import Simulation

STUDY = {"rounds": 3, "iterations_per_epoch": 5, "fold": 0, "planner": "nnUNetPlannerFedSmall"}


@pytest.fixture
def given(tmp_path: Path) -> Comparison:
    sites = {site: raw(tmp_path / "raw" / site) for site in ("a", "b")}
    return Comparison(sites, tmp_path / "out", ("local", "pooled", "fedavg"), (0, 1), STUDY)


class Trained:
    """Stands for :func:`simulate`: notes what it is asked, and leaves what a simulation leaves."""

    def __init__(self, cases: int = 6):
        self.asked: list[tuple[str, Simulation]] = []
        self.dies_at = ""
        self._cases = cases

    def __call__(self, simulation: Simulation, console: Console) -> dict[str, Any]:
        study = simulation.study
        self.asked.append((study.name, simulation))
        simulation.out.mkdir(parents=True)
        if study.name == self.dies_at:
            (simulation.out / "half a checkpoint").touch()
            raise KeyboardInterrupt
        if simulation.until == "plan":
            for site in study.sites:
                planned(simulation.out, site, [f"{site}{number}" for number in range(self._cases)])
            federation(simulation.out, *study.sites)
        summary = {"method": study.method.name, "seed": study.seed, "rounds": study.rounds, "seconds": 1.0}
        (simulation.out / "summary.json").write_text(json.dumps(summary))
        return {**summary, "sites": {}, "mean_dice": {"final": None}}

    @property
    def names(self) -> list[str]:
        return [name for name, simulation in self.asked if simulation.until == "validate"]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    fake = Trained()
    monkeypatch.setattr(arms, "simulate", fake)
    return fake


def quiet() -> Console:
    return Console(file=io.StringIO())


def test_every_arm_once_on_one_planning(given: Comparison, trained: Trained) -> None:
    assert compare(given, quiet()) == {}
    assert trained.names == ["local-0", "pooled-0", "fedavg-0", "local-1", "pooled-1", "fedavg-1"]
    planning, *arms = (simulation for _, simulation in trained.asked)
    assert planning.until == "plan"
    budgets = {(arm.study.epochs, arm.study.iterations_per_epoch, arm.study.initial_lr) for arm in arms}
    assert len(budgets) == 1
    for (name, arm), seed in zip(trained.asked[1:], (0, 0, 0, 1, 1, 1), strict=True):
        pooled = name.startswith("pooled")
        assert arm.study.seed == seed
        assert arm.planned == given.out / ("pooled" if pooled else "planned")
        assert arm.study.sites == (("pooled",) if pooled else ("a", "b"))
        assert (given.out / "runs" / name / "summary.json").is_file()
    assert trained.asked[2][1].study.method.name == "local"
    assert not list((given.out / "unfinished").iterdir())


def test_every_arm_starts_from_the_same_file(given: Comparison, trained: Trained) -> None:
    file, digest = Path("start.pth"), "0123456789abcdef" * 4
    given = replace(given, study={**given.study, "pretrained": digest}, pretrained=file)
    compare(given, quiet())
    for _, arm in trained.asked[1:]:
        assert (arm.study.pretrained, arm.pretrained) == (digest, file)
    with pytest.raises(ConfigurationError, match="pretrained"):
        compare(replace(given, study={**given.study, "pretrained": None}), quiet())


def test_an_interrupted_arm_begins_anew_and_finished_ones_are_kept(given: Comparison, trained: Trained) -> None:
    trained.dies_at = "fedavg-0"
    with pytest.raises(KeyboardInterrupt):
        compare(given, quiet())
    assert not (given.out / "runs" / "fedavg-0").exists()
    [left] = (given.out / "unfinished").iterdir()
    trained.asked.clear()
    trained.dies_at = ""
    compare(given, quiet())
    assert trained.names == ["fedavg-0", "local-1", "pooled-1", "fedavg-1"]
    assert trained.asked[0][1].out != left, "what the killed one left running may still write there"
    assert not left.exists()
    trained.asked.clear()
    compare(given, quiet())
    assert trained.asked == []


def test_an_interrupted_planning_begins_anew(given: Comparison, trained: Trained) -> None:
    trained.dies_at = "local-0"
    with pytest.raises(KeyboardInterrupt):
        compare(given, quiet())
    assert not (given.out / "planned").exists()
    trained.dies_at = ""
    compare(given, quiet())
    assert [simulation.until for _, simulation in trained.asked].count("plan") == 2


def test_methods_and_seeds_may_be_added(given: Comparison, trained: Trained) -> None:
    compare(given, quiet())
    trained.asked.clear()
    more = replace(given, methods=("fedavg", "fedgs"), seeds=(0, 2), options={"fedgs": {"strength": 1.0}})
    compare(more, quiet())
    assert trained.names == ["fedgs-0", "fedavg-2", "fedgs-2"]
    with pytest.raises(ConfigurationError, match=r"options\.fedgs\.strength = 1\.0, but now it is 3\.0"):
        remember(replace(more, options={"fedgs": {"strength": 3.0}}))
    remember(given)


def test_a_base_trainer_is_that_of_all_arms(given: Comparison, trained: Trained) -> None:
    named = replace(given, study={**STUDY, "trainer": "nnUNetTrainerDA5"}, seeds=(0,))
    compare(named, quiet())
    assert {simulation.study.trainer for _, simulation in trained.asked} == {"nnUNetTrainerDA5"}
    assert trained.names == ["local-0", "pooled-0", "fedavg-0"]


def test_a_method_takes_part_again_with_other_options(given: Comparison, trained: Trained) -> None:
    strong = replace(
        given,
        methods=("fedgs", "strong"),
        seeds=(0,),
        options={"strong": {"strength": 3.0}},
        variants={"strong": "fedgs"},
    )
    compare(strong, quiet())
    assert trained.names == ["fedgs-0", "strong-0"]
    usual, other = (simulation.study.method for _, simulation in trained.asked[1:])
    assert (usual.name, other.name, other.strength) == ("fedgs", "fedgs", 3.0)
    assert usual.strength != 3.0
    remember(replace(strong, methods=("fedgs",), options={}, variants={}))
    with pytest.raises(ConfigurationError, match=r'variants\.strong = "fedgs", but now it is "gcml"'):
        remember(replace(strong, options={"strong": {"strength": 3.0}}, variants={"strong": "gcml"}))


@pytest.mark.parametrize("name", ["", "a/b", "..", "a.b", "ä"])
def test_a_variants_name_makes_a_folder_and_has_options(given: Comparison, name: str) -> None:
    with pytest.raises(ConfigurationError, match="of letters, digits, - and _"):
        compare(replace(given, methods=(name,), variants={name: "fedgs"}), quiet())
    assert not given.out.exists()


@pytest.mark.parametrize("variants", [{"fedavg": "fedgs"}, {"pooled": "fedavg"}, {"other": "pooled"}])
def test_a_variant_takes_no_methods_name_and_is_not_of_pooled(given: Comparison, variants: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="a variant has a name that is no method's"):
        compare(replace(given, methods=tuple(variants), variants=variants), quiet())
    assert not given.out.exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"study": {**STUDY, "rounds": 4}}, r"study\.rounds = 3, but now it is 4"),
        ({"study": {**STUDY, "momentum": 0.5}}, r"study\.momentum = nothing, but now it is 0\.5"),
        ({"device": "cuda"}, 'device = "cpu", but now it is "cuda"'),
        ({"labels": {"a": {"lesion": ("x", 2)}}}, r"labels\.a = nothing"),
        ({"sites": {"a": Path("elsewhere"), "b": Path("b")}}, r"sites\.a = "),
    ],
)
def test_other_settings_are_refused(given: Comparison, changes: dict[str, Any], named: str) -> None:
    remember(given)
    before = (given.out / "compare.toml").read_text()
    with pytest.raises(ConfigurationError, match=named):
        remember(replace(given, **changes))
    assert (given.out / "compare.toml").read_text() == before
    remember(given)


def test_other_versions_are_refused(given: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    remember(given)
    monkeypatch.setattr(arms, "version", lambda package: "99")
    with pytest.raises(ConfigurationError, match=r"versions\..* but now it is \"99\""):
        remember(given)


def test_a_folder_with_something_else_in_it_is_left_alone(given: Comparison) -> None:
    given.out.mkdir()
    (given.out / "precious").touch()
    with pytest.raises(ConfigurationError, match="is not empty"):
        remember(given)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"methods": ("fedavgs",)}, "there is no 'fedavgs'; known: custom,"),
        ({"methods": ("local", "local")}, "name each method once"),
        ({"methods": ()}, "--methods: give at least one"),
        ({"options": {"fedgs": {}}}, "'fedgs' is none of --methods"),
        ({"options": {"pooled": {"x": 1}}}, "'pooled' has no options"),
        ({"options": {"fedavg": {"strenght": 1}}}, "The study of 'fedavg': unknown key 'method.strenght'"),
        ({"methods": ("fedoap",), "options": {"fedoap": {"private_stem": True}}}, "fedoap.private_stem: .*one plan"),
        ({"methods": ("fedoap",), "study": {**STUDY, "rounds": 2}}, "fedoap fine-tunes for 2 epochs"),
        ({"study": {**STUDY, "fold": "all"}}, "--fold all keeps no case"),
        ({"study": {**STUDY, "folds": [0, "all"]}}, "--fold all keeps no case"),
        ({"study": {**STUDY, "configuration": "3d_cascade_fullres"}}, "second of two trainings.*--config 3d_lowres"),
    ],
)
def test_a_wrong_setting_ends_before_anything_starts(
    given: Comparison, trained: Trained, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigurationError, match=named):
        compare(replace(given, **changes), quiet())
    assert trained.asked == []
    assert not given.out.exists()


def test_all_arms_train_the_same_folds(given: Comparison, trained: Trained) -> None:
    folds = replace(given, study={**STUDY, "folds": [0, 4]})
    compare(folds, quiet())
    assert {simulation.study.trained_folds for _, simulation in trained.asked} == {(0, 4)}
    with pytest.raises(ConfigurationError, match=r"made with study.folds.* but now it is"):
        compare(given, quiet())
    beyond = replace(given, out=given.out.with_name("beyond"), study={**STUDY, "folds": [0, 5]})
    with pytest.raises(ConfigurationError, match="--fold 5: the last fold of site 'a' is 4"):
        compare(beyond, quiet())


def test_fine_tuning_is_taken_from_the_rounds(given: Comparison) -> None:
    arms = [replace(given, options={}).study_of(method, 0) for method in ("local", "pooled", "fedavg", "fedoap")]
    steps = {study.epochs + getattr(study.method, "finetune_epochs", 0) for study in arms}
    assert steps == {3}
    assert arms[3].rounds == 1
    with pytest.raises(ConfigurationError, match="whole rounds"):
        replace(given, study={**STUDY, "local_epochs": 3}).study_of("fedoap", 0)


def test_sites_without_folds_are_left_out_unless_all_are(given: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "simulate", Trained(cases=4))
    with pytest.raises(ConfigurationError, match="No site has enough cases"):
        compare(given, quiet())
    splits = [{"train": ["a0", "a1"], "val": ["a2", "a3"]}]
    [folder] = (given.out / "planned" / "sites" / "a" / "nnUNet_preprocessed").iterdir()
    (folder / "splits_final.json").write_text(json.dumps(splits))
    assert list(compare(given, quiet())) == ["b"]
    with pytest.raises(ConfigurationError, match="--fold 1: the last fold of site 'a' is 0"):
        compare(replace(given, out=_moved(given), study={**STUDY, "fold": 1}), quiet())


def _moved(given: Comparison) -> Path:
    """The comparison's planning in a new comparison."""
    out = given.out.with_name("other")
    remember(replace(given, out=out, study={**STUDY, "fold": 1}))
    (given.out / "planned").rename(out / "planned")
    return out
