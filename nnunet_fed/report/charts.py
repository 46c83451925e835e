"""Figures of a report, as SVG that needs no other file. Each says in words what it shows.

Colours: Okabe and Ito, *Color Universal Design* (2008), which people with a colour vision deficiency tell apart. Marks,
line styles and hatches differ too, so that nothing is said by colour alone.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import FancyArrowPatch

from nnunet_fed.report.blocks import Figure, number, significant

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C7A00")
"""Yellow of the palette is darkened: on white it would be too pale."""
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
WIDTH = 4.4
"""Inches; two stand side by side on a desktop, one is as wide as a phone."""
MOST_MARKS = 20
LONGEST_LABEL = 18
_STYLE = {
    "font.family": "DejaVu Sans", "font.size": 10.0, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#555555", "axes.grid": True, "axes.axisbelow": True, "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6, "svg.fonttype": "path", "svg.hashsalt": "nnunet_fed", "legend.frameon": False,
    "legend.fontsize": 9.0, "axes.titlesize": 10.0, "axes.titlelocation": "left", "axes.titleweight": "bold",
    "text.parse_math": False,  # a name with dollar signs is a name
}  # fmt: skip

Line = Mapping[int, float]


def _look(index: int) -> dict[str, Any]:
    """Colour, mark and line style of one of several."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKS[index % len(MARKS)],
        "linestyle": LINES[index // len(COLOURS) % len(LINES)],
    }


def _short(name: str) -> str:
    """A name as a label: a long one would leave no room for the figure. Tables and text alternatives have it whole."""
    half = LONGEST_LABEL // 2
    return name if len(name) <= LONGEST_LABEL else f"{name[:half]}\N{HORIZONTAL ELLIPSIS}{name[1 - half :]}"


