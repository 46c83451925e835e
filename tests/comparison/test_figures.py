"""What a comparison says, out of rows that are known; and its tables and files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from nnunet_fed.comparison.figures import figures
from nnunet_fed.comparison.tables import markdown, tables
from nnunet_fed.evaluation.case_scores import COLUMNS, CaseScore, write_csv

SETTINGS = {
    "sites": {"a": "/a", "b": "/b"},
    "study": {"rounds": 3, "iterations_per_epoch": 5, "fold": 0, "configuration": "3d_fullres", "planner": "P"},
    "options": {"local": {}, "fedavg": {}},
}


def row(method: str, site: str, case: str, dice: float | None, seed: int = 0, **more: Any) -> CaseScore:
    given = {"hd95": None, "nsd": None, "small_dice": None, "large_dice": None, "label": "organ", **more}
    return CaseScore(method=method, seed=seed, site=site, case=case, dice=dice, **given)


def method_rows(method: str, gains: dict[str, float], seed: int = 0) -> list[CaseScore]:
    """Three cases at each of two sites, of which one is harder."""
    base = {"a": (0.5, 0.6, 0.7), "b": (0.2, 0.3, 0.4)}
    return [
        row(method, site, f"{site}{number}", dice + gains[site], seed)
        for site, of_site in base.items()
        for number, dice in enumerate(of_site)
    ]


def summary(seed: int = 0, seconds: float = 2.0) -> dict[str, Any]:
    site = {"bytes_sent": 10, "bytes_received": 20}
    return {"seed": seed, "seconds": seconds, "sites": {"a": site, "b": {**site, "bytes_sent": None}}}


def content(rows: list[CaseScore], **summaries: list[dict[str, Any]]) -> dict[str, Any]:
    return figures(SETTINGS, rows, summaries, 2.0, {}, resamples=300)


@pytest.fixture
def three() -> dict[str, Any]:
    rows = [
        *method_rows("local", {"a": 0.0, "b": 0.0}),
        *method_rows("pooled", {"a": 0.1, "b": 0.3}),
        *method_rows("fedavg", {"a": 0.1, "b": 0.2}, 0),
        *method_rows("fedavg", {"a": 0.05, "b": 0.25}, 1),
    ]
    return content(rows, local=[summary()], pooled=[summary()], fedavg=[summary(0, 2.0), summary(1, 4.0)])


def test_sites_and_overall(three: dict[str, Any]) -> None:
    fedavg = three["methods"]["fedavg"]
    assert fedavg["seeds"] == [0, 1]
    assert fedavg["dice"]["a"]["mean"] == pytest.approx(0.675)
    assert fedavg["dice"]["b"]["mean"] == pytest.approx(0.525)
    assert fedavg["dice"]["a"]["sd_seeds"] == pytest.approx(0.05 / 2**0.5)
    assert fedavg["overall"]["mean"] == pytest.approx(0.6)
    assert fedavg["overall"]["sd_seeds"] == pytest.approx(0.0)
    assert 0.425 <= fedavg["dice"]["b"]["low"] < 0.525 < fedavg["dice"]["b"]["high"] <= 0.625
    assert three["methods"]["local"]["overall"]["sd_seeds"] is None


def test_fairness_and_the_gap_that_is_closed(three: dict[str, Any]) -> None:
    local, pooled, fedavg = (three["methods"][name] for name in ("local", "pooled", "fedavg"))
    assert local["worst_site"] == {"site": "b", "mean": pytest.approx(0.3)}
    assert local["spread"] == pytest.approx(0.3)
    assert (local["gap_closed"], pooled["gap_closed"]) == (pytest.approx(0.0), pytest.approx(1.0))
    assert fedavg["gap_closed"] == pytest.approx(0.15 / 0.2)
    assert fedavg["gap_closed_by_site"] == {"a": pytest.approx(0.75), "b": pytest.approx(0.75)}


def test_no_share_of_a_gap_that_the_data_do_not_show() -> None:
    def pooled_rows(*gains: float) -> list[CaseScore]:
        return [row("pooled", "a", f"a{number}", 0.5 + gain) for number, gain in enumerate(gains)]

    local = [row("local", "a", f"a{number}", 0.5) for number in range(3)]
    both = {"local": [summary()], "pooled": [summary()]}
    unclear = content([*local, *pooled_rows(-0.2, 0.1, 0.3)], **both)
    assert unclear["methods"]["pooled"]["gap_closed"] is None
    clear = content([*local, *pooled_rows(0.1, 0.2, 0.3)], **both)
    assert clear["methods"]["pooled"]["gap_closed"] == pytest.approx(1.0)
    assert content(local, local=[summary()])["methods"]["local"]["gap_closed"] is None


def test_a_site_without_foreground_is_told_and_counts_nowhere() -> None:
    """No case of it has a value: it is neither the worst nor the best, and the others' figures are what they were."""
    both = [*method_rows("local", {"a": 0.0, "b": 0.0}), *method_rows("fedavg", {"a": 0.1, "b": 0.2})]
    empty = [row(method, "c", "c0", None) for method in ("local", "fedavg")]
    given = {"local": [summary()], "fedavg": [summary()]}
    without, found = content(both, **given), content([*both, *empty], **given)
    for method in given:
        assert found["methods"][method]["overall"] == without["methods"][method]["overall"]
        assert found["methods"][method]["worst_site"] == without["methods"][method]["worst_site"]
        assert found["methods"][method]["dice"]["c"] == {
            "mean": None, "low": None, "high": None, "sd_seeds": None, "cases": 0,
        }  # fmt: skip
    dice = next(iter(tables(found)))
    assert dice.head[3] == "c (0)"
    assert [of_method[3] for of_method in dice.rows] == ["-", "-"]
    assert "nan" not in markdown(found)
    nowhere = content(empty, **given)
    assert [table.rows[0][-1] for table in tables(nowhere)] == ["-", "2", "-", "-"]


