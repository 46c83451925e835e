"""``nnunet_fed compare``: which method is better on these sites, and by how much."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.options import named_folders, named_labels, named_values, whole_number

TOLERANCE = 2.0
"""Of NSD in mm; ours. Choose it by what two readers of the structure differ by."""


class Weighting(str, Enum):
    """What a site weighs in a mean."""

    cases = "cases"
    uniform = "uniform"


def compare(
    sites: Annotated[list[str], typer.Option("--site", metavar="NAME=FOLDER", help="A site and its raw data.")],
    out: Annotated[Path, typer.Option(help="A new folder, or that of an earlier call, which goes on there.")],
    methods: Annotated[
        str, typer.Option(metavar="NAME[,NAME...]", help="Methods; 'pooled': plain nnU-Net on all data together.")
    ] = "local,pooled,fedavg",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each method.")] = 3,
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="METHOD.NAME=VALUE", help="An option of a method; repeat for more. The tables tell it."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Exchanges in all.")] = 10,
    local_epochs: Annotated[int, typer.Option(help="nnU-Net epochs between two exchanges.")] = 1,
    iterations: Annotated[int, typer.Option(help="Steps of an epoch.")] = 250,
    val_iterations: Annotated[int, typer.Option(help="Steps of an epoch's online validation.")] = 10,
    config: Annotated[str, typer.Option(help="nnU-Net configuration.")] = "3d_fullres",
    planner: Annotated[str, typer.Option(help="Planner; the small one suits a CPU.")] = "nnUNetPlannerFedSmall",
    lr: Annotated[float, typer.Option(help="Initial learning rate.")] = 0.01,
    momentum: Annotated[float, typer.Option(help="Momentum.")] = 0.99,
    fold: Annotated[str, typer.Option(help="Cross-validation fold.")] = "0",
    weighting: Annotated[Weighting, typer.Option(help="Weight of a site in a mean.")] = Weighting.cases,
    deadline_minutes: Annotated[float, typer.Option(help="Deadline of a round.")] = 60.0,
    cross_site: Annotated[
        bool, typer.Option("--cross-site", help="Evaluate each site's model at each site, too; not with gcml.")
    ] = False,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[SITE:]LABEL=OWN,...", help="Which labels of the sites, or of one, become LABEL; repeat for more."
        ),
    ] = None,
    nsd_tolerance: Annotated[float, typer.Option(min=0.0, help="Tolerance of NSD in mm.")] = TOLERANCE,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Threads of each site; default: its share of the cores.")] = None,
) -> None:
    """Train every method on the same sites, plans, start and budget, and say how they differ, with intervals."""
    from nnunet_fed.comparison import Comparison
    from nnunet_fed.comparison import compare as run
    from nnunet_fed.comparison_results import write_results
    from nnunet_fed.comparison_tables import tables
    from nnunet_fed.surface import require_monai

    folders = named_folders(sites)
    settings: dict[str, Any] = {
        "planner": planner, "configuration": config,
        "fold": fold if fold == "all" else whole_number("--fold", fold), "rounds": rounds,
        "local_epochs": local_epochs, "iterations_per_epoch": iterations, "val_iterations_per_epoch": val_iterations,
        "initial_lr": lr, "momentum": momentum, "weighting": weighting.value, "deadline_minutes": deadline_minutes,
        "planning_deadline_minutes": deadline_minutes,
    }  # fmt: skip
    if cross_site:  # only then: comparisons made before there was this option go on
        settings["cross_site"] = True
    names = tuple(name.strip() for name in methods.split(",") if name.strip())
    maps = named_labels(labels or [], folders)
    comparison = Comparison(
        folders, out, names, tuple(range(seed, seed + seeds)), settings, _by_method(option or []), maps, device, threads
    )
    require_monai()
    console = Console(stderr=True)
    left_out = run(comparison, console)
    content = write_results(comparison, nsd_tolerance, left_out, console)
    for table in tables(content):
        Console().print(table.rich())
    typer.echo(f"All figures stand in {out}: compare.json, compare.csv and compare.md.")


def _by_method(options: list[str]) -> dict[str, dict[str, Any]]:
    """Options by method out of ``METHOD.NAME=VALUE``."""
    given: dict[str, dict[str, Any]] = {}
    for option, value in named_values(options).items():
        method, separator, name = option.partition(".")
        if not separator or not name:
            raise ConfigurationError(f"--option {option}: name the method too, as in --option fedgs.strength=2.")
        given.setdefault(method, {})[name] = value
    return given
