"""``nnunet_fed compare``: which method is better on these sites, and by how much."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from nnunet_fed.cli.option_values import named_values
from nnunet_fed.cli.shared_options import MachineOptions, SiteOptions, StudyOptions, grouped
from nnunet_fed.datasets.findings import error_console
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.study.methods import METHODS

TOLERANCE = 2.0
"""Of NSD in mm; ours. Choose it by what two readers of the structure differ by."""


@grouped
def compare(
    *,
    sites: SiteOptions,
    out: Annotated[Path, typer.Option(help="A new folder, or that of an earlier call, which goes on there.")],
    methods: Annotated[
        str,
        typer.Option(
            metavar="NAME[,NAME...]",
            help=f"Methods ({', '.join(METHODS)}, or trainers of yours); 'pooled': plain nnU-Net on all data together; "
            "VARIANT=NAME: a method again, for --option.",
        ),
    ] = "local,pooled,fedavg",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each method.")] = 3,
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD.NAME=VALUE", help="An option of a method or variant; repeat for more. The tables tell it."
        ),
    ] = None,
    study_options: StudyOptions,
    nsd_tolerance: Annotated[float, typer.Option(min=0.0, help="Tolerance of NSD in mm.")] = TOLERANCE,
    machine: MachineOptions,
) -> None:
    """Train every method on the same sites, plans, start and budget, and say how they differ, with intervals."""
    from nnunet_fed.comparison.arms import Comparison
    from nnunet_fed.comparison.arms import compare as run
    from nnunet_fed.comparison.results import write_results
    from nnunet_fed.comparison.tables import tables
    from nnunet_fed.evaluation.surface import require_monai

    names, variants = _methods(methods)
    comparison = Comparison(
        sites.folders(), out, names, tuple(range(seed, seed + seeds)), study_options.settings(),
        _by_method(option or []), variants, sites.label_maps(), machine.kind, machine.threads,
        study_options.pretrained, machine.gpus,
    )  # fmt: skip
    require_monai()
    console = error_console()
    left_out = run(comparison, console)
    content = write_results(comparison, nsd_tolerance, left_out, console)
    for table in tables(content):
        Console().print(table.rich())
    typer.echo(f"All figures stand in {out}: compare.json, compare.csv and compare.md.")


def _methods(text: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """Names of all that is compared, and the method of those that are variants, out of ``NAME,VARIANT=NAME``."""
    given = [part.partition("=") for part in text.split(",") if part.strip()]
    variants = {name.strip(): method.strip() for name, separator, method in given if separator}
    return tuple(name.strip() for name, _, _ in given), variants


def _by_method(options: list[str]) -> dict[str, dict[str, Any]]:
    """Options by method out of ``METHOD.NAME=VALUE``."""
    given: dict[str, dict[str, Any]] = {}
    for option, value in named_values(options).items():
        method, separator, name = option.partition(".")
        if not separator or not name:
            raise ConfigurationError(f"--option {option}: name the method too, as in --option fedgs.strength=2.")
        given.setdefault(method, {})[name] = value
    return given
