"""How the training went: curves by epoch and site, rounds with who took part, traffic, time and events."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from typing import Any

from nnunet_fed.exchange.keys import MODEL, name_of, round_of
from nnunet_fed.report.blocks import (
    NOTHING,
    Figure,
    Paragraph,
    Section,
    Table,
    count,
    duration,
    evenly,
    megabytes,
    number,
    significant,
    without_paths,
)
from nnunet_fed.report.charts import Line, bars, lines
from nnunet_fed.report.gather import Run

MOST_ROUNDS = 20
"""Rows of a table by round; of more rounds some are shown."""
MOST_EVENTS = 200
"""The mean that ends a round (docs/protocol.md)."""


def curves_section(run: Run) -> Section:
    """Loss and pseudo Dice by epoch and site."""
    section = Section("training", "Training curves")
    logs = {name: files.log for name, files in run.sites.items() if files.log.train_loss}
    per_round = run.study.get("local_epochs", 1)
    rounds = run.study.get("rounds")
    together = rounds * per_round if rounds else None
    last = max((max(log.train_loss) for log in logs.values()), default=0)
    alone = together if together is not None and last >= together else None
    x_label = "epoch" if per_round == 1 else f"epoch ({per_round} are a round)"
    below = " Shaded: fine-tuning at the site, after the rounds." if alone is not None else ""
    folds = sorted({files.fold for files in run.sites.values() if files.fold})
    below += f" Of fold {', '.join(folds)}, the last that was trained." if folds else ""
    shown = {
        "training loss": ({name: log.train_loss for name, log in logs.items()}, None),
        "validation loss": ({name: log.val_loss for name, log in logs.items()}, None),
        "pseudo Dice": ({name: log.dice for name, log in logs.items()}, (0.0, 1.0)),
    }
    for what, (by_site, limits) in shown.items():
        there = {name: values for name, values in by_site.items() if values}
        if there:
            caption = f"nnU-Net's {what}, by epoch, at each site.{below}"
            section.blocks.append(lines(what, there, x_label, caption, local_from=alone, limits=limits))
    dice = {name: log.dice for name, log in logs.items() if log.dice}
    if dice:
        section.blocks.append(_by_round(dice, per_round))
    if not section.blocks:
        section.blocks.extend(_last_told(run.record))
    return section


def _by_round(dice: Mapping[str, Line], per_round: int) -> Table:
    ends = [epoch for epoch in sorted({e for values in dice.values() for e in values}) if (epoch + 1) % per_round == 0]
    rows = [
        [str((epoch + 1) // per_round), *(number(values.get(epoch)) for values in dice.values())]
        for epoch in evenly(ends, MOST_ROUNDS)
    ]
    note = "nnU-Net's estimate from patches; the Dice of whole cases stands above."
    return Table("Pseudo Dice at the end of each round", ("Round", *dice), rows, note)


def _last_told(record: Mapping[str, Any]) -> Iterator[Table]:
    """What the sites have told the coordinator last."""
    rows = []
    for name, site in record.get("sites", {}).items():
        progress = site.get("progress") or {}
        if progress:
            figures = (number(progress.get("loss")), number(progress.get("dice")))
            rows.append([name, str(progress.get("phase", NOTHING)), count(progress.get("round")), *figures])
    if rows:
        yield Table("What the sites have told last", ("Site", "Phase", "Round", "Loss", "Pseudo Dice"), rows, texts=2)


def traffic_section(run: Run) -> Section:
    """Bytes and seconds, and the rounds with who took part."""
    section = Section("traffic", "Traffic and time")
    moved = _moved(run)
    if any(any(kinds.values()) for kinds in moved.values()):
        groups = {name: {kind: value / 1e6 for kind, value in kinds.items()} for name, kinds in moved.items()}
        section.blocks.append(bars("MB", groups, "What each site sent and received in the training."))
    rows = []
    for name in run.site_names:
        files, kinds = run.sites.get(name), moved.get(name, {})
        seconds = list(files.log.seconds.values()) if files else []
        exchanged = [entry["seconds"] for entry in files.record.get("rounds", [])] if files else []
        row = [
            megabytes(kinds.get("sent")), megabytes(kinds.get("received")),
            duration(sum(seconds) / len(seconds)) if seconds else NOTHING,
            duration(sum(exchanged) / len(exchanged)) if exchanged else NOTHING,
        ]  # fmt: skip
        if any(cell != NOTHING for cell in row):
            rows.append([name, *row])
    if rows:
        head = ("Site", "Sent", "Received", "An epoch takes", "An exchange takes")
        note = "Means; an exchange includes the wait for the other sites."
        section.blocks.append(Table("Traffic and time by site", head, rows, note))
    section.blocks.extend(_rounds(run))
    return section


def _moved(run: Run) -> dict[str, dict[str, float]]:
    """Bytes by site; from the coordinator's record where the sites' own are not there."""
    moved = {}
    for name in run.site_names:
        known = [run.summary.get("sites", {}).get(name, {}), run.sites[name].record if name in run.sites else {}]
        own: Mapping[str, Any] = next((block for block in known if block.get("bytes_sent") is not None), {})
        kinds = {kind: own.get(f"bytes_{kind}") for kind in ("sent", "received")}
        if all(value is None for value in kinds.values()):
            given = [c["sites"][name]["bytes"] for c in run.training if name in c["sites"]]
            kinds = {"sent": sum(given) if given else None}
        there = {kind: value for kind, value in kinds.items() if value is not None}
        if there:
            moved[name] = there
    return moved


def _rounds(run: Run) -> Iterator[Paragraph | Figure | Table]:
    """Who took part in each round with which weight, out of the coordinator's record."""
    means = {place: collective for place, collective in _closed_in_rounds(run) if name_of(collective["key"]) == MODEL}
    if not means:
        return
    sites = list(dict.fromkeys(site for collective in means.values() for site in collective["sites"]))
    spent = _spent(run)
    waits = {"all collectives of the round": {place + 1: spent[place] for place in sorted(means)}}
    caption = "From a round's first contribution to its last result, as the coordinator saw it."
    yield lines("seconds", waits, "round", caption, limits=(0.0, None))
    norms = {
        site: {
            place + 1: given["norm"]
            for place, c in means.items()
            if (given := c["sites"].get(site)) and given.get("norm")
        }
        for site in sites
    }
    norms = {site: values for site, values in norms.items() if values}
    if norms:
        yield lines("norm of the update", norms, "round", "Distance of each site's model to the one before the round.")
    rows = [
        [str(place + 1), *(_weight(means[place]["sites"].get(site)) for site in sites), duration(spent[place])]
        for place in evenly(sorted(means), MOST_ROUNDS)
    ]
    note = "Weights in the mean; a dash: the site was not in the round."
    yield Table("Who took part, with which weight", ("Round", *sites, "Time"), rows, note)


