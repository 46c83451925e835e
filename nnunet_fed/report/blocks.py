"""What a section of the report consists of: paragraphs, tables and figures; and how values are written in it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

NOTHING = "\N{EN DASH}"
"""What a cell says where nothing is known."""
_PATH = re.compile(r"(?<![\w.:/])(?:~|[A-Za-z]:)?(?:[/\\][\w.@+~-]+){2,}[/\\]?")


@dataclass(frozen=True)
class Paragraph:
    """Some sentences."""

    kind: ClassVar[str] = "paragraph"
    text: str


@dataclass(frozen=True)
class Table:
    """A table; the first column names the rows."""

    kind: ClassVar[str] = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    texts: int = 1
    """So many columns, the first ones, are texts; the others are numbers and stand to the right."""


@dataclass(frozen=True)
class Figure:
    """A picture with its text alternative."""

    kind: ClassVar[str] = "figure"
    source: str
    """A ``data:`` URI."""
    alternative: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A section; one without blocks is left out."""

    id: str
    title: str
    blocks: list[Paragraph | Table | Figure] = field(default_factory=list)


def number(value: float | None, digits: int = 3) -> str:
    """With so many decimals; a dash where there is none."""
    return _signed(value, f".{digits}f")


def significant(value: float | None) -> str:
    """With four significant digits."""
    return _signed(value, ".4g")


def _signed(value: float | None, form: str) -> str:
    if value is None or not math.isfinite(value):
        return NOTHING
    return format(value, form).replace("-", "\N{MINUS SIGN}")


def count(value: int | None) -> str:
    """A whole number."""
    return NOTHING if value is None else str(value)


def interval(low: float | None, high: float | None) -> str:
    """Both ends; a dash where there is none."""
    return NOTHING if low is None or high is None else f"{number(low)} to {number(high)}"


def megabytes(value: float | None) -> str:
    """Bytes as MB."""
    return NOTHING if value is None else f"{value / 1e6:.1f} MB"


def duration(seconds: float | None) -> str:
    """In the unit that suits."""
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def sizes(values: Sequence[float]) -> str:
    """Along the axes, with times signs between them."""
    return " \N{MULTIPLICATION SIGN} ".join(f"{value:.4g}" for value in values) if len(values) else NOTHING


def without_paths(text: str) -> str:
    """A sentence without the folders of the machine on which it was written; names of files stay."""
    return _PATH.sub(lambda found: "\N{HORIZONTAL ELLIPSIS}/" + re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], text)


def evenly(numbers: Sequence[int], most: int) -> list[int]:
    """At most so many of the numbers, evenly spread, the first and the last among them."""
    if len(numbers) <= most:
        return list(numbers)
    step = (len(numbers) - 1) / (most - 1)
    return [numbers[round(place * step)] for place in range(most)]
