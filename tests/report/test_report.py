"""What the sections of a report say is what the files say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import DICE, SITES, amend, fold_of, make_comparison, make_run, record, study, write, write_images
from serving import Served, make_study, together

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.report.blocks import Figure, Paragraph, Section, Table, evenly, without_paths
from nnunet_fed.report.gather import read_source
from nnunet_fed.report.page import sections_of, write_report
from nnunet_fed.report.results_section import bootstrap_interval
from nnunet_fed.report.training_log import read_training_log


def sections(path: Path) -> dict[str, Section]:
    return {section.id: section for section in sections_of(read_source(path), path)}


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Section]:
    """Of a run as it was made."""
    return sections(make_run(tmp_path_factory.mktemp("simulated") / "run"))


def table(section: Section, caption: str) -> list[list[str]]:
    """Rows of the table whose caption begins so, the head first."""
    found = [block for block in section.blocks if isinstance(block, Table) and block.caption.startswith(caption)]
    assert len(found) == 1, [block.caption for block in section.blocks if isinstance(block, Table)]
    return [list(found[0].head), *map(list, found[0].rows)]


def figures(section: Section) -> list[Figure]:
    return [block for block in section.blocks if isinstance(block, Figure)]


def texts(section: Section) -> list[str]:
    return [block.text for block in section.blocks if isinstance(block, Paragraph)]


def told(found: Iterable[Figure]) -> str:
    return " ".join(figure.alternative for figure in found)


def test_sections_of_a_simulation(simulated: dict[str, Section]) -> None:
    assert list(simulated) == ["study", "data", "dice", "training", "traffic", "events"]
    assert ["initial_lr", "0.0123"] in table(simulated["study"], "Settings")
    assert ["nnunetv2", "2.8.1"] in table(simulated["study"], "Versions")


def test_the_start_from_pretrained_weights(tmp_path: Path) -> None:
    """As the study says, or a site's record where only the sites do."""
    digest, said = "0123456789abcdef" * 4, "The training started from pretrained weights with the digest {}."
    run = make_run(tmp_path / "run")
    amend(fold_of(run, SITES[0]) / "federation.json", pretrained=digest)
    assert said.format(digest) in texts(sections(run)["study"])
    write(tmp_path / "record.json", {**record(), "study": {**study(), "pretrained": digest}})
    assert said.format(digest) in texts(sections(tmp_path / "record.json")["study"])


def test_data_of_the_sites(simulated: dict[str, Section]) -> None:
    data = simulated["data"]
    times = "\N{MULTIPLICATION SIGN}"
    assert table(data, "Sites")[2] == [
        "site_b",
        "12",
        "3",
        f"2.5 {times} 1.35 {times} 1.25",
        f"30 {times} 40 {times} 41",
    ]
    assert table(data, "Harmonised fingerprint")[3][:3] == ["all sites", "0", "101.8"]
    assert table(data, "Plans")[1][3:6] == [f"24 {times} 32 {times} 32", "2", "5"]
    assert table(data, "Lesion volumes")[1] == ["lesion", "site_a", "3", "10", "15", "20", "25", "30"]
    assert "site_b: 14 values from 1.35 to 1.35" in told(figures(data))


def test_dice_with_intervals(simulated: dict[str, Section]) -> None:
    dice = simulated["dice"]
    rows = table(dice, "Dice by site")
    assert [row[2] for row in rows[1:]] == ["0.810", "0.520", "0.665"]
    low, high = bootstrap_interval({str(v): {"1": v} for v in DICE["site_a"]})
    assert rows[1][3] == f"{low:.3f} to {high:.3f}"
    assert table(dice, "By lesion size")[1][3:] == ["2 / 3", "0.333", "0.555", "0.500", "1.000", "1"]


