"""A study as those who watch it see it: a live table on a terminal, a line per change elsewhere. Source: ours."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from nnunet_fed.logs import printable

logger = logging.getLogger(__name__)

SECONDS = 1.0
"""Pause between two looks."""

Status = Mapping[str, Any]
"""See :meth:`nnunet_fed.coordinator.coordinator.Coordinator.status`."""


def watch(poll: Callable[[], Status], running: Callable[[], bool], console: Console) -> None:
    """Show the status until ``running`` says no; whatever ``poll`` and ``running`` raise ends it.

    Args:
        poll: gives the coordinator's status.
        running: asked before every look.
        console: where the table goes; if it is no terminal, each change of a site's phase or round is logged instead.
    """
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            for status in _looks(poll, running):
                live.update(status_table(status), refresh=True)
    else:
        known: dict[str, Any] = {}
        for status in _looks(poll, running):
            _log_changes(status, known)


def status_table(status: Status) -> Table:
    """A row for each site: phase, round, loss, pseudo Dice, last seen; below, for whom the others wait.

    Where several trainings go on, as of several folds, a site has a row for each.
    """
    study = status["study"]
    title = f"{study['name']}: {study['method']['name']}, attempt {status['attempt']}"
    # as Text, since a study's name may look like rich's markup
    table = Table(title=Text(title), caption=Text(_waits(status)), caption_justify="left")
    several = _going_on(status)
    for name in ("Site", *(["Training"] if several else []), "Phase"):
        table.add_column(name)
    for name in ("Round", "Loss", "Pseudo Dice", "Last seen"):
        table.add_column(name, justify="right")
    for name, training, site in _rows(status):
        progress = site["progress"] or {}
        phase = printable(str(progress.get("phase", "not here yet" if site["last_seen"] is None else "joined")))
        table.add_row(
            name,
            *([Text(training)] if several else []),
            Text(f"{phase}, absent" if site["standing"] == "absent" else phase),
            Text(printable(f"{progress['round']}/{study['rounds']}")) if "round" in progress else "-",
            _number(progress.get("loss")),
            _number(progress.get("dice")),
            "-" if site["last_seen"] is None else f"{max(0.0, status['now'] - site['last_seen']):.0f} s ago",
        )
    return table


def _going_on(status: Status) -> dict[str, Status]:
    """By a name, the trainings that go on, if there may be several; a coordinator of version 0.1 does not tell."""
    trainings: Mapping[str, Status] = status.get("trainings", {})
    lively = [training for training in trainings.values() if _is_going_on(training)]
    if len(lively) < 2 and not status["study"].get("folds"):
        return {}
    kinds = {(training["configuration"], training["trainer"]) for training in lively}
    return {
        " ".join([f"fold {one['fold']}", *([one["configuration"], one["trainer"]] if len(kinds) > 1 else [])]): one
        for one in lively
    }


def _is_going_on(training: Status) -> bool:
    return any(site["standing"] != "left" for site in training["sites"].values())


def _rows(status: Status) -> Iterator[tuple[str, str, Status]]:
    """Name, training and what is known of each site, in each training if there are several."""
    several = _going_on(status)
    for name, site in status["sites"].items():
        of_site = [(training, one["sites"][name]) for training, one in several.items() if name in one["sites"]]
        for training, found in of_site or [("", site)]:
            yield name, training, {**site, **found}


def _failed(status: Status) -> list[dict[str, str]]:
    """What nobody waits for any more; a coordinator of version 0.1 does not tell."""
    found: list[dict[str, str]] = status.get("failed", [])
    return found


def _looks(poll: Callable[[], Status], running: Callable[[], bool]) -> Iterator[Status]:
    while running():
        yield poll()
        time.sleep(SECONDS)
    yield poll()


def _log_changes(status: Status, known: dict[str, Any]) -> None:
    """Log what changed since the last look; ``known`` keeps phase and round of each row, and what has failed."""
    failed = [failed["error"] for failed in _failed(status)]
    for error in failed:
        if error not in known.get("", ()):
            logger.error(error)
    known[""] = failed
    for name, training, site in _rows(status):
        progress = site["progress"] or {}
        now = str(progress.get("phase")), str(progress.get("round"))
        if not progress or known.get(f"{name} {training}") == now:
            continue
        known[f"{name} {training}"] = now
        parts = [f"{name}: {now[0]}", *([training] if training else [])]
        if "round" in progress:
            parts.append(f"round {progress['round']} of {status['study']['rounds']}")
        parts.extend(f"{text} {_number(progress[key])}" for key, text in _MEASURES if progress.get(key) is not None)
        logger.info(", ".join(parts))


_MEASURES = (("loss", "loss"), ("dice", "pseudo Dice"))


def _waits(status: Status) -> str:
    lines = []
    of_run = {id(training): f"{name}: " for name, training in _going_on(status).items()}
    for collective in status["open"]:
        training = of_run.get(id(status.get("trainings", {}).get(collective["run"])), "")
        until = datetime.fromtimestamp(collective["closes_at"]).strftime("%Y-%m-%d %H:%M:%S")
        missing = collective["missing"]
        lines.append(
            f"{training}{collective['key']} waits for {', '.join(missing)} until {until}"
            if missing
            else f"{training}{collective['key']} is complete and being computed"
        )
    lines.extend(failed["error"] for failed in _failed(status))
    return "\n".join(lines)


def _number(value: object) -> str:
    """A figure, or a dash for what is none: a site may say anything."""
    return f"{value:.4f}" if isinstance(value, int | float) and abs(value) < 1e12 else "-"
