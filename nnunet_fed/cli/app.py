"""One command with subcommands; thin. Whatever is heavy is imported by the subcommand that needs it."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from enum import Enum
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console

from nnunet_fed import __version__
from nnunet_fed.cli import certs_command, study_options
from nnunet_fed.cli.check_command import check
from nnunet_fed.cli.compare_command import compare
from nnunet_fed.cli.option_values import named_folders, named_labels, named_values, repeat_option, whole_numbers
from nnunet_fed.cli.peer_command import peer
from nnunet_fed.cli.predict_command import predict
from nnunet_fed.cli.report_command import report
from nnunet_fed.errors import ConfigurationError, DisagreementError, FederationError
from nnunet_fed.study.federation import WATCHER, Federation
from nnunet_fed.study.site import Site
from nnunet_fed.study.toml import explain

DEBUG_VARIABLE = "nnUNet_fed_debug"

app = typer.Typer(
    name="nnunet_fed",
    help="Train one nnU-Net at several hospitals without sharing an image.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line; errors end in one sentence, unless ``--debug`` asks for the traceback."""
    try:
        app(args=repeat_option(repeat_option(sys.argv[1:], "-c"), "-f"))
    except FederationError as error:
        _end(error, str(error), status=2)
    except (KeyboardInterrupt, BrokenPipeError) as error:
        _end(error, "interrupted", status=130)
    except Exception as error:
        _end(error, f"{type(error).__name__}: {error} (nnunet_fed --debug shows where)", status=1)


def _end(error: BaseException, sentence: str, status: int) -> None:
    if os.environ.get(DEBUG_VARIABLE):
        raise error
    print(f"Error: {sentence}", file=sys.stderr, flush=True)
    sys.exit(status)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


CertificateFile = Annotated[Path | None, typer.Option("--cert", metavar="FILE", help="Certificate (PEM), for TLS.")]
KeyFile = Annotated[Path | None, typer.Option("--key", metavar="FILE", help="Its private key.")]
AuthorityFile = Annotated[
    Path | None, typer.Option("--ca", metavar="FILE", help="Authorities whose certificates are accepted.")
]


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)


