"""What the self-test found: a row for each part, the table, the verdict, and text for a report. Source: ours."""

from __future__ import annotations

import getpass
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from rich.table import Table
from rich.text import Text

PLAIN = "nnU-Net"
COLUMNS = (
    "part", "outcome", "compiled", "mixed precision", "step, ms", "beside nnU-Net", "peak memory, MB",
    "beside nnU-Net", "seconds in all",
)  # fmt: skip
PACKAGES = ("nnunet-fed", "nnunetv2", "torch", "numpy")


@dataclass(frozen=True)
class Row:
    """One part of the self-test."""

    part: str
    seconds: float
    """In all."""
    failure: str | None = None
    """Its last words; ``None``: it passed."""
    compiled: bool | None = None
    mixed_precision: bool | None = None
    step_seconds: float | None = None
    """Median; ``None``: it takes no training steps, or failed."""
    peak_memory: int | None = None
    """Bytes; ``None``: not known."""

    @property
    def outcome(self) -> str:
        """In one word."""
        return "passed" if self.failure is None else "failed"


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table's cells, in the order of :data:`COLUMNS`."""
    plain = next((row for row in rows if row.part == PLAIN), None)
    return [
        [
            row.part, row.outcome, _yes(row.compiled), _yes(row.mixed_precision),
            "" if row.step_seconds is None else f"{row.step_seconds * 1000:.0f}",
            _ratio(row.step_seconds, plain.step_seconds if plain else None),
            "" if not row.peak_memory else f"{row.peak_memory / 1e6:.0f}",
            _ratio(row.peak_memory, plain.peak_memory if plain else None), f"{row.seconds:.0f}",
        ]
        for row in rows
    ]  # fmt: skip


def table(rows: Sequence[Row]) -> Table:
    """For a terminal."""
    shown = Table()
    for name in COLUMNS:
        shown.add_column(name, justify="left" if name in COLUMNS[:4] else "right")
    for row in cells(rows):
        shown.add_row(*map(Text, row))
    return shown


def verdict(rows: Sequence[Row], device: str) -> str:
    """One sentence."""
    failed = [row.part for row in rows if row.failure is not None]
    if failed:
        return f"{len(failed)} of {len(rows)} parts failed on {device}: {', '.join(failed)}."
    return f"All {len(rows)} parts passed on {device}."


def exit_status(rows: Sequence[Row]) -> int:
    """0: all passed; 1: something failed."""
    return int(any(row.failure is not None for row in rows))


def report(rows: Sequence[Row], device: str, facts: dict[str, str], private: Sequence[str]) -> str:
    """Markdown to paste into a report.

    Args:
        rows: of the table.
        device: cpu, cuda or mps.
        facts: of this machine (:func:`machine`).
        private: texts, such as folders and names, that are replaced by three dots.
    """
    lines = [verdict(rows, device), ""]
    lines += [f"* {name}: {fact}" for name, fact in facts.items()]
    lines += ["", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(row) + " |" for row in cells(rows)]
    for row in rows:
        if row.failure is not None:
            lines += ["", f"{row.part}:", "", *("    " + line for line in row.failure.splitlines())]
    text = "\n".join(lines)
    for hidden in sorted(filter(None, private), key=len, reverse=True):
        text = text.replace(hidden, "...")
    return text + "\n"


def machine(device: str) -> dict[str, str]:
    """Versions and the device, without names of the machine or the user."""
    import torch

    facts = {"versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES)}
    facts["system"] = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    facts["cores"] = str(os.cpu_count())
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        memory = f"{properties.total_memory / 1e9:.0f} GB"
        facts["device"] = f"{properties.name}, {memory}, CUDA {torch.version.cuda}, {torch.cuda.device_count()} seen"
    else:
        facts["device"] = device
    if hasattr(os, "getloadavg"):
        facts["load at the end"] = f"{os.getloadavg()[0]:.1f}"
    return facts


def private_texts(folder: Path) -> list[str]:
    """What is left out of text that is passed on: folders, the machine's name, the user's."""
    texts = [str(folder), str(folder.resolve()), str(Path.home()), sys.prefix, str(Path(__file__).parents[1])]
    names = [platform.node()]
    with suppress(KeyError, OSError):  # a user without a name
        names.append(getpass.getuser())
    return [text for text in texts if len(text) > 1] + [name for name in names if len(name) > 3]


def _yes(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"


def _ratio(value: float | None, plain: float | None) -> str:
    return f"{value / plain:.2f}" if value and plain else ""
