"""What a look at a data set has found: a finding for each fault, as a table, as sentences, as JSON. Source: ours."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nnunet_fed.errors import ConfigurationError

FILE = "data_check.json"
"""In the data set's folder in ``nnUNet_preprocessed``: all findings, and what was read of each file."""
SHOWN = 5
"""Of findings of one kind, so many are shown one by one; the JSON has all of them."""


WIDTH = 180
"""Columns of a table in a log file."""


class Severity(str, Enum):
    """Whether planning stops because of a finding."""

    error = "error"
    warning = "warning"


@dataclass(frozen=True)
class Finding:
    """One fault, or one thing that is worth knowing."""

    severity: Severity
    kind: str
    """A few words that all findings of the same sort share."""
    found: str
    wanted: str
    remedy: str
    case: str = ""
    file: str = ""
    """Relative to the data set's folder, if it lies there."""

    @property
    def place(self) -> str:
        """Case and file, as far as there are."""
        return ", ".join(part for part in (f"case {self.case}" if self.case else "", self.file) if part)

    @property
    def sentence(self) -> str:
        """All but the remedy, in one line."""
        wanted = f"; wanted: {self.wanted}" if self.wanted else ""
        return f"{self.severity.value}, {self.kind}: {self.place}{': ' if self.place else ''}{self.found}{wanted}."


@dataclass(frozen=True)
class Report:
    """All that a look at one data set has found."""

    name: str
    """Of the data set, or of its site."""
    folder: Path
    findings: tuple[Finding, ...]
    cases: int
    """Training cases."""
    dimensions: int = 3
    """2 if most cases have one slice, as nnU-Net's planner decides it."""

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings that stop planning."""
        return tuple(finding for finding in self.findings if finding.severity is Severity.error)

    @property
    def summary(self) -> str:
        """How many there are."""
        errors, others = len(self.errors), len(self.findings) - len(self.errors)
        return f"{self.cases} cases, {counted(errors, 'error')}, {counted(others, 'warning')}"

    def table(self) -> Table:
        """For a terminal; of many findings of a kind only the first ones."""
        table = Table(title=f"Data of {self.name}: {self.summary}", show_lines=True)
        for column in ("", "case", "file", "found", "wanted", "what to do"):
            table.add_column(column, overflow="fold")
        for group in _groups(self.findings):
            for finding in group[:SHOWN]:
                style = "red" if finding.severity is Severity.error else "yellow"
                texts = (finding.case, finding.file, f"{finding.kind}: {finding.found}", finding.wanted, finding.remedy)
                table.add_row(Text(finding.severity.value, style), *map(Text, texts))
            if len(group) > SHOWN:
                more = f"{group[0].kind}: {len(group) - SHOWN} more"
                table.add_row(group[0].severity.value, _cases(group[SHOWN:]), "", more, "", "as above")
        return table

    def text(self) -> str:
        """The table in plain text, and all errors as sentences."""
        console = Console(file=StringIO(), width=WIDTH)
        with console.capture() as capture:
            self.show(console)
        return capture.get() + self.sentences() + "\n"

    def show(self, console: Console) -> None:
        """Print the table, if there is anything in it."""
        if self.findings:
            console.print(self.table())

    def to_json(self) -> dict[str, Any]:
        """Everything, in JSON's types."""
        return {
            "name": self.name,
            "folder": str(self.folder),
            "cases": self.cases,
            "findings": [{**asdict(finding), "severity": finding.severity.value} for finding in self.findings],
        }

    def sentences(self) -> str:
        """All errors, one a line, with what to do about each kind."""
        lines = []
        for group in _groups(self.errors):
            lines += [finding.sentence for finding in group[:SHOWN]]
            if len(group) > SHOWN:
                lines.append(f"error, {group[0].kind}: and so in {len(group) - SHOWN} more: {_cases(group[SHOWN:])}.")
            lines.append(f"  -> {group[0].remedy}")
        return "\n".join(lines)


def error_console() -> Console:
    """Standard error; where nobody has said how wide that is, such as a log file, wide enough for the table."""
    console = Console(stderr=True)
    told = console.is_terminal or "COLUMNS" in os.environ
    return console if told else Console(stderr=True, width=WIDTH)


class DataError(ConfigurationError):
    """A data set, or several, cannot be used as they are; the text has all errors.

    Args:
        reports: those with errors are told.
        consequence: a sentence's end, such as ``nothing was sent``.
    """

    def __init__(self, reports: Sequence[Report], consequence: str = "nothing was sent"):
        self.reports = tuple(reports)
        bad = [report for report in reports if report.errors]
        parts = [
            f"The data of {report.name} have {counted(len(report.errors), 'error')} ({consequence}):\n"
            f"{report.sentences()}"
            for report in bad
        ]
        super().__init__("\n".join(parts))


def require(reports: Sequence[Report], consequence: str = "nothing was sent") -> None:
    """Raise :class:`DataError` if any of the reports has an error."""
    if any(report.errors for report in reports):
        raise DataError(reports, consequence)


def _groups(findings: Iterable[Finding]) -> Iterator[list[Finding]]:
    """Findings of one kind with one remedy together, errors first, else in their order."""
    groups: dict[tuple[bool, str, str], list[Finding]] = {}
    for finding in findings:
        key = finding.severity is not Severity.error, finding.kind, finding.remedy
        groups.setdefault(key, []).append(finding)
    for key in sorted(groups, key=lambda key: key[0]):
        yield groups[key]


def _cases(findings: Sequence[Finding]) -> str:
    names = list(dict.fromkeys(finding.case or finding.file for finding in findings))
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def counted(number: int, what: str) -> str:
    """``no files``, ``1 file``, ``2 files``."""
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"