def _spent(run: Run) -> dict[int, float]:
    """Seconds from the first to the last collective of each round."""
    spans: dict[int, tuple[float, float]] = {}
    for place, collective in _closed_in_rounds(run):
        first, last = spans.get(place, (collective["opened"], collective["closed"]))
        spans[place] = min(first, collective["opened"]), max(last, collective["closed"])
    return {place: last - first for place, (first, last) in spans.items()}


def _closed_in_rounds(run: Run) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The closed collectives of rounds, each with the number of its round from 0."""
    for collective in run.training:
        place = round_of(collective["key"])
        if place is not None and collective["closed"]:
            yield place, collective


def _weight(given: Mapping[str, Any] | None) -> str:
    return NOTHING if given is None else significant(given["weight"])


def events_section(run: Run) -> Section:
    """What happened, in words: from the coordinator's journal, else from the sites' own records."""
    section = Section("events", "What happened")
    events = [
        (event["at"], event.get("site") or "coordinator", event["text"]) for event in run.record.get("events", [])
    ]
    if not run.training:  # a method without a coordinator
        events += [
            (event["at"], name, event["text"])
            for name, files in run.sites.items()
            for event in files.record.get("events", [])
        ]
    events.sort(key=lambda event: event[0])
    rows = [
        [datetime.fromtimestamp(at, timezone.utc).strftime("%Y-%m-%d %H:%M:%S"), site, without_paths(text)]
        for at, site, text in events[-MOST_EVENTS:]
    ]
    if rows:
        note = "" if len(events) <= MOST_EVENTS else f"The last {MOST_EVENTS} of {len(events)}."
        section.blocks.append(Table("Events (UTC)", ("Time", "Site", "What"), rows, note, 3))
    return section
