"""Tables of a comparison, for the terminal and for ``compare.md``. Source: ours."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

Content = Mapping[str, Any]
"""Of ``compare.json``."""
UNDEFINED = "-"
UNITS = {
    "hd95": "HD95 (mm, lower is better)", "nsd": "NSD", "small_dice": "Dice of small lesions",
    "large_dice": "Dice of large lesions",
}  # fmt: skip


@dataclass(frozen=True)
class TextTable:
    """A table in words; the first columns are texts, the others numbers."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str
    texts: int = 1

    def rich(self) -> Table:
        """For the terminal."""
        table = Table(
            title=Text(self.title), caption=Text(self.note), caption_justify="left", title_justify="left",
            box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
        )  # fmt: skip
        for number, name in enumerate(self.head):
            table.add_column(Text(name), justify="left" if number < self.texts else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def markdown(self) -> str:
        """For a file."""
        rule = ["---" if number < self.texts else "--:" for number in range(len(self.head))]
        lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in (self.head, rule, *self.rows)]
        return f"## {self.title}\n\n" + "\n".join(lines) + f"\n\n{self.note}\n"


def tables(content: Content) -> Iterator[TextTable]:
    """All tables of a comparison."""
    methods, statistics = content["methods"], content["settings"]["statistics"]
    sites = list(dict.fromkeys(site for figures in methods.values() for site in figures["dice"]))
    level = f"{100 * statistics['level']:.0f} %"
    yield TextTable(
        "Dice",
        ("Method", *(f"{site} ({_cases(methods, site)})" for site in sites), "overall"),
        tuple(
            (method, *(_interval(figures["dice"].get(site)) for site in sites), _interval(figures["overall"]))
            for method, figures in methods.items()
        ),
        f"Mean over cases (how many) [{level} interval: {statistics['interval']}, too narrow with few cases]; overall, "
        "every site counts the same.",
    )
    yield TextTable(
        "Fairness, gap and cost",
        ("Method", "Worst site", "its Dice", "Spread", "Gap closed", "SD over seeds", "Traffic", "Seconds"),
        tuple(_cost(method, figures) for method, figures in methods.items()),
        "Spread: best minus worst site. Gap closed: share of the way from local to pooled, where the interval of "
        "pooled minus local is above 0. Traffic, of all sites, and seconds: mean of the seeds.",
        texts=2,
    )
    yield TextTable(
        "Surfaces and lesion size, overall",
        ("Method", *UNITS.values()),
        tuple(
            (method, *(_interval(figures[metric]["overall"], 2 if metric == "hd95" else 3) for metric in UNITS))
            for method, figures in methods.items()
        ),
        f"NSD at {statistics['nsd_tolerance_mm']:g} mm. HD95 is undefined, hence left out, where a class was missed.",
    )
    if content["differences"]:
        yield TextTable(
            "Differences in Dice",
            ("Methods", "Difference", f"{level} interval"),
            tuple(
                (f"{one['a']} - {one['b']}", _number(one["mean"], sign=True), _range(one, sign=True))
                for one in content["differences"]
            ),
            "Paired over cases, overall. Where 0 lies in the interval, the data do not tell the two apart; of twenty "
            "such intervals of equal methods, about one leaves 0 out.",
        )


def markdown(content: Content) -> str:
    """The content of ``compare.md``."""
    settings = content["settings"]
    study, methods = settings["study"], content["methods"]
    seeds = sorted({seed for figures in methods.values() for seed in figures["seeds"]})
    epochs = study["rounds"] * study.get("local_epochs", 1)
    steps = epochs * study["iterations_per_epoch"]
    options = {method: settings["options"][method] for method in methods if settings["options"].get(method)}
    changed = [f"`{method}.{name} = {value}`" for method, given in options.items() for name, value in given.items()]
    folds = f"folds {', '.join(map(str, study['folds']))}" if study.get("folds") else f"fold {study['fold']}"
    words = [
        f"Methods {', '.join(methods)}; sites {', '.join(settings['sites'])}; seeds {', '.join(map(str, seeds))}; "
        f"{study['rounds']} rounds, {steps} steps in all; {folds}, {study['configuration']}, "
        f"{study['planner']}.",
        "All arms have the same plans, preprocessed data, folds, initial weights and number of steps. "
        + (
            f"Set by hand: {', '.join(changed)}; all else is"
            if changed
            else "Nothing was set by hand for a single method: all options are"
        )
        + " at the methods' defaults (docs/methods.md).",
        *(f"Site {site} {reason}: it is left out." for site, reason in settings["left_out"].items()),
        "Versions: " + ", ".join(f"{name} {number}" for name, number in content["versions"].items()) + ".",
    ]
    filled = [textwrap.fill(text, 118) for text in words]
    parts = ["# Comparison", *filled, *(table.markdown() for table in tables(content))]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _cases(methods: Mapping[str, Any], site: str) -> int:
    return max(int(figures["dice"][site]["cases"]) for figures in methods.values() if site in figures["dice"])


def _cost(method: str, figures: Mapping[str, Any]) -> tuple[str, ...]:
    worst, closed, sent = figures["worst_site"] or {}, figures["gap_closed"], figures["bytes"]
    return (
        method,
        worst.get("site", UNDEFINED),
        _number(worst.get("mean")),
        _number(figures["spread"]),
        UNDEFINED if closed is None else f"{100 * closed:.0f} %",
        _number(figures["overall"]["sd_seeds"]),
        UNDEFINED if sent is None else f"{sent / 1e6:.1f} MB",
        f"{figures['seconds']:.0f}",
    )


def _number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    return UNDEFINED if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def _range(figure: Mapping[str, Any], digits: int = 3, sign: bool = False) -> str:
    if figure["low"] is None:
        return UNDEFINED
    return f"[{_number(figure['low'], digits, sign)}, {_number(figure['high'], digits, sign)}]"


def _interval(figure: Mapping[str, Any] | None, digits: int = 3) -> str:
    if figure is None or figure["mean"] is None:
        return UNDEFINED
    between = _range(figure, digits)
    return _number(figure["mean"], digits) + (f" {between}" if between != UNDEFINED else "")
