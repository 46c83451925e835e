"""Options of a command line that make a study, for ``simulate`` and ``compare`` alike. Source: ours."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from nnunet_fed.cli.option_values import whole_number
from nnunet_fed.study.methods import METHODS

Sites = Annotated[list[str], typer.Option("--site", metavar="NAME=FOLDER", help="A site and its raw data.")]
FederatedMethod = Annotated[
    str,
    typer.Option(metavar="NAME", help=f"Federated method: {', '.join(METHODS)}; or a trainer of yours."),
]
Rounds = Annotated[int, typer.Option(help="Exchanges in all.")]
LocalEpochs = Annotated[int, typer.Option(help="nnU-Net epochs between two exchanges.")]
Iterations = Annotated[int, typer.Option(help="Steps of an epoch.")]
ValIterations = Annotated[int, typer.Option(help="Steps of an epoch's online validation.")]
Configuration = Annotated[str, typer.Option(help="nnU-Net configuration.")]
Planner = Annotated[str, typer.Option(help="Planner; the small one suits a CPU.")]
LearningRate = Annotated[float, typer.Option(help="Initial learning rate.")]
Momentum = Annotated[float, typer.Option(help="Momentum.")]
Weighting = Annotated[str, typer.Option(help="Weight of a site in a mean: cases or uniform.")]
Deadline = Annotated[float, typer.Option(help="Deadline of a round.")]
Labels = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[SITE:]LABEL=OWN,...", help="Which labels of the sites, or of one, become LABEL; repeat for more."
    ),
]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(help="Threads of each site; default: its share of the cores.")]


def study_settings(
    *,
    config: str,
    planner: str,
    fold: str,
    rounds: int,
    local_epochs: int,
    iterations: int,
    val_iterations: int,
    lr: float,
    momentum: float,
    weighting: str,
    deadline_minutes: float,
    cross_site: bool,
) -> dict[str, Any]:
    """The same, by the names of ``federation.toml``; a bad fold raises :class:`ConfigurationError`."""
    return {
        "configuration": config, "planner": planner,
        "fold": fold if fold == "all" else whole_number("--fold", fold), "rounds": rounds,
        "local_epochs": local_epochs, "iterations_per_epoch": iterations, "val_iterations_per_epoch": val_iterations,
        "initial_lr": lr, "momentum": momentum, "weighting": weighting, "deadline_minutes": deadline_minutes,
        "planning_deadline_minutes": deadline_minutes, "cross_site": cross_site,
    }  # fmt: skip