def test_a_site_without_foreground_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    nothing = {"dice": {"final": None, "global": None}, "dice_per_class": {"lesion": None}}
    summary["sites"]["site_b"].update(nothing)
    summary["mean_dice"] = {"final": 0.81}
    write(run / "summary.json", summary)
    validation = fold_of(run, "site_b") / "validation" / "summary.json"
    cases = json.loads(validation.read_text())["metric_per_case"]
    for case in cases:
        case["metrics"]["1"]["Dice"] = float("nan")
    write(validation, {"metric_per_case": cases, "mean": {"1": {"Dice": float("nan")}}})
    log = next(fold_of(run, "site_b").glob("training_log_*.txt"))
    log.write_text(re.sub(r"Pseudo dice \[.*\]", "Pseudo dice [np.float32(nan)]", log.read_text()))
    found = sections(run)
    rows = table(found["dice"], "Dice by site")
    dash = "\N{EN DASH}"
    assert [[row[0], row[2]] for row in rows[1:]] == [
        ["site_a", "0.810"], ["site_b", dash], ["mean over sites", "0.810"],
    ]  # fmt: skip
    (block,) = [b for b in found["dice"].blocks if isinstance(b, Table) and b.caption.startswith("Dice by site")]
    assert "site_b: no foreground" in block.note
    assert table(found["training"], "Pseudo Dice")[0] == ["Round", "site_a"]
    write_report(run, tmp_path / "report.html")
    text = re.sub(r"base64,[^\"]*", "", (tmp_path / "report.html").read_text())
    assert not re.search(r"\bnan\b", text)


def test_bootstrap_is_of_the_mean_over_cases_then_classes() -> None:
    same = {str(number): {"1": 0.5, "2": 0.7} for number in range(5)}
    assert bootstrap_interval(same) == pytest.approx((0.6, 0.6))
    one_class_once = {**same, "5": {"1": 0.5, "2": 0.7, "3": float("nan")}}
    low, high = bootstrap_interval({name: {"3": float("nan"), **case} for name, case in one_class_once.items()})
    assert (low, high) == pytest.approx((0.6, 0.6)), "a class that is nowhere does not count"
    assert bootstrap_interval({"only": {"1": 0.5}}) == (None, None)
    spread = bootstrap_interval({str(number): {"1": number / 10} for number in range(10)})
    assert spread[0] is not None
    assert 0.2 < spread[0] < 0.45 < spread[1] < 0.7


def test_curves_and_rounds(simulated: dict[str, Section]) -> None:
    found = simulated
    rows = table(found["training"], "Pseudo Dice")
    assert rows[1:] == [["1", "0.300", "0.300"], ["2", "0.500", "0.500"], ["3", "0.700", "0.700"]]
    assert [figure.caption.split(",")[0] for figure in figures(found["training"])] == [
        "nnU-Net's training loss", "nnU-Net's validation loss", "nnU-Net's pseudo Dice",
    ]  # fmt: skip
    assert table(found["traffic"], "Traffic")[1] == ["site_a", "6.1 MB", "6.2 MB", "2.5 s", "0.5 s"]
    took_part = table(found["traffic"], "Who took part")
    assert took_part[2] == ["2", "11", "\N{EN DASH}", "7.0 s"]
    assert took_part[3] == ["3", "11", "12", "7.0 s"]
    assert "site_a from 0.25 to 0.25" in told(figures(found["traffic"]))


def test_cross_site_matrix(tmp_path: Path) -> None:
    crossed = {"site_a": {"site_a": 0.91, "site_b": 0.12}, "site_b": {"site_a": None, "site_b": 0.82}}
    section = sections(make_run(tmp_path / "run", cross_site=crossed))["cross-site"]
    assert table(section, "Dice")[1:] == [["site_a", "0.910", "0.120"], ["site_b", "\N{EN DASH}", "0.820"]]
    assert "rows are model of, columns are evaluated at" in told(figures(section))


def test_diagnostics_of_fedgs(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"name": "fedgs", "strength": 2.5})
    for number, site in enumerate(SITES):
        path = fold_of(run, site) / "federation.json"
        rounds = json.loads(path.read_text())["rounds"]
        for entry in rounds:
            entry["diagnostics"] = {"mean_factor": 1.5 + number, "scaled_share": 0.25}
        amend(path, rounds=rounds)
    method = sections(run)["method"]
    assert table(method, "The method's figures")[2] == ["1", "site_b", "2.5", "0.25"]
    assert "mean_factor by round: site_a from 1.5 to 1.5; site_b from 2.5" in told(figures(method))
    assert "all sites from 0.25" in told(figures(method)), "what is the same everywhere is one line"


