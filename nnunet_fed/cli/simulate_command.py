"""``nnunet_fed simulate``: a federation on this machine."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console

from nnunet_fed.cli import study_options
from nnunet_fed.cli.option_values import named_folders, named_labels, named_values
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.methods import method_settings
from nnunet_fed.study.toml import explain


class Until(str, Enum):
    """How far a simulation goes."""

    plan = "plan"
    train = "train"
    validate = "validate"


def simulate(
    sites: study_options.Sites,
    out: Annotated[Path, typer.Option(help="A new folder for everything that the simulation writes.")],
    method: study_options.FederatedMethod = "fedavg",
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="An option of the method; repeat for more.")
    ] = None,
    rounds: study_options.Rounds = 10,
    local_epochs: study_options.LocalEpochs = 1,
    iterations: study_options.Iterations = 250,
    val_iterations: study_options.ValIterations = 10,
    config: study_options.Configuration = "3d_fullres",
    planner: study_options.Planner = "nnUNetPlannerFedSmall",
    lr: study_options.LearningRate = 0.01,
    momentum: study_options.Momentum = 0.99,
    seed: Annotated[int, typer.Option(help="Seed of the study.")] = 0,
    fold: Annotated[str, typer.Option(help="Cross-validation fold, or all.")] = "0",
    weighting: study_options.Weighting = "cases",
    min_sites: Annotated[int | None, typer.Option(help="Least number of sites in a round; default: all.")] = None,
    deadline_minutes: study_options.Deadline = 60.0,
    cross_site: Annotated[bool, typer.Option("--cross-site", help="Evaluate each site's model at each site.")] = False,
    planned: Annotated[
        Path | None, typer.Option(help="Folder of an earlier simulation of these sites: take its plans.")
    ] = None,
    labels: study_options.Labels = None,
    until: Annotated[Until, typer.Option(help="Where to stop.")] = Until.validate,
    device: study_options.Device = "cpu",
    threads: study_options.Threads = None,
) -> None:
    """Run a whole federation on this machine: real processes, the real network, nnU-Net's own commands."""
    from nnunet_fed.simulation.simulate import Simulation, lesion_table, result_table
    from nnunet_fed.simulation.simulate import simulate as run

    folders = named_folders(sites)
    settings = study_options.study_settings(
        config=config, planner=planner, fold=fold, rounds=rounds, local_epochs=local_epochs, iterations=iterations,
        val_iterations=val_iterations, lr=lr, momentum=momentum, weighting=weighting,
        deadline_minutes=deadline_minutes, cross_site=cross_site,
    )  # fmt: skip
    settings |= {
        "name": out.resolve().name, "sites": tuple(folders), "seed": seed, "min_sites": min_sites,
        "method": method_settings(method, named_values(option or [])),
    }  # fmt: skip
    try:
        study = Federation.model_validate(settings)
    except ValidationError as error:
        raise ConfigurationError(explain(error, Federation)) from None
    console = Console(stderr=True)
    maps = named_labels(labels or [], folders)
    summary = run(Simulation(folders, out, study, until.value, device, threads, planned, maps), console)
    for table in (result_table(summary), lesion_table(summary)):
        if table is not None:
            Console().print(table)
