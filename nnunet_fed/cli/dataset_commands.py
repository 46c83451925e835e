"""``nnunet_fed split`` and ``phantom``: data of several sites, to try a federation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nnunet_fed.cli.option_values import whole_numbers
from nnunet_fed.errors import ConfigurationError


def split(
    folder: Annotated[Path, typer.Argument(help="A pooled data set in nnU-Net's raw layout.")],
    out: Annotated[Path, typer.Argument(help="Where the sites' folders go.")],
    by: Annotated[str | None, typer.Option(help="Column of its cases.csv that names the site.")] = None,
    sites: Annotated[int | None, typer.Option(help="Number of sites, filled at random.")] = None,
    alpha: Annotated[float | None, typer.Option(help="With --sites: Dirichlet skew of the sizes.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many cases a site.")] = None,
    seed: Annotated[int, typer.Option(help="With --sites: another draw.")] = 0,
) -> None:
    """Make site folders from a pooled data set."""
    from nnunet_fed.datasets.findings import FILE, error_console, require
    from nnunet_fed.datasets.split import split_at_random, split_by_column
    from nnunet_fed.inspection.look import look_at

    if (by is None) == (sites is None):
        raise ConfigurationError("Give either --by COLUMN or --sites N.")
    if by is not None and alpha is not None:
        raise ConfigurationError("--alpha goes with --sites.")
    look = look_at(folder, str(folder), out / FILE)
    look.report.show(error_console())
    if look.report.findings:
        look.write(out / FILE)
    require([look.report], "nothing was split")
    made = (
        split_by_column(folder, out, by, limit) if by else split_at_random(folder, out, sites or 0, alpha, limit, seed)
    )
    for site, cases in made.items():
        print(f"{out / site}: {len(cases)} cases")


def phantom(
    out: Annotated[Path, typer.Argument(help="Where the data set goes.")],
    sites: Annotated[int | None, typer.Option(help="Number of sites; default: as --cases, or 3.")] = None,
    cases: Annotated[
        str, typer.Option(metavar="N[,N...]", help="Training cases a site; several numbers: of each site in turn.")
    ] = "16",
    val_cases: Annotated[
        int, typer.Option(help="Further cases of each site, for validation only; default: nnU-Net's own folds.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Another seed, other images.")] = 0,
    organs: Annotated[bool, typer.Option("--organs", help="Another organ at each site, one kind of lesion.")] = False,
    phases: Annotated[
        int, typer.Option(help="Phases of a contrast agent, 1 to 4: each case is in one, and looks different in each.")
    ] = 1,
    coarse: Annotated[
        float, typer.Option(metavar="FACTOR", help="Voxels so many times as long: smaller images, faster trainings.")
    ] = 1.0,
) -> None:
    """Write the built-in demo data: an organ with lesions, seen by a different scanner at each site."""
    from nnunet_fed.datasets.phantom import write_phantom

    sizes = whole_numbers("--cases", cases)
    if sites is None:
        sites = 3 if len(sizes) == 1 else len(sizes)
    each = sizes[0] if len(sizes) == 1 else sizes
    written = write_phantom(out, sites, each, seed, organs=organs, val_cases=val_cases, phases=phases, coarse=coarse)
    for folder in written.values():
        print(folder)
    print(out / "test")