def test_selector_of_fedsm(tmp_path: Path) -> None:
    selector = {"accuracy": 0.75, "confusion": [[5, 1], [2, 4]], "share_routed_to_global": 0.25, "trusted": False}
    run = make_run(tmp_path / "run", {"name": "fedsm"}, selector=selector)
    amend(fold_of(run, "site_b") / "federation.json", super_model_choices={"global": 2, "site_b": 1})
    method = sections(run)["method"]
    assert table(method, "Confusion")[1:] == [["site_a", "5", "1"], ["site_b", "2", "4"]]
    assert table(method, "Routing") == [["Site", "global", "site_b"], ["site_b", "2", "1"]]
    assert any("too few: the super model is the global one" in getattr(block, "text", "") for block in method.blocks)


def test_what_version_0_1_told_in_its_log_only_is_not_read_from_there(tmp_path: Path) -> None:
    selector = {"accuracy": 0.75, "confusion": [[5, 1], [2, 4]], "share_routed_to_global": 0.25, "trusted": True}
    run = make_run(tmp_path / "run", {"name": "fedsm"}, selector=selector)
    log = next(fold_of(run, "site_b").glob("training_log*"))
    said = "Models that the super model chooses for the validation cases: global: 2, site_b: 1"
    log.write_text(log.read_text() + f"\n2026-01-01 10:00:09.000000: {said} \n")
    found = sections(run)
    captions = [block.caption for block in found["method"].blocks if isinstance(block, Table)]
    assert any(caption.startswith("Confusion") for caption in captions)
    assert not any(caption.startswith("Routing") for caption in captions)


def test_exchange_graph_of_gcml(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"name": "gcml"})
    phase = {
        "from": "site_b", "counter": 1, "epoch": 1, "bytes": 9, "began": 1, "ended": 2, "plan": "p", "kept": "merged",
        "scores": {"local": 0.4567},
    }  # fmt: skip
    moved = [
        {"at": "t", "event": event, "peer": "site_b", "bytes": size}
        for event, size in (("received", 9), ("received", 9), ("sent", 3_000_000), ("missed", None))
    ]
    amend(fold_of(run, "site_a") / "federation.json", mutual_phases=[phase], transfers=moved)
    method = sections(run)["method"]
    assert table(method, "Who received")[1:] == [["site_b", "site_a", "2", "1"]]
    assert table(method, "Transfers")[1] == ["site_a", "1", "2", "0", "0", "1", "3.0 MB"]
    assert table(method, "Mutual phases")[1] == ["site_a", "site_b", "1", "2", "merged", "local 0.457"]
    assert "site_b to site_a: 1" in told(figures(method))


def test_both_phases_of_fedoap(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"name": "fedoap", "finetune_epochs": 1})
    summary = json.loads((run / "summary.json").read_text())
    for site in summary["sites"].values():
        site["dice"] = {"final": 0.75, "personal": 0.75, "federated": 0.5}
    amend(run / "summary.json", sites=summary["sites"], mean_dice={"personal": 0.75, "federated": 0.5})
    settings = {
        **record({"name": "fedoap", "finetune_epochs": 1}),
        "study": study({"name": "fedoap", "finetune_epochs": 1}),
    }
    amend(run / "record.json", study={**settings["study"], "rounds": 2})  # so that the third epoch is fine-tuning
    found = sections(run)
    assert table(found["method"], "Dice in both")[1] == ["site_a", "0.500", "0.750", "0.250"]
    assert all("Shaded: fine-tuning" in figure.caption for figure in figures(found["training"]))


