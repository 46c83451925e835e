"""``nnunet_fed simulate``: a federation on this machine."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console

from nnunet_fed.cli.option_values import named_values
from nnunet_fed.cli.shared_options import MachineOptions, SiteOptions, StudyOptions, grouped
from nnunet_fed.datasets.findings import error_console
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.methods import METHODS, method_settings
from nnunet_fed.study.toml import explain


class Until(str, Enum):
    """How far a simulation goes."""

    plan = "plan"
    train = "train"
    validate = "validate"


@grouped
def simulate(
    *,
    sites: SiteOptions,
    out: Annotated[Path, typer.Option(help="A new folder for everything that the simulation writes.")],
    method: Annotated[
        str, typer.Option(metavar="NAME", help=f"Federated method: {', '.join(METHODS)}; or a trainer of yours.")
    ] = "fedavg",
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="An option of the method; repeat for more.")
    ] = None,
    study_options: StudyOptions,
    seed: Annotated[int, typer.Option(help="Seed of the study.")] = 0,
    min_sites: Annotated[int | None, typer.Option(help="Least number of sites in a round; default: all.")] = None,
    planned: Annotated[
        Path | None, typer.Option(help="Folder of an earlier simulation of these sites: take its plans.")
    ] = None,
    until: Annotated[Until, typer.Option(help="Where to stop.")] = Until.validate,
    machine: MachineOptions,
) -> None:
    """Run a whole federation on this machine: real processes, the real network, nnU-Net's own commands."""
    from nnunet_fed.simulation.simulate import Simulation, lesion_table, result_table
    from nnunet_fed.simulation.simulate import simulate as run

    folders = sites.folders()
    settings = {
        **study_options.settings(), "name": out.resolve().name, "sites": tuple(folders), "seed": seed,
        "min_sites": min_sites, "method": method_settings(method, named_values(option or [])),
    }  # fmt: skip
    try:
        study = Federation.model_validate(settings)
    except ValidationError as error:
        raise ConfigurationError(explain(error, Federation)) from None
    console = error_console()
    maps = sites.label_maps()
    simulation = Simulation(
        folders, out, study, until.value, machine.kind, machine.threads, planned, maps,
        pretrained=study_options.pretrained, devices=machine.gpus,
    )  # fmt: skip
    summary = run(simulation, console)
    for table in (result_table(summary), lesion_table(summary)):
        if table is not None:
            Console().print(table)
