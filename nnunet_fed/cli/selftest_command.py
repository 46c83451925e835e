"""``nnunet_fed selftest``: the first command on a machine with another device."""

from __future__ import annotations

import logging
import shutil
import tempfile
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nnunet_fed.datasets.findings import error_console
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.files import new_folder, write_json


class Device(str, Enum):
    """Where the trainings run."""

    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


def selftest(
    device: Annotated[Device | None, typer.Option(help="Default: cuda or mps, if torch finds one, or cpu.")] = None,
    methods: Annotated[
        str | None, typer.Option(metavar="NAME[,NAME...]", help="Test these methods only; default: all.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A new folder, which is kept; default: one that is kept if something fails.")
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here, too.")] = None,
) -> None:
    """Does everything work here? Made-up images, every method, a kill; exit status 0 all passed, 1 something failed."""
    from nnunet_fed.selftest import outcome
    from nnunet_fed.selftest.parts import TRIED, SelfTest, require_methods

    kind = _present(device)
    chosen = TRIED if methods is None else tuple(name.strip() for name in methods.split(","))
    require_methods(chosen)
    folder = Path(tempfile.mkdtemp(prefix="nnunet_fed_selftest_")) if out is None else out.resolve()
    new_folder(folder)
    test, console, rows = SelfTest(folder, kind, chosen), error_console(), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    logging.getLogger("nnunet_fed").setLevel(logging.WARNING)  # the bar says what goes on
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(test.names))
        for row in test.rows(lambda name: progress.update(task, description=name)):
            progress.advance(task)
            rows.append(row)
            if row.failure is not None:
                progress.console.print(f"{row.part} failed: {row.failure}", markup=False, soft_wrap=True)
    facts = outcome.machine(kind)
    wide = console.is_terminal
    (Console() if wide else Console(width=160)).print(outcome.table(rows))
    typer.echo("\nTo paste into a report:\n")
    typer.echo(outcome.report(rows, kind, facts, outcome.private_texts(folder)))
    if json is not None:
        content = {"verdict": outcome.verdict(rows, kind), "device": kind, "facts": facts}
        write_json(json, {**content, "parts": [{**asdict(row), "outcome": row.outcome} for row in rows]})
    status = outcome.exit_status(rows)
    if out is None and status == 0:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        typer.echo(f"All logs are in {folder}.")
    typer.echo(outcome.verdict(rows, kind))
    raise typer.Exit(status)


def _present(device: Device | None) -> str:
    """The device, or the best that there is; raises :class:`ConfigurationError`."""
    import torch

    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(name for name, there in present.items() if there) if device is None else device.value
    if not present[kind]:
        raise ConfigurationError(
            f"--device {kind}: torch finds no such device here; install a torch for it, or use --device cpu."
        )
    return kind
