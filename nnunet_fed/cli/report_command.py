"""``nnunet_fed report``: a run, a comparison or a record as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="The --out folder of simulate or compare, a coordinator's --state folder, or a file with what "
            "'nnunet_fed status --json' prints.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Default: report.html in DIR, or beside the file.")
    ] = None,
) -> None:
    """Write one HTML file to look at: study, data, Dice, curves, traffic, and slices of images of a local run."""
    from nnunet_fed.report.page import write_report

    target = out or (source if source.is_dir() else source.parent) / "report.html"
    write_report(source, target)
    typer.echo(str(target))