def test_costs_are_means_over_seeds_and_controls_have_no_traffic(three: dict[str, Any]) -> None:
    assert three["methods"]["fedavg"]["bytes"] == 50
    assert three["methods"]["fedavg"]["seconds"] == 3.0
    assert three["methods"]["local"]["bytes"] is None
    assert three["methods"]["pooled"]["bytes"] is None


def test_differences_of_each_pair(three: dict[str, Any]) -> None:
    pairs = {(one["a"], one["b"]): one for one in three["differences"]}
    assert list(pairs) == [("local", "pooled"), ("local", "fedavg"), ("pooled", "fedavg")]
    found = pairs["local", "pooled"]
    # the gain is the same for all cases of a site: paired, nothing is uncertain
    assert [found[key] for key in ("mean", "low", "high")] == [pytest.approx(-0.2)] * 3
    assert found["sites"]["b"]["mean"] == pytest.approx(-0.3)
    assert found["hd95"] == {"mean": None, "low": None, "high": None}


def test_classes_of_a_case_are_averaged_where_they_are_defined() -> None:
    rows = [
        row("local", "a", "x", 0.4), row("local", "a", "x", 0.8, label="lesion", small_dice=0.2),
        row("local", "a", "y", 0.5), row("local", "a", "y", None, label="lesion"),
    ]  # fmt: skip
    found = content(rows, local=[summary()])["methods"]["local"]
    assert found["dice"]["a"]["mean"] == pytest.approx(0.55)
    assert found["small_dice"]["overall"]["mean"] == pytest.approx(0.2)
    assert found["small_dice"]["overall"]["low"] is None


def test_it_is_json_and_a_report_in_words(three: dict[str, Any]) -> None:
    json.dumps(three, allow_nan=False)
    told = markdown(three)
    assert "| Method | a (3) | b (3) | overall |" in told
    assert "| fedavg | 0.675 [" in told
    assert "75 %" in told
    assert "Nothing was set by hand" in told.replace("\n", " ")
    assert "15 steps in all" in told.replace("\n", " ")
    assert {len(row) for table in tables(three) for row in table.rows if table.title == "Dice"} == {4}
    changed = {**three, "settings": {**three["settings"], "options": {"fedavg": {"finetune_epochs": 1}}}}
    assert "Set by hand: `fedavg.finetune_epochs = 1`" in markdown(changed).replace("\n", " ")
    left = {**three, "settings": {**three["settings"], "left_out": {"c": "has 3 cases"}}}
    assert "Site c has 3 cases: it is left out." in markdown(left).replace("\n", " ")


def test_the_rows_are_a_file(tmp_path: Path) -> None:
    write_csv(tmp_path / "compare.csv", [row("fedavg", "a", "x", 0.25, seed=3, nsd=1.0)])
    text = (tmp_path / "compare.csv").read_text()
    assert text.splitlines()[0] == "method,seed,site,case,class,dice,hd95,nsd,small_dice,large_dice"
    [found] = csv.DictReader(text.splitlines())
    assert tuple(found.values()) == ("fedavg", "3", "a", "x", "organ", "0.25", "", "1.0", "", "")
    assert tuple(found) == COLUMNS
