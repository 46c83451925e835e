from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_sites import LABELS, raw
from rich.console import Console
from rich.table import Table
from rich.text import Text
from serving import make_study
from workers import look_in_threads

from nnunet_fed import processes
from nnunet_fed.coordinator import watch
from nnunet_fed.errors import ConfigurationError, FederationError
from nnunet_fed.evaluation.lesions import CaseResult, Lesion, aggregate
from nnunet_fed.evaluation.summary import lesion_table, result_table, site_summary, summarise
from nnunet_fed.simulation import simulate
from nnunet_fed.simulation.first_look import count_cases
from nnunet_fed.simulation.simulate import Simulation, plugin_folder, training_command
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.labels import LabelMap
from nnunet_fed.study.site import Site

MODEL = "nnUNetTrainerFedAvg__nnUNetFedSmallPlans__3d_fullres"


FLAT = {"background": 0, "organ": 1, "tumour": 2, "cyst": 3}


def with_maps(given: Simulation, **labels: dict[str, tuple[int | str, ...]]) -> Simulation:
    """The sites have labels that can be mapped, and maps."""
    for folder in given.sites.values():
        (folder / "dataset.json").write_text(json.dumps({"file_ending": ".nii.gz", "labels": FLAT}))
    return replace(given, labels=labels)


def simulation(folder: Path, cases: dict[str, int], until: Any = "validate", **study: Any) -> Simulation:
    sites = {name: raw(folder / "raw" / name, number) for name, number in cases.items()}
    return Simulation(sites, folder / "out", make_study(tuple(cases), planner="nnUNetPlannerFedSmall", **study), until)


def results(fold: Path, dice: float | None = None, lesions: dict[str, Any] | None = None, **record: Any) -> Path:
    (fold / "validation").mkdir(parents=True)
    (fold / "federation.json").write_text(json.dumps(record))
    if dice is not None:
        content = {
            "foreground_mean": {"Dice": dice},
            "mean": {"(1, 2)": {"Dice": dice}, "2": {"Dice": float("nan")}},
            "metric_per_case": [{}, {}, {}],
        }
        (fold / "validation" / "summary.json").write_text(json.dumps(content))
    if lesions is not None:
        (fold / "validation" / "lesions.json").write_text(json.dumps(lesions))
    return fold


def text_of(table: Table) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


LOOK = simulate.look_at_sites


@pytest.fixture(autouse=True)
def _no_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sites' files are no images."""
    monkeypatch.setattr(simulate, "look_at_sites", lambda *_: {})


def look(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(simulate, "look_at_sites", LOOK)
    look_in_threads(patch)


def quiet() -> Console:
    return Console(file=io.StringIO())


# ------------------------------------------------------------------------------------------- checks and files


def test_cases_are_counted_not_files(tmp_path: Path) -> None:
    folder = raw(tmp_path / "a", 3)
    (folder / "imagesTr" / "notes.txt").touch()
    assert count_cases("a", folder) == 3


@pytest.mark.parametrize("part", ["dataset.json", "imagesTr", "labelsTr"])
def test_a_folder_in_another_layout_is_named(tmp_path: Path, part: str) -> None:
    folder = raw(tmp_path / "a")
    (folder / part).rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError, match=f"{folder} of site 'a' has no {part}"):
        count_cases("a", folder)


def test_no_images_and_no_file_ending_are_named(tmp_path: Path) -> None:
    folder = raw(tmp_path / "a", 0)
    with pytest.raises(ConfigurationError, match="imagesTr of site 'a' has no image CASE_0000.nii.gz"):
        count_cases("a", folder)
    (folder / "dataset.json").write_text("[]")
    with pytest.raises(ConfigurationError, match="dataset.json of site 'a' has no 'file_ending'"):
        count_cases("a", folder)


def test_nothing_is_written_when_the_input_is_wrong(tmp_path: Path) -> None:
    given = simulation(tmp_path, {"a": 5, "b": 5})
    (given.sites["b"] / "dataset.json").unlink()
    with pytest.raises(ConfigurationError, match="site 'b'"):
        simulate.simulate(given, quiet())
    assert not given.out.exists()