def test_images_of_worst_median_and_best(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_images(run)
    shown = figures(sections(run)["images"])
    assert [figure.caption for figure in shown] == [
        "Worst case: case_2 of site_a, Dice 0.710.", "Median case: case_1 of site_a, Dice 0.810.",
        "Best case: case_0 of site_a, Dice 0.910.",
    ]  # fmt: skip
    assert all("Slice 4 of 6" in figure.alternative for figure in shown), "where the reference is"


def test_images_of_other_shapes_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import SimpleITK

    run = make_run(tmp_path / "run")
    write_images(run)
    other = SimpleITK.GetImageFromArray(np.zeros((5, 40, 44), np.uint8))
    SimpleITK.WriteImage(other, str(fold_of(run, "site_a") / "validation" / "case_0.nii.gz"))
    assert [figure.caption.split()[0] for figure in figures(sections(run)["images"])] == ["Worst", "Median"]
    assert "case_0 at site_a are not shown, since their shapes differ" in caplog.text


def test_a_comparison(tmp_path: Path) -> None:
    found = sections(make_comparison(tmp_path / "compared"))
    dice = found["dice"]
    assert ["site_b", "fedavg", "0.610", "0.500 to 0.700", "0.017"] in table(dice, "Dice by site")
    assert ["overall", "local", "0.505", "0.400 to 0.600", "0.010"] in table(dice, "Dice by site")
    expected = ["fedavg", "site_a", "0.605", "0.600", "0.012", "0.80", "12.3 MB", "10.0 min"]
    assert table(dice, "Methods")[2] == expected
    minus = "\N{MINUS SIGN}"
    difference = [f"local {minus} fedavg", f"{minus}0.102", f"{minus}0.151 to {minus}0.053"]
    assert table(dice, "Differences")[1] == difference
    assert table(dice, "By class")[1][2:] == ["2", "0.611", "4.250", "0.722", "\N{EN DASH}", "0.633"]
    assert {"training-local-3", "training-fedavg-3", "traffic-fedavg-3"} <= set(found)
    assert ["torch", "9.8.7"] in table(found["study"], "Versions")
    settings = dict(table(found["study"], "Settings")[1:])
    assert settings["options"] == "fedavg: finetune_epochs: 1"
    assert "labels" not in settings, "it was not set"


def test_a_comparison_that_begins_with_pooled_training_tells_each_site_s_cases(tmp_path: Path) -> None:
    folder = make_comparison(tmp_path / "compared")
    pooled, planned = folder / "runs" / "local-3", folder / "planned"
    shutil.copytree(folder / "runs" / "fedavg-3", planned)
    sites = json.loads((planned / "summary.json").read_text())["sites"]
    amend(pooled / "summary.json", sites={"pooled": sites["site_a"]})
    amend(
        planned / "summary.json",
        sites={site: {**figures, "train_cases": None, "val_cases": None} for site, figures in sites.items()},
    )
    shutil.rmtree(pooled / "sites" / "site_b")
    (pooled / "sites" / "site_a").rename(pooled / "sites" / "pooled")
    rows = table(sections(folder)["data"], "Sites")[1:]
    assert [row[:3] for row in rows] == [["site_a", "11", "3"], ["site_b", "12", "3"]]


def test_a_run_without_exchanges_has_no_figure_of_its_traffic(tmp_path: Path) -> None:
    def captions(folder: Path) -> list[str]:
        return [figure.caption for figure in figures(sections(folder)["traffic"])]

    folder, shown = make_run(tmp_path / "run"), "What each site sent and received in the training."
    assert shown in captions(folder)
    summary = json.loads((folder / "summary.json").read_text())
    for site in summary["sites"].values():
        site.update(bytes_sent=0, bytes_received=0)
    write(folder / "summary.json", summary)
    assert shown not in captions(folder)


def test_a_comparison_without_its_runs_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_comparison(tmp_path / "compared")
    (folder / "runs" / "local-3").rename(tmp_path / "elsewhere")
    assert "training-local-3" not in sections(folder)
    assert "local-3 is not there" in caplog.text


def test_a_record_alone(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write(path, record())
    found = sections(path)
    assert list(found) == ["study", "data", "training", "traffic", "events"]
    assert table(found["training"], "What the sites")[1] == ["site_a", "done", "3", f"{chr(0x2212)}0.777", "0.888"]
    assert [row[1] for row in table(found["data"], "Sites")[1:]] == ["11", "12"], "the weights are numbers of cases"
    assert table(found["traffic"], "Traffic")[1][1] == "6.0 MB"


def test_state_of_a_coordinator(tmp_path: Path) -> None:
    with ExitStack() as stack:
        served = Served(make_study(), tmp_path / "state", stack)
        seats = [served.seat(site) for site in ("a", "b")]
        weights = {"w": np.ones(3, np.float32)}
        together(*(lambda seat=seat: seat.mean("round-0000/model", weights, 2.0) for seat in seats))
        with pytest.raises(ConfigurationError, match=r"cannot be opened.*status --json > record.json"):
            read_source(tmp_path / "state")
        live = served.coordinator.status(record=True)
        served.stop()
        stopped = read_source(tmp_path / "state").record  # type: ignore[union-attr]
    assert stopped["runs"]
    for key in ("study", "digest", "attempt", "runs", "events"):
        assert stopped[key] == json.loads(json.dumps(live[key])), key


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, None, "holds no run. Name the --out folder"),
        ("summary.json", "{", "summary.json cannot be read as JSON"),
        ("summary.json", {"sites": 3}, "summary.json names no sites"),
        ("summary.json", [], "should hold a JSON object"),
        ("compare.json", {"methods": {}}, "has no methods"),
    ],
)
def test_a_folder_that_is_no_run(tmp_path: Path, name: str | None, content: Any, message: str) -> None:
    if name is not None:
        write(tmp_path / name, content)
    with pytest.raises(ConfigurationError, match=message):
        read_source(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"), [({"a": 1}, "is no record"), ({"study": {}, "sites": {}}, "is only a status")]
)
def test_a_file_that_is_no_record(tmp_path: Path, content: Any, message: str) -> None:
    write(tmp_path / "file.json", content)
    with pytest.raises(ConfigurationError, match=message):
        read_source(tmp_path / "file.json")


