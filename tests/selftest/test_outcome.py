from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from nnunet_fed.selftest import outcome
from nnunet_fed.selftest.outcome import PLAIN, Row, cells, exit_status, private_texts, report, verdict

PASSED = [
    Row("data and planning", 3.0),
    Row(PLAIN, 5.0, None, True, True, 0.1, 200_000_000),
    Row("fedavg", 6.4, None, True, True, 0.125, 210_000_000),
]
FAILED = Row("gcml", 7.0, "site_a has ended in /home/somebody/out.\n(log: /home/somebody/out/train.log)")


def test_figures_stand_beside_plain_nnunet() -> None:
    planning, plain, fedavg, failed = cells([*PASSED, FAILED])
    assert planning == ["data and planning", "passed", "", "", "", "", "", "", "3"]
    assert plain == [PLAIN, "passed", "yes", "yes", "100", "1.00", "200", "1.00", "5"]
    assert fedavg == ["fedavg", "passed", "yes", "yes", "125", "1.25", "210", "1.05", "6"]
    assert failed == ["gcml", "failed", "", "", "", "", "", "", "7"]
    assert cells(PASSED[2:])[0][5] == "", "nothing to compare with"


def test_verdict_and_exit_status() -> None:
    assert verdict(PASSED, "cuda") == "All 3 parts passed on cuda."
    assert exit_status(PASSED) == 0
    assert verdict([*PASSED, FAILED], "cpu") == "1 of 4 parts failed on cpu: gcml."
    assert exit_status([*PASSED, FAILED]) == 1


def test_table_of_the_terminal() -> None:
    console = Console(width=160)
    with console.capture() as shown:
        console.print(outcome.table([*PASSED, FAILED]))
    assert "fedavg" in shown.get()
    assert "failed" in shown.get()


def test_text_for_a_report_names_neither_machine_nor_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.node", lambda: "ward-seven")
    monkeypatch.setattr("getpass.getuser", lambda: "somebody")
    words = f"somebody's {tmp_path}/x on ward-seven: {Path.home()}/y"
    facts = outcome.machine("cpu")
    text = report([*PASSED, Row("fedsm", 1.0, words)], "cpu", facts, private_texts(tmp_path))
    assert "...'s .../x on ...: .../y" in text
    assert "| fedavg | passed | yes | yes | 125 | 1.25 | 210 | 1.05 | 6 |" in text
    assert "torch " in text
    for hidden in (str(tmp_path), "somebody", "ward-seven"):
        assert hidden not in text