def test_an_earlier_simulation_is_kept(tmp_path: Path) -> None:
    given = simulation(tmp_path, {"a": 5})
    given.out.mkdir()
    (given.out / "summary.json").touch()
    with pytest.raises(ConfigurationError, match="is not empty"):
        simulate.simulate(given, quiet())


def test_the_sites_are_those_of_the_study_and_differ_in_more_than_capitals(tmp_path: Path) -> None:
    given = simulation(tmp_path, {"a": 5, "b": 5})
    with pytest.raises(ConfigurationError, match="folders for the sites a, b, but the study is of a, c"):
        simulate.simulate(Simulation(given.sites, given.out, make_study("ac")), quiet())
    with pytest.raises(ConfigurationError, match="differ in capitals"):
        simulate.simulate(
            Simulation({"a": given.sites["a"], "A": given.sites["a"]}, given.out, make_study("aA")), quiet()
        )


def test_a_site_has_nnunets_folders_its_data_as_a_link_and_a_name_that_nnunet_takes(tmp_path: Path) -> None:
    place = simulate.Place("site__a.1-x", raw(tmp_path / "raw"), tmp_path / "site", (0,))
    place.make("127.0.0.1:1234", {})
    assert place.dataset == "Dataset001_site_a_1_x"
    assert (tmp_path / "site" / "nnUNet_raw" / place.dataset).resolve() == tmp_path / "raw"
    assert (tmp_path / "site" / "nnUNet_results").is_dir()
    site = Site.read(tmp_path / "site" / "site.toml")
    assert (site.name, site.coordinator, site.insecure) == (place.name, "127.0.0.1:1234", True)


def test_peers_have_addresses_of_their_own(tmp_path: Path) -> None:
    addresses = [f"127.0.0.1:{port}" for port in simulate.free_ports(2)]
    peers = dict(zip(("a", "b"), addresses, strict=True))
    place = simulate.Place("b", raw(tmp_path / "raw"), tmp_path / "site", (0,))
    place.make("127.0.0.1:1234", peers)
    site = Site.read(tmp_path / "site" / "site.toml")  # which refuses two sites with one address
    assert (site.listen, site.peers) == (addresses[1], peers)


def test_the_data_are_copied_where_links_are_not_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError

    monkeypatch.setattr(Path, "symlink_to", refuse)
    place = simulate.Place("a", raw(tmp_path / "raw"), tmp_path / "site", (0,))
    place.make("127.0.0.1:1234", {})
    copy = tmp_path / "site" / "nnUNet_raw" / "Dataset001_a"
    assert not copy.is_symlink()
    assert count_cases("a", copy) == 5


def test_training_is_nnunets_own_command() -> None:
    study = make_study(plans_name="P", configuration="2d")
    command = training_command(study, "all", "cpu")
    assert Path(command[0]).name == "nnUNetv2_train"
    assert command[1:] == ["1", "2d", "all", "-tr", "nnUNetTrainerFedAvg", "-p", "P", "-device", "cpu"]


def test_all_sites_start_from_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = replace(simulation(tmp_path, {"a": 5, "b": 5}), pretrained=Path("start.pth"))
    for place in simulate._places(given):
        planning, training = simulate._steps(given, given.study, place)
        assert "-pretrained_weights" not in planning.command
        assert training.command[-2:] == ["-pretrained_weights", str(tmp_path / "start.pth")]