def test_nothing_there() -> None:
    with pytest.raises(ConfigurationError, match="nowhere does not exist"):
        read_source(Path("nowhere"))


def test_without_summary_the_rest_is_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(tmp_path / "run")
    (run / "summary.json").unlink()
    assert "dice" not in sections(run)
    assert "has no summary.json" in caplog.text


def test_names_and_texts_are_escaped_and_paths_left_out(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>$x$"
    run = make_run(tmp_path / "run", sites=("site_a", "site_b"))
    summary = json.loads((run / "summary.json").read_text())
    summary["sites"] = {hostile: summary["sites"]["site_a"], "site_b": summary["sites"]["site_b"]}
    amend(run / "summary.json", sites=summary["sites"])
    events = [{"at": 1.0, "run": None, "site": "site_a", "text": '<img src=x onerror="alert(1)">'}]
    amend(run / "record.json", events=record()["events"] + events)
    write_report(run, tmp_path / "out" / "r.html")
    page = (tmp_path / "out" / "r.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;$x$" in page
    assert "secret" not in page
    assert "\N{HORIZONTAL ELLIPSIS}/train.log now" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_without_paths() -> None:
    dots = "\N{HORIZONTAL ELLIPSIS}"
    assert without_paths("log: /home/me/run 1/x.log.") == f"log: {dots}/run 1/x.log."
    assert without_paths(r"C:\Users\me\x.log") == f"{dots}/x.log"
    assert without_paths("round-0001/model and 3/4 of a/b/c") == "round-0001/model and 3/4 of a/b/c"


def test_a_continued_training_has_several_logs() -> None:
    def text(*said: str) -> str:
        return "\n".join(f"2026-01-01 10:00:00.5: {line}" for line in said)

    first = text("train_loss 9", "Epoch 0", "train_loss -0.5", "Epoch 1", "train_loss 0.25", "Pseudo dice [nan, 0.5]")
    log = read_training_log([first, text("Epoch 1", "train_loss nan", "Pseudo dice [np.float64(1e-05), 0.1]")])
    assert log.train_loss == {0: -0.5, 1: 0.25}
    assert log.dice == {1: pytest.approx(0.050005)}


def test_evenly() -> None:
    assert evenly(range(5), 5) == [0, 1, 2, 3, 4]
    chosen = evenly(range(1000), 20)
    assert (len(chosen), chosen[0], chosen[-1]) == (20, 0, 999)


def test_neither_torch_nor_grpc_is_imported(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    code = (
        "import sys; from pathlib import Path; from nnunet_fed.report.page import write_report; "
        f"write_report(Path({str(run)!r}), Path({str(tmp_path / 'r.html')!r})); "
        "print([name for name in ('torch', 'grpc', 'nnunetv2') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
