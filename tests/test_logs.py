"""What is logged: nobody else's words move a terminal, and nobody else decides how long a file becomes."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nnunet_fed import logs
from nnunet_fed.coordinator.watch import status_table, watch
from nnunet_fed.exchange import outgoing_log
from nnunet_fed.exchange.outgoing_log import OutgoingLog
from nnunet_fed.gossip import mailbox as mailbox_module
from nnunet_fed.gossip.mailbox import Mailbox
from nnunet_fed.logs import PlainLines, printable

FORGED = "phase\n2030-01-01 00:00:00 INFO all is well\x1b[2J\u202e\x9b31m"


def test_a_message_is_one_line_without_codes() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "site %s: %s", ("a", FORGED), None)
    line = PlainLines().format(record)
    assert len(line.splitlines()) == 1
    assert line.isprintable()
    assert "\\x1b[2J" in line
    assert printable("Zürich, 100 %") == "Zürich, 100 %"


@pytest.mark.parametrize(
    "progress",
    [
        {"phase": FORGED, "round": FORGED, "loss": "x", "dice": [1]},
        {"phase": "[/red][bold]", "round": {}, "loss": 10**400, "dice": True},
        {"phase": 7, "round": None, "loss": float("nan")},
    ],
)
def test_a_malformed_report_does_not_end_the_status(progress: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """A loss that was a text, or a phase that looked like rich's markup, ended it in a traceback."""
    site = {"last_seen": 1.0, "standing": "active", "progress": progress}
    status = {
        "study": {"name": "s", "method": {"name": "fedavg"}, "rounds": 2}, "attempt": 1, "now": 2.0,
        "sites": {"a": site}, "open": [],
    }  # fmt: skip
    text = io.StringIO()
    Console(file=text, width=200).print(status_table(status))
    assert "\x1b" not in text.getvalue()
    assert "\u202e" not in text.getvalue()
    caplog.set_level(logging.INFO)
    watch(lambda: status, lambda: False, Console(file=io.StringIO()))
    assert "a: " in caplog.text


def test_what_repeats_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that was dead in lockstep cost 290 MB of history a day; one that called again and again, as much."""
    mailbox, seconds = Mailbox(tmp_path), iter(range(10**9))
    monkeypatch.setattr(logs.time, "monotonic", lambda: 0.2 * next(seconds))
    for number in range(5 * 60 * 60):  # an hour
        mailbox.note_event(event="missed", peer="b", site="a", counter=number, bytes=0, seconds=0.1, reason=f"{number}")
    entries = mailbox.history()
    assert 50 <= len(entries) <= 61
    assert sum(1 + entry.get("repeated", 0) for entry in entries) >= 5 * 60 * 60 - 300
    for _ in range(3):
        mailbox.note_event(event="sent", peer="b", bytes=7)
    assert sum(entry["bytes"] for entry in mailbox.history()) == 21


def test_files_are_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox_module, "LARGEST_HISTORY", 1000)
    monkeypatch.setattr(outgoing_log, "LARGEST_FILE", 1000)
    mailbox, outgoing = Mailbox(tmp_path), OutgoingLog(tmp_path / "outgoing.jsonl")
    for number in range(500):
        mailbox.note_event(event="sent", peer="b", counter=number, bytes=1)
        outgoing({"to": "b", "what": "upload", "number": number})
    sizes = {path.name: path.stat().st_size for path in tmp_path.glob("*.jsonl*")}
    assert len(sizes) == 2 + 1 + outgoing_log.KEPT_FILES
    assert max(sizes.values()) < 1200
    assert mailbox.history()[-1]["counter"] == 499
    assert [entry["counter"] for entry in mailbox.history()] == list(range(500 - len(mailbox.history()), 500))


def test_answers_that_a_peer_asks_for_again_and_again_are_counted(tmp_path: Path) -> None:
    outgoing = OutgoingLog(tmp_path / "outgoing.jsonl")
    for number in range(1000):
        outgoing({"to": "b", "what": "upload", "digest": "d", "from_byte": number}, repeats=True)
    outgoing({"to": "b", "what": "offer"})
    first, second = map(json.loads, (tmp_path / "outgoing.jsonl").read_text().splitlines())
    assert (first["from_byte"], second["what"]) == (0, "offer")