def test_a_site_with_a_map_trains_the_mapped_data_set(tmp_path: Path) -> None:
    given = with_maps(simulation(tmp_path, {"a": 5, "b": 5}, plans_name="P"), a={"lesion": ("tumour", 3), "edge": ()})
    mapped, plain = simulate._places(given)
    for place in (mapped, plain):
        place.make("127.0.0.1:1234", {})
    site = Site.read(mapped.folder / "site.toml")
    assert site.label_map == LabelMap(2, {"lesion": ("tumour", 3), "edge": ()})
    assert Site.read(plain.folder / "site.toml").label_map is None
    assert (mapped.dataset, mapped.trained_dataset) == ("Dataset001_a", "Dataset002_a_mapped")
    assert plain.trained_dataset == plain.dataset == "Dataset001_b"
    assert mapped.labels == {"background": 0, "lesion": 1, "edge": 2}
    assert plain.labels == FLAT
    assert [place.results(given.study, 0).parts[-3] for place in (mapped, plain)] == [
        "Dataset002_a_mapped",
        "Dataset001_b",
    ]
    planning, training = zip(*(simulate._steps(given, given.study, place) for place in (mapped, plain)), strict=True)
    assert [step.command[step.command.index("-d") + 1] for step in planning] == ["1", "1"]
    assert [step.command[1] for step in training] == ["2", "1"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            {"a": {"lesion": ("tumor",)}},
            "site 'a' have.*label map: site.toml: 'labels' .*names 'tumor', which .*a/dataset.json does not have",
        ),
        ({"a": {"lesion": ()}}, "site 'a' have.*'labels' in site.toml leaves none of the labels"),
        ({"a": {"lesion": (2,), "edge": ("tumour",)}}, "site 'a' have.* become both 'lesion' and 'edge'"),
        ({"c": {"lesion": (2,)}}, "There is a label map for 'c', but the sites are a, b"),
    ],
)
def test_a_label_map_that_does_not_fit_is_found_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: dict[str, Any], message: str
) -> None:
    look(monkeypatch)
    given = with_maps(simulation(tmp_path, {"a": 5, "b": 5}), **labels)
    with pytest.raises(ConfigurationError, match=f"(?s){message}"):
        simulate.simulate(given, quiet())
    assert not (given.out / "federation.toml").exists()
    with pytest.raises(ConfigurationError, match=f"(?s){message}"):  # and the same folder can be given again
        simulate.simulate(given, quiet())


def test_regions_are_not_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look(monkeypatch)
    given = replace(simulation(tmp_path, {"a": 5}), labels={"a": {"lesion": ("core",)}})
    with pytest.raises(ConfigurationError, match="(?s)site 'a' have.*a/dataset.json has region-based labels"):
        simulate.simulate(given, quiet())