def _canvas(height: float) -> tuple[Canvas, Any]:
    canvas = Canvas(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasSVG(canvas)
    return canvas, canvas.add_subplot()


def _finish(canvas: Canvas, alternative: str, caption: str) -> Figure:
    picture = io.BytesIO()
    canvas.savefig(picture, format="svg", metadata={"Date": None, "Creator": None})
    source = "data:image/svg+xml;base64," + base64.b64encode(picture.getvalue()).decode()
    return Figure(source, alternative, caption)


def _legend(axes: Any, entries: int) -> None:
    if entries > 1:
        handles, labels = axes.get_legend_handles_labels()
        axes.figure.legend(handles, labels, loc="outside lower center", ncols=min(3, entries), handlelength=2.4)


def lines(
    what: str, series: Mapping[str, Line], x_label: str, caption: str, *, local_from: int | None = None,
    limits: tuple[float, float | None] | None = None,
) -> Figure:  # fmt: skip
    """Values over rounds or epochs, a line for each site.

    Args:
        what: is shown; label of the y axis.
        series: by site: the values by number.
        x_label: of the x axis.
        caption: below the figure.
        local_from: from here on the sites trained without each other; shaded.
        limits: of the y axis.
    """
    with mpl.rc_context(_STYLE):
        canvas, axes = _canvas(3.0 + 0.22 * math.ceil(len(series) / 3))
        for index, (name, values) in enumerate(series.items()):
            x = sorted(values)
            every = max(1, len(x) // MOST_MARKS)
            y = [values[place] for place in x]
            axes.plot(x, y, label=_short(name), markersize=4, linewidth=1.5, markevery=every, **_look(index))
        if local_from is not None:
            last = max(max(values) for values in series.values())
            axes.axvspan(local_from - 0.5, last + 0.5, color="#999999", alpha=0.25, linewidth=0)
        axes.set(xlabel=x_label, title=what)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if limits is not None:
            axes.set_ylim(*limits)
        _legend(axes, len(series))
        told = "; ".join(
            f"{name} from {significant(values[min(values)])} to {significant(values[max(values)])}"
            for name, values in series.items()
        )
        return _finish(canvas, f"Line chart. {what} by {x_label}: {told}.", caption)


def intervals(
    what: str, rows: Sequence[tuple[str, str, float, float | None, float | None]], caption: str, zero: bool = False
) -> Figure:
    """A point and an interval for each row, grouped.

    Args:
        what: is shown; label of the x axis.
        rows: group, name within the group, value, and both ends of its interval.
        caption: below the figure.
        zero: mark where there is no difference.
    """
    groups = list(dict.fromkeys(row[0] for row in rows))
    names = list(dict.fromkeys(row[1] for row in rows))
    with mpl.rc_context(_STYLE):
        canvas, axes = _canvas(1.1 + 0.26 * len(rows) + 0.12 * len(groups) + 0.2 * math.ceil(len(names) / 3))
        places, ticks, place = [], [], 0.0
        for group in groups:
            mine = [row for row in rows if row[0] == group]
            places += [place + index for index in range(len(mine))]
            ticks.append(place + (len(mine) - 1) / 2)
            place += len(mine) + 0.5
        ordered = sorted(rows, key=lambda row: groups.index(row[0]))
        for place, (_, name, value, low, high) in zip(places, ordered, strict=True):
            look = _look(names.index(name))
            if low is not None and high is not None:
                axes.plot([low, high], [place, place], color=look["color"], linewidth=2, solid_capstyle="butt")
            axes.plot([value], [place], marker=look["marker"], color=look["color"], linestyle="none", markersize=6)
        for index, name in enumerate(names):
            look = {**_look(index), "linestyle": "none"}
            axes.plot([], [], label=_short(name), **look)
        axes.locator_params(axis="x", nbins=5)
        if zero:
            axes.axvline(0, color="#000000", linewidth=1)
        axes.set_yticks(ticks, list(map(_short, groups)))
        axes.set(xlabel=what, ylim=(max(places) + 0.6, -0.6))
        axes.grid(axis="y", visible=False)
        _legend(axes, len(names))
        told = "; ".join(
            f"{group}, {name}: {number(value)}" + (f" ({number(low)} to {number(high)})" if low is not None else "")
            for group, name, value, low, high in ordered
        )
        return _finish(canvas, f"Points with intervals. {what}: {told}.", caption)


def strips(what: str, groups: Mapping[str, Sequence[float]], caption: str, logarithmic: bool = False) -> Figure:
    """Every value as a dot, a row for each group, with its median as a bar.

    Args:
        what: is shown; label of the x axis.
        groups: values by the name of the group; none is empty.
        caption: below the figure.
        logarithmic: the scale.
    """
    with mpl.rc_context(_STYLE):
        canvas, axes = _canvas(0.9 + 0.42 * len(groups))
        jitter = np.random.default_rng(0)
        for index, values in enumerate(groups.values()):
            look = _look(index)
            heights = index + jitter.uniform(-0.22, 0.22, len(values))
            axes.plot(
                values, heights, marker=look["marker"], color=look["color"], linestyle="none", markersize=4, alpha=0.55
            )
            middle = float(np.median(values))
            axes.plot([middle, middle], [index - 0.34, index + 0.34], color="#000000", linewidth=2)
        axes.set_yticks(range(len(groups)), list(map(_short, groups)))
        axes.set(xlabel=what, ylim=(len(groups) - 0.4, -0.6))
        if logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
        axes.grid(axis="y", visible=False)
        told = "; ".join(
            f"{name}: {len(values)} values from {significant(min(values))} to {significant(max(values))}, "
            f"median {significant(float(np.median(values)))}"
            for name, values in groups.items()
        )
        return _finish(canvas, f"Dots. {what}: {told}.", caption)


def bars(what: str, groups: Mapping[str, Mapping[str, float]], caption: str) -> Figure:
    """Bars side by side, a group of them in each row.

    Args:
        what: is shown; label of the x axis.
        groups: by row, then by bar.
        caption: below the figure.
    """
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    with mpl.rc_context(_STYLE):
        canvas, axes = _canvas(1.2 + 0.24 * len(groups) * len(names))
        thick = 0.8 / len(names)
        for index, name in enumerate(names):
            places = [row + (index - (len(names) - 1) / 2) * thick for row in range(len(groups))]
            values = [group.get(name, 0.0) for group in groups.values()]
            hatch = ("", "//", "..", "xx")[index % 4]
            axes.barh(
                places,
                values,
                thick,
                label=_short(name),
                color=COLOURS[index % len(COLOURS)],
                hatch=hatch,
                edgecolor="white",
            )
        axes.set_yticks(range(len(groups)), list(map(_short, groups)))
        axes.set(xlabel=what, ylim=(len(groups) - 0.4, -0.6))
        axes.grid(axis="y", visible=False)
        _legend(axes, len(names))
        told = "; ".join(
            f"{row}: " + ", ".join(f"{name} {significant(value)}" for name, value in group.items())
            for row, group in groups.items()
        )
        return _finish(canvas, f"Bars. {what}: {told}.", caption)


def matrix(
    what: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]],
    axes_labels: tuple[str, str], caption: str, digits: int = 3,
) -> Figure:  # fmt: skip
    """Numbers in coloured fields; paler is larger (cividis).

    Args:
        what: is shown.
        rows: their names.
        columns: their names.
        values: by row, then by column; ``None`` where there is none.
        axes_labels: what the rows are, and what the columns are.
        caption: below the figure.
        digits: of the numbers.
    """
    fields = np.array([[math.nan if value is None else value for value in row] for row in values], np.float64)
    with mpl.rc_context({**_STYLE, "axes.grid": False}):
        canvas, axes = _canvas(1.5 + 0.42 * len(rows))
        finite = fields[np.isfinite(fields)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        shown = axes.imshow(fields, cmap="cividis", aspect="auto", vmin=low, vmax=high if high > low else low + 1)
        for row, column in np.ndindex(*fields.shape):
            value = float(fields[row, column])
            dark = not math.isfinite(value) or shown.norm(value) > 0.55
            axes.text(column, row, number(value, digits), ha="center", va="center", color="black" if dark else "white")
        slanted = {"rotation": 30, "ha": "right"} if max(map(len, columns)) * len(columns) > 40 else {}
        axes.set_xticks(range(len(columns)), list(map(_short, columns)), **slanted)
        axes.set_yticks(range(len(rows)), list(map(_short, rows)))
        axes.set(xlabel=axes_labels[1], ylabel=axes_labels[0], title=what)
        told = "; ".join(
            f"{row}: " + ", ".join(f"{column} {number(v, digits)}" for column, v in zip(columns, line, strict=True))
            for row, line in zip(rows, values, strict=True)
        )
        labels = f"rows are {axes_labels[0]}, columns are {axes_labels[1]}"
        return _finish(canvas, f"Matrix. {what}, {labels}. {told}.", caption)


def graph(what: str, nodes: Sequence[str], edges: Mapping[tuple[str, str], int], caption: str) -> Figure:
    """Who gave to whom: sites on a circle, an arrow for each pair, the thicker the more.

    Args:
        what: is shown.
        nodes: sites.
        edges: numbers by giver and taker.
        caption: below the figure.
    """
    with mpl.rc_context({**_STYLE, "axes.grid": False}):
        canvas, axes = _canvas(WIDTH)
        angles = {name: math.pi / 2 - 2 * math.pi * index / len(nodes) for index, name in enumerate(nodes)}
        places = {name: (math.cos(angle), math.sin(angle)) for name, angle in angles.items()}
        most = max(edges.values(), default=1)
        for (giver, taker), times in edges.items():
            look = _look(list(nodes).index(giver))
            axes.add_patch(
                FancyArrowPatch(
                    places[giver], places[taker], connectionstyle="arc3,rad=0.16", arrowstyle="-|>",
                    mutation_scale=14, shrinkA=16, shrinkB=16, color=look["color"], linewidth=0.8 + 2.6 * times / most,
                )
            )  # fmt: skip
            (x0, y0), (x1, y1) = places[giver], places[taker]
            # the arc bends to the right of its way; its number stands on the bend
            axes.text(
                (x0 + x1) / 2 + 0.08 * (y1 - y0), (y0 + y1) / 2 - 0.08 * (x1 - x0), str(times), ha="center",
                va="center", fontsize=9, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
            )  # fmt: skip
        for index, name in enumerate(nodes):
            axes.plot(*places[name], marker="o", markersize=22, color=_look(index)["color"], linestyle="none")
            x, y = places[name]
            axes.text(1.28 * x, 1.28 * y, _short(name), ha="center", va="center", fontweight="bold")
        axes.set(xlim=(-1.7, 1.7), ylim=(-1.5, 1.5), aspect="equal", title=what)
        axes.set_axis_off()
        told = "; ".join(f"{giver} to {taker}: {times}" for (giver, taker), times in edges.items()) or "nothing"
        return _finish(canvas, f"Graph. {what}: {told}.", caption)