@app.command()
def init(folder: Annotated[Path, typer.Argument(help="Where to write them.")] = Path()) -> None:
    """Write a commented federation.toml and site.toml to start from."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("federation.toml", "site.toml")
    for name in names:
        if (folder / name).exists():
            raise ConfigurationError(f"{folder / name} is there already; choose another folder or remove it.")
    for name in names:
        (folder / name).write_text((resources.files("nnunet_fed") / "templates" / name).read_text())
        print(folder / name)


@app.command()
def coordinator(
    study: Annotated[Path, typer.Argument(metavar="FEDERATION.toml", help="The study.")],
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Address to listen on.")],
    state: Annotated[Path, typer.Option(metavar="DIR", help="The coordinator's memory.")],
    cert: CertificateFile = None,
    key: KeyFile = None,
    ca: AuthorityFile = None,
    revoked: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Certificates no longer accepted; read again when it changes.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS; on a loopback address only.")] = False,
    new_attempt: Annotated[bool, typer.Option("--new-attempt", help="Let all sites plan and train anew.")] = False,
    spool_quota: Annotated[
        float, typer.Option("--spool-quota-gb", min=0.001, help="Disk for uploads until they are reduced.")
    ] = 100.0,
    http: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Show /status and /metrics (Prometheus) here; default: no.")
    ] = None,
    http_insecure: Annotated[
        bool, typer.Option("--http-insecure", help="Let --http be an address that other machines reach.")
    ] = False,
    log_json: Annotated[bool, typer.Option("--log-json", help="Log a JSON object a line.")] = False,
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write TensorBoard scalars of rounds and sites there.")
    ] = None,
) -> None:
    """Serve a study: all sites reach this one process, which sees weights and numbers but no image."""
    from nnunet_fed.coordinator.coordinator import Coordinator
    from nnunet_fed.coordinator.store import Store
    from nnunet_fed.coordinator.tracking import FederationTracker
    from nnunet_fed.logs import log_as_json
    from nnunet_fed.transport.channel.allocator import COORDINATOR, keep_buffers
    from nnunet_fed.transport.channel.tls import KeyFiles
    from nnunet_fed.transport.coordinator.http import StatusServer
    from nnunet_fed.transport.coordinator.server import CoordinatorServer

    if http_insecure and http is None:
        raise ConfigurationError("--http-insecure goes with --http.")
    if log_json:
        log_as_json()
    keep_buffers(COORDINATOR)
    keys = KeyFiles.given(cert, key, ca)
    federation = Federation.read(study)
    tracker = FederationTracker(tensorboard) if tensorboard is not None else None
    coordinator = Coordinator(federation, Store(state), new_attempt, int(spool_quota * 1e9), tracker)
    pages = StatusServer(coordinator, http, http_insecure) if http is not None else None
    server = CoordinatorServer(coordinator, listen, insecure, keys, revoked, pages.meter if pages else None)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    server.start()
    if pages is not None:
        pages.start()
    print(f"'{federation.name}' for {', '.join(federation.sites)} on {server.address}", flush=True)
    stopped.wait()
    if pages is not None:
        pages.stop()
    server.stop()
    coordinator.close()


@app.command()
def status(
    address: Annotated[
        str | None, typer.Option("--coordinator", metavar="HOST:PORT", help="Default: the one in site.toml.")
    ] = None,
    cert: CertificateFile = None,
    key: KeyFile = None,
    ca: AuthorityFile = None,
    server_name: Annotated[
        str | None, typer.Option(metavar="HOST", help="The coordinator's name in its certificate, if it differs.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole record once, as JSON.")] = False,
    once: Annotated[bool, typer.Option("--once", help="Print the table once.")] = False,
) -> None:
    """Watch a coordinator: who is doing what, and for whom the others wait."""
    from nnunet_fed.coordinator.watch import status_table, watch
    from nnunet_fed.transport.site.client import GrpcCommunicator

    seat = GrpcCommunicator(_watcher(address, cert, key, ca, server_name))
    if as_json:
        print(json.dumps(seat.status(record=True), indent=2))
    elif once:
        Console().print(status_table(seat.status()))
    else:
        watch(seat.status, lambda: True, Console())


def _watcher(
    address: str | None, cert: Path | None, key: Path | None, ca: Path | None, server_name: str | None
) -> Site:
    """Settings of a seat that only looks: as in site.toml, or as given."""
    from nnunet_fed.transport.channel.tls import KeyFiles

    keys = KeyFiles.given(cert, key, ca)
    if (keys and address is None) or (server_name and keys is None):
        raise ConfigurationError(
            "--coordinator, --cert, --key and --ca go together, and --server-name goes with them. Without them, what "
            "stands in site.toml is used."
        )
    if address is None:
        return Site.from_environment()
    try:
        return Site(
            name=WATCHER, coordinator=address, certificate=cert, key=key, ca=ca, server_name=server_name,
            insecure=keys is None,
        )  # fmt: skip
    except ValidationError as error:
        raise ConfigurationError(f"--{explain(error, Site)}") from None


@app.command("plan_and_preprocess")
def plan_and_preprocess(
    dataset: Annotated[int, typer.Option("-d", metavar="ID", help="nnU-Net's number of this site's data set.")],
    configurations: Annotated[
        list[str] | None,
        typer.Option("-c", metavar="CONFIG ...", help="Configurations to preprocess; default: the study's."),
    ] = None,
    processes: Annotated[int, typer.Option("-np", help="Processes for extraction and preprocessing.")] = 4,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what this site would send, and stop.")] = False,
    join: Annotated[bool, typer.Option("--join", help="Take the plans of a federation that has planned.")] = False,
) -> None:
    """Agree with the other sites on plans, and preprocess this site's data by them."""
    from nnunet_fed.exchange.outgoing_log import FILE, OutgoingLog
    from nnunet_fed.planners.dataset import preprocessed_folder
    from nnunet_fed.planners.dry_run import rehearse
    from nnunet_fed.planners.explanation import explanation_table
    from nnunet_fed.planners.joining import join_and_preprocess
    from nnunet_fed.planners.planning import plan_and_preprocess as plan
    from nnunet_fed.transport.site.client import GrpcCommunicator

    if dry_run and join:
        raise ConfigurationError("--dry-run goes without --join, which sends nothing of this site's data.")
    site = Site.from_environment()
    if dry_run:
        seat = GrpcCommunicator(site)
        rehearse(
            site, Federation.model_validate(seat.status()["study"]), dataset, processes, partial(print, file=sys.stdout)
        )
        return
    outgoing = OutgoingLog(preprocessed_folder(dataset) / FILE)
    seat = GrpcCommunicator(site, outgoing=outgoing)
    study = seat.join("planning")

    def report(phase: str) -> None:
        seat.report({"phase": phase, "rounds": study.rounds}, wait=True)

    run = join_and_preprocess if join else plan
    try:
        result = run(seat, study, dataset, configurations, processes, report, labels=site.label_map)
    except BaseException as error:
        report("failed")
        if isinstance(error, DisagreementError) and (join or seat.site == study.sites[0]):  # once is enough
            seat.note(str(error))
        raise
    if result.explanation:
        Console().print(explanation_table(result.explanation))
    planned_by = "as the federation published them" if join else f"the same at all {len(study.sites)} sites"
    print(
        f"{result.dataset_name}: {result.local_cases} cases, plans {result.plans_name} ({result.plans_digest[:12]}) of "
        f"{result.total_cases} cases, {planned_by}; preprocessed: {', '.join(result.configurations)}\n"
        f"All that this site has sent is listed in {outgoing.path}."
    )


@app.command("plugin-path")
def plugin_path() -> None:
    """Print the folder for nnUNet_extTrainer, through which nnU-Net finds the federated trainers."""
    from nnunet_fed.simulation.simulate import plugin_folder

    print(plugin_folder())


@app.command()
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
    from nnunet_fed.datasets.split import split_at_random, split_by_column

    if (by is None) == (sites is None):
        raise ConfigurationError("Give either --by COLUMN or --sites N.")
    if by is not None and alpha is not None:
        raise ConfigurationError("--alpha goes with --sites.")
    made = (
        split_by_column(folder, out, by, limit) if by else split_at_random(folder, out, sites or 0, alpha, limit, seed)
    )
    for site, cases in made.items():
        print(f"{out / site}: {len(cases)} cases")


@app.command()
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


app.command()(check)
app.command()(predict)
app.command()(compare)
app.command()(report)
app.command()(peer)
app.add_typer(certs_command.app)


class Until(str, Enum):
    """How far a simulation goes."""

    plan = "plan"
    train = "train"
    validate = "validate"


@app.command()
def simulate(
    sites: study_options.Sites,
    out: Annotated[Path, typer.Option(help="A new folder for everything that the simulation writes.")],
    method: Annotated[str, typer.Option(help="Federated method.")] = "fedavg",
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
        "name": out.resolve().name, "sites": tuple(folders), "method": {"name": method, **named_values(option or [])},
        "seed": seed, "min_sites": min_sites,
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