def test_importing_stays_light_and_finds_the_plugin() -> None:
    code = (
        "import sys; from nnunet_fed.simulation.simulate import plugin_folder; print(plugin_folder());"
        "assert not {'torch', 'nnunetv2'} & set(sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert Path(printed.strip()) == plugin_folder()
    assert (plugin_folder() / "nnunet_fed_trainers.py").is_file()


def test_environment_of_planning_and_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def environments(until: Any, augmentation: str | None) -> list[Any]:
        if augmentation is None:
            monkeypatch.delenv("nnUNet_n_proc_DA", raising=False)
        else:
            monkeypatch.setenv("nnUNet_n_proc_DA", augmentation)
        given = simulation(tmp_path / f"{until} {augmentation}", {"a": 5}, until, plans_name="P")
        (place,) = simulate._places(given)
        return [step.environment for step in simulate._steps(given, given.study, place)]

    planning, training = environments("train", None)
    assert "nnUNet_n_proc_DA" not in planning
    assert training["nnUNet_n_proc_DA"] == "0"
    assert training["nnUNet_fed_skip_validation"] == "1"
    assert training["nnUNet_fed_site"].endswith("out/sites/a/site.toml")
    assert int(training["OMP_NUM_THREADS"]) == int(training["nnUNet_fed_threads"]) >= 1
    assert "nnUNet_n_proc_DA" not in environments("plan", "0")[0]
    planning, training = environments("validate", "3")
    assert planning["nnUNet_n_proc_DA"] == training["nnUNet_n_proc_DA"] == "3"
    assert not training["nnUNet_fed_skip_validation"]


def test_a_cascade_is_two_trainings_in_turn(tmp_path: Path) -> None:
    def steps(until: Any) -> list[Any]:
        cascade = {"configuration": "3d_cascade_fullres", "fold": "all", "plans_name": "P"}
        given = simulation(tmp_path / until, {"a": 5}, until, **cascade)
        (place,) = simulate._places(given)
        return simulate._steps(given, given.study, place)

    assert [step.name for step in steps("plan")] == ["Planning"]
    for until, last_skips in (("train", "1"), ("validate", "")):
        planning, first, second = steps(until)
        assert planning.command[planning.command.index("-c") + 1] == "3d_cascade_fullres"
        assert [step.command[2:4] for step in (first, second)] == [["3d_lowres", "all"], ["3d_cascade_fullres", "all"]]
        assert [step.log.name for step in (first, second)] == ["train_3d_lowres.log", "train.log"]
        skips = [step.environment["nnUNet_fed_skip_validation"] for step in (first, second)]
        assert skips == ["", last_skips], "the first stage's validation is what the second needs"


def test_a_cascade_needs_predictions_of_all_cases(tmp_path: Path) -> None:
    given = simulation(tmp_path, {"a": 5}, configuration="3d_cascade_fullres")
    with pytest.raises(ConfigurationError, match=r"fold 0 of 3d_lowres predicts its validation cases only.*--fold all"):
        simulate.simulate(given, quiet())
    assert not given.out.exists()


# ------------------------------------------------------------------------------------------- summary


def test_summary_leaves_a_site_without_validation_cases_out_of_the_mean(tmp_path: Path) -> None:
    record = {"training_cases": 4, "bytes_sent": 2_500_000, "bytes_received": 3_000_000}
    sites = {
        name: site_summary(results(tmp_path / name, dice, **record), LABELS, fold)
        for name, dice, fold in (("a", 0.5, 0), ("b", 0.7, 0), ("c", 0.99, "all"))
    }
    assert {name: value for name, value in sites["a"].items() if value is not None} == {
        "fold": 0,
        "train_cases": 4,
        "val_cases": 3,
        "dice": {"final": 0.5, "global": 0.5},
        "dice_per_class": {"whole": 0.5, "core": None},
        "bytes_sent": 2_500_000,
        "bytes_received": 3_000_000,
    }
    summary = summarise(make_study("abc", rounds=2, seed=7), sites, 12.34)
    assert summary["mean_dice"] == pytest.approx({"final": 0.6, "global": 0.6})
    assert (summary["method"], summary["rounds"], summary["seed"], summary["seconds"]) == ("fedavg", 2, 7, 12.3)
    shown = text_of(result_table(summary))
    for part in ("c *", "* c: trained and validated on all its cases; not in the mean", "0.6000", "2.5 MB", "whole"):
        assert part in shown
    assert "global model" not in shown


def test_a_site_without_foreground_or_without_a_class_is_told(tmp_path: Path) -> None:
    """A class that is nowhere at a site, of nnU-Net's mean makes NaN; it is no reason to leave out the others."""
    nan = float("nan")
    some = site_summary(results(tmp_path / "some", 0.5), {"organ": [1, 2], "lesion": 2}, 0)
    path = results(tmp_path / "one", nan) / "validation" / "summary.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "mean": {"1": {"Dice": 0.25}, "2": {"Dice": nan}}}))
    one = site_summary(tmp_path / "one", {"organ": 1, "lesion": 2}, 0)
    none = site_summary(results(tmp_path / "none", nan), {"organ": [1, 2], "lesion": 2}, 0)
    assert (some["dice"]["final"], one["dice"]["final"], none["dice"]["final"]) == (0.5, 0.25, None)
    study = make_study(("none", "one", "some"))
    summary = summarise(study, {"none": none, "one": one, "some": some}, 1.0)
    assert summary["mean_dice"]["final"] == 0.375
    shown = " ".join(text_of(result_table(summary)).split())
    assert "none: no foreground in its validation cases, and none predicted: it has no Dice" in shown
    assert "one: nowhere in its validation: lesion; its Dice is of the other classes" in shown
    assert "nan" not in shown


def test_what_was_not_done_is_null(tmp_path: Path) -> None:
    planned = site_summary(tmp_path / "none", LABELS, 0)
    trained = site_summary(results(tmp_path / "a", training_cases=4), LABELS, 0)
    assert planned["train_cases"] is None
    assert (trained["train_cases"], trained["val_cases"], trained["dice_per_class"]) == (4, None, None)
    summary = summarise(make_study(), {"a": planned, "b": trained}, 1.0)
    assert summary["mean_dice"] == {"final": None, "global": None}
    assert "mean" in text_of(result_table(summary))


def test_the_sites_tell_each_models_dice(tmp_path: Path) -> None:
    told = {"a": {"a": 0.75, "b": 0.25}, "b": {"b": 0.5}}
    sites = {
        name: site_summary(results(tmp_path / name, 0.5, cross_site={"evaluated_here": column}), LABELS, 0)
        for name, column in told.items()
    }
    summary = summarise(make_study(), sites, 1.0)
    assert summary["cross_site"] == {"a": {"a": 0.75}, "b": {"a": 0.25, "b": 0.5}}
    without = summarise(make_study(), {"a": site_summary(results(tmp_path / "c", 0.5), LABELS, 0)}, 1.0)
    assert without["cross_site"] is None


def found(small: int, large: int, dice: float) -> dict[str, Any]:
    """``lesions.json`` of a site whose lesions all have one Dice; nobody has an edge."""
    case = {
        "whole": CaseResult((Lesion(3.0, True, True, dice),) * small + (Lesion(30.0, False, False, dice),) * large, 1),
        "edge": CaseResult((), 0),
    }
    return {"small_lesions": {"whole": 12.34, "edge": None}, **aggregate([case]), "cases": {"one": {}}}


def test_results_by_lesion_size_are_pooled_over_the_lesions(tmp_path: Path) -> None:
    sites = {
        "a": site_summary(results(tmp_path / "a", 0.5, found(1, 0, 0.2)), LABELS, 0),
        "b": site_summary(results(tmp_path / "b", 0.5, found(3, 2, 0.6)), LABELS, 0),
        "c": site_summary(results(tmp_path / "c", 0.5, found(9, 9, 0.9)), LABELS, "all"),
        "d": site_summary(results(tmp_path / "d", 0.5), LABELS, 0),
    }
    assert sites["a"]["dice_small"] == {"whole": 0.2, "edge": None}
    assert sites["a"]["dice_large"] == {"whole": None, "edge": None}
    assert "cases" not in sites["a"]
    assert sites["d"]["dice_small"] is None
    summary = summarise(make_study("abcd"), sites, 1.0)
    assert summary["small_lesions"] == {"whole": 12.34, "edge": None}
    assert summary["lesions"]["whole"] == {"small": 4, "large": 2, "all": 6, "false_positives": 2}
    assert summary["dice_small"] == {"whole": pytest.approx(0.5), "edge": None}
    assert summary["dice_large"] == {"whole": pytest.approx(0.6), "edge": None}
    assert (summary["lesion_recall_small"]["whole"], summary["lesion_recall_large"]["whole"]) == (1.0, 0.0)
    table = lesion_table(summary)
    assert table is not None
    assert [list(column.cells)[-2:] for column in table.columns[:4]] == [
        [Text("all sites")] * 2,
        [Text("whole"), Text("edge")],
        ["12.3", "-"],
        ["4/2", "0/0"],
    ]
    shown = text_of(table)
    for part in ("By lesion size", "c *", "not in the mean", "9/9", "0.5000"):
        assert part in shown


def test_without_results_by_lesion_size_there_is_no_table(tmp_path: Path) -> None:
    summary = summarise(make_study("a"), {"a": site_summary(results(tmp_path / "a", 0.5), LABELS, 0)}, 1.0)
    assert lesion_table(summary) is None
    names = ("small_lesions", "lesions", "dice_small", "dice_large", "lesion_recall_small")
    assert [summary[name] for name in names] == [None] * len(names)


def test_personal_global_and_super_model_have_a_column_each(tmp_path: Path) -> None:
    folder = results(tmp_path / "a", 0.8)
    for model, dice in (("global", 0.5), ("super", 0.75)):
        results(folder / model, dice)
    site = site_summary(folder, LABELS, 0)
    assert site["dice"] == {"final": 0.8, "personal": 0.8, "global": 0.5, "super": 0.75}
    summary = summarise(make_study("a"), {"a": site}, 1.0)
    assert summary["mean_dice"] == site["dice"]
    shown = text_of(result_table(summary))
    for part in ("personal", "global", "super", "0.8000", "0.5000", "0.7500"):
        assert part in shown


# ------------------------------------------------------------------------------------------- the live table


def status(**progress: Any) -> dict[str, Any]:
    return {
        "study": make_study(name="[b]study", rounds=2).model_dump(mode="json"),
        "attempt": 3,
        "now": 1000.0,
        "sites": {
            "a": {"last_seen": 996.0, "standing": "active", "progress": progress or None},
            "b": {"last_seen": None, "standing": None, "progress": None},
        },
        "open": [
            {"run": "r", "key": "round-0001/model", "missing": ["b"], "closes_at": 2000.0},
            {"run": "r", "key": "round-0000/model", "missing": [], "closes_at": 2000.0},
        ],
    }


def test_table_shows_who_does_what_and_for_whom_the_others_wait() -> None:
    shown = text_of(watch.status_table(status(phase="training", round=2, rounds=2, loss=-0.5, dice=0.25)))
    for part in (
        "[b]study: fedavg, attempt 3",
        "training",
        "2/2",
        "-0.5000",
        "0.2500",
        "4 s ago",
        "not here yet",
        "round-0001/model waits for b until",
        "round-0000/model is complete",
    ):
        assert part in shown


def test_without_a_terminal_each_change_is_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "SECONDS", 0)
    seen = [
        status(),
        status(phase="planning", rounds=2),
        status(phase="training", round=1, loss=1.0),
        status(phase="training", round=1, loss=0.5),
        status(phase="training", round=2, loss=0.25),
    ]
    left = iter(seen)
    answers = iter([True] * 4 + [False])
    with caplog.at_level(logging.INFO):
        watch.watch(lambda: next(left), lambda: next(answers), quiet())
    assert [record.getMessage() for record in caplog.records] == [
        "a: planning",
        "a: training, round 1 of 2, loss 1.0000",
        "a: training, round 2 of 2, loss 0.2500",
    ]


def test_on_a_terminal_there_is_a_live_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SECONDS", 0)
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    answers = iter([True, False])
    watch.watch(lambda: status(phase="training"), lambda: next(answers), console)
    assert isinstance(console.file, io.StringIO)
    assert "training" in console.file.getvalue()


# ------------------------------------------------------------------------------------------- processes

NAME = "import os, pathlib; site = pathlib.Path(os.environ['nnUNet_fed_site']).parent; "
CHILD = (
    "import subprocess, sys, time; "
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)']); "
    "(site / 'pids').write_text(f'{os.getpid()} {child.pid}'); "
)
BOTH_STARTED = "[time.sleep(0.05) for _ in iter(lambda: len(list(site.parent.glob('*/pids'))) < 2, False)]; "


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(watch, "SECONDS", 0.1)

    def set_commands(planning: str, training: str = "") -> None:
        monkeypatch.setattr(simulate, "planning_command", lambda *_: [sys.executable, "-c", NAME + planning])
        monkeypatch.setattr(simulate, "training_command", lambda *_: [sys.executable, "-c", NAME + training])

    return set_commands


def is_gone(pid: str) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True).stdout.strip()
    return state in ("", "Z") or state.startswith("Z")


def assert_nothing_is_left(out: Path) -> None:
    pids = [pid for file in out.glob("sites/*/pids") for pid in file.read_text().split()]
    assert len(pids) >= 2
    deadline = time.monotonic() + 5
    while not all(map(is_gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(is_gone, pids))
    served = subprocess.run(["ps", "-ax", "-o", "args="], capture_output=True, text=True, check=True).stdout
    assert str(out / "coordinator") not in served


def test_a_whole_simulation(tmp_path: Path, commands: Callable[..., None]) -> None:
    record = {"training_cases": 4, "bytes_sent": 1, "bytes_received": 2}
    (tmp_path / "record.json").write_text(json.dumps(record))
    commands(
        "print('planned', os.environ.get('nnUNet_n_proc_DA'))",
        "raw = next((site / 'nnUNet_raw').iterdir()); fold = 'fold_all' if site.name == 'c' else 'fold_0'; "
        f"out = site / 'nnUNet_results' / raw.name / '{MODEL}' / fold; out.mkdir(parents=True); "
        f"(out / 'federation.json').write_text(pathlib.Path({str(tmp_path / 'record.json')!r}).read_text())",
    )
    given = simulation(tmp_path, {"b": 5, "a": 6, "c": 4})
    summary = simulate.simulate(given, quiet())
    assert list(summary["sites"]) == ["a", "b", "c"]
    assert summary["sites"]["c"]["fold"] == "all"
    assert all(site["train_cases"] == 4 and site["bytes_received"] == 2 for site in summary["sites"].values())
    assert json.loads((given.out / "summary.json").read_text()) == summary
    assert set(json.loads((given.out / "record.json").read_text())) >= {"runs", "events", "study"}
    assert Federation.read(given.out / "federation.toml").plans_name == "nnUNetFedSmallPlans"
    assert (given.out / "sites" / "a" / "plan.log").read_text().startswith("planned")


VALIDATED = """
place = site / 'nnUNet_results' / next((site / 'nnUNet_raw').iterdir()).name / MODEL / f'fold_{FOLD}'
(place / 'validation').mkdir(parents=True)
with (site / 'order').open('a') as file:
    file.write(f'{FOLD} ')
cases = [{'metrics': {'0': {'Dice': 1.0}, '1': {'Dice': dice}}} for dice in ([0.5] if FOLD == 0 else [0.8, 0.8])]
content = {'metric_per_case': cases, 'mean': {'1': {'Dice': 9.0}}, 'foreground_mean': {'Dice': 9.0}}
(place / 'validation' / 'summary.json').write_text(json.dumps(content))
record = {'training_cases': 4, 'bytes_sent': 1, 'bytes_received': 2}
(place / 'federation.json').write_text(json.dumps(record))
"""


def test_several_folds_one_after_the_other(
    tmp_path: Path, commands: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site with too few cases for folds trains each fold on all of them, and counts in no mean."""
    commands("")

    def training(study: Federation, fold: int, device: str, dataset: int) -> list[str]:
        return [sys.executable, "-c", f"import json; FOLD, MODEL = {fold}, {MODEL!r}; {NAME}\n{VALIDATED}"]

    monkeypatch.setattr(simulate, "training_command", training)
    given = simulation(tmp_path, {"a": 6, "c": 4}, folds=[0, 1])
    summary = simulate.simulate(given, quiet())
    for name, fold in (("a", [0, 1]), ("c", "all")):
        folder, site = given.out / "sites" / name, summary["sites"][name]
        assert (folder / "order").read_text() == "0 1 "
        assert (folder / "train_0.log").is_file()
        assert Site.read(folder / "site.toml").fold == (None if name == "a" else "all")
        assert (site["fold"], site["train_cases"], site["val_cases"], site["bytes_received"]) == (fold, 4, 3, 4)
        assert site["dice"]["final"] == pytest.approx(0.7), "of the cases, not of the folds"
        assert list(site["folds"]) == ["0", "1"]
        assert site["folds"]["1"]["val_cases"] == 2
    assert summary["folds"] == [0, 1]
    assert summary["mean_dice"]["final"] == pytest.approx(0.7)
    shown = text_of(result_table(summary))
    assert "folds 0, 1" in shown
    assert "c *" in shown


def test_results_of_a_mapped_site_are_in_the_words_of_the_federation(
    tmp_path: Path, commands: Callable[..., None]
) -> None:
    by_class = {"1": {"Dice": 0.5}, "2": {"Dice": 0.25}}
    content = {"foreground_mean": {"Dice": 0.375}, "mean": by_class, "metric_per_case": [{}]}
    for number, dataset in enumerate(("Dataset001_a", "Dataset002_a_mapped"), start=1):
        folder = results(tmp_path / "results" / dataset, training_cases=number)
        (folder / "validation" / "summary.json").write_text(json.dumps(content))
    commands(
        "pass",
        "import shutil; out = site / 'nnUNet_results'; "
        f"[shutil.copytree(found, out / found.name / '{MODEL}' / 'fold_0') "
        f"for found in pathlib.Path({str(tmp_path / 'results')!r}).iterdir()]",
    )
    given = with_maps(simulation(tmp_path, {"a": 5}), a={"lesion": ("tumour",), "edge": ("cyst",)})
    site = simulate.simulate(given, quiet())["sites"]["a"]
    assert site["train_cases"] == 2
    assert site["dice_per_class"] == {"lesion": 0.5, "edge": 0.25}


def test_a_failing_site_ends_all_and_is_shown_with_its_sentence(tmp_path: Path, commands: Callable[..., None]) -> None:
    commands(
        "pass",
        CHILD
        + BOTH_STARTED
        + "site.name == 'b' and sys.exit('noise\\nError: The scanner is on fire.\\n\\nPut it out.');"
        "time.sleep(300)",
    )
    given = simulation(tmp_path, {"a": 5, "b": 5})
    started = time.monotonic()
    with pytest.raises(FederationError) as caught:
        simulate.simulate(given, quiet())
    log = given.out.resolve() / "sites" / "b" / "train.log"
    assert str(caught.value) == (f"Training failed at site b. The scanner is on fire.\n\nPut it out.\n(log: {log})")
    assert_nothing_is_left(given.out.resolve())
    assert time.monotonic() - started < 30
    assert not (given.out / "summary.json").exists()


def test_the_same_sentence_of_several_sites_is_shown_once(tmp_path: Path) -> None:
    workers = []
    for name, words in (("a", "Error: we differ"), ("b", "Error: we differ"), ("c", "killed")):
        code = f"import sys; sys.exit({words!r})"
        worker = processes.Worker(
            name, [processes.Step("Planning", [sys.executable, "-c", code], {}, tmp_path / f"{name}.log")]
        )
        worker.advance()
        workers.append(worker)
    while not all(worker.failed() for worker in workers):
        time.sleep(0.02)
    os.utime(tmp_path / "c.log", (later := time.time() + 60, later))
    with pytest.raises(FederationError, match=r"^Planning failed at the sites a, b. we differ\n\(log: .*[ab].log\)$"):
        processes.raise_first(workers)
    with pytest.raises(FederationError, match=r"site c. It ended with the exit status 1. The end of its log:\nkilled"):
        processes.raise_first(workers[2:])
    processes.raise_first([])
    processes.stop_workers(workers)


def test_without_a_sentence_the_end_of_the_log_is_shown(tmp_path: Path, commands: Callable[..., None]) -> None:
    commands("[print('line', i) for i in range(99)]; raise ValueError('bad')")
    with pytest.raises(FederationError, match="exit status 1") as caught:
        simulate.simulate(simulation(tmp_path, {"a": 5}, "plan"), quiet())
    assert "ValueError: bad" in str(caught.value)
    assert "line 50" not in str(caught.value)


def test_what_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.5)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(99)"
    process = processes.Process(processes.Step("x", [sys.executable, "-c", code], {}, tmp_path / "log"))
    while not (tmp_path / "log").read_text():
        time.sleep(0.02)
    processes.stop([process])
    assert process.exit_status() == -signal.SIGKILL


def test_sigterm_to_the_simulation_leaves_nothing(
    tmp_path: Path, commands: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands(CHILD + "time.sleep(300)")
    given = simulation(tmp_path, {"a": 5, "b": 5})

    def interrupted(poll: object, running: Callable[[], bool], console: object) -> None:
        while running() and len(list(given.out.glob("sites/*/pids"))) < 2:
            time.sleep(0.05)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(simulate, "watch", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        simulate.simulate(given, quiet())
    assert_nothing_is_left(given.out.resolve())
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_dead_coordinator_ends_all(
    tmp_path: Path, commands: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands(CHILD + "time.sleep(300)")
    given = simulation(tmp_path, {"a": 5, "b": 5})
    started: list[processes.Process] = []

    def process(step: processes.Step) -> processes.Process:
        started.append(processes.Process(step))
        return started[-1]

    def without_coordinator(poll: object, running: Callable[[], bool], console: object) -> None:
        while running() and len(list(given.out.glob("sites/*/pids"))) < 2:
            time.sleep(0.05)
        started[0].kill()
        running()

    monkeypatch.setattr(simulate, "Process", process)
    monkeypatch.setattr(simulate, "watch", without_coordinator)
    with pytest.raises(
        FederationError, match=r"The coordinator has ended. It ended with the exit status -9[^$]*coordinator.log"
    ):
        simulate.simulate(given, quiet())
    assert_nothing_is_left(given.out.resolve())


def test_a_coordinator_that_cannot_start_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = simulation(tmp_path, {"a": 5})
    monkeypatch.setattr(simulate, "to_toml", lambda _: "name = ")
    with pytest.raises(FederationError, match=r"The coordinator did not start. .*federation.toml is no valid TOML"):
        simulate.simulate(given, quiet())
