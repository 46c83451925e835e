"""``nnunet_fed plan_and_preprocess``: at a site, before it trains."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from nnunet_fed.datasets.folds import FoldChoice
from nnunet_fed.errors import ConfigurationError, DisagreementError
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.site import Site

if TYPE_CHECKING:
    from nnunet_fed.planners.planning import PlanningResult

LEASE = "planning.lock"
"""In the data set's preprocessed folder: which process plans it (:mod:`nnunet_fed.leases`)."""


def plan_and_preprocess(
    dataset: Annotated[int, typer.Option("-d", metavar="ID", help="nnU-Net's number of this site's data set.")],
    configurations: Annotated[
        list[str] | None,
        typer.Option("-c", metavar="CONFIG ...", help="Configurations to preprocess; default: the study's."),
    ] = None,
    processes: Annotated[int, typer.Option("-np", help="Processes for extraction and preprocessing.")] = 4,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what this site would send, and stop.")] = False,
    folds: Annotated[
        FoldChoice,
        typer.Option(
            help="What becomes of the folds of an earlier training where cases were added or removed: keep brings them "
            "up to date, and no case goes from training to validation; new makes folds anew."
        ),
    ] = FoldChoice.keep,
    join: Annotated[bool, typer.Option("--join", help="Take the plans of a federation that has planned.")] = False,
    correct: Annotated[
        bool, typer.Option("--correct", help="Withdraw what this site has told wrongly: all sites plan anew.")
    ] = False,
) -> None:
    """Agree with the other sites on plans, and preprocess this site's data by them."""
    from nnunet_fed.leases import taken
    from nnunet_fed.planners.dataset import preprocessed_folder
    from nnunet_fed.planners.dry_run import dry_run_planning
    from nnunet_fed.simulation.simulate import require_trainer
    from nnunet_fed.transport.site.client import GrpcCommunicator

    if dry_run and join:
        raise ConfigurationError("--dry-run goes without --join, which sends nothing of this site's data.")
    if correct and (dry_run or join):
        raise ConfigurationError(
            f"--correct goes without {'--dry-run' if dry_run else '--join'}, which tells nothing that could be "
            "withdrawn."
        )
    site = Site.from_environment()
    if dry_run:
        study = Federation.restore(GrpcCommunicator(site).status()["study"])
        base = require_trainer(study)
        dry_run_planning(site, study, dataset, processes, partial(print, file=sys.stdout), base_trainer=base)
        return
    folder = preprocessed_folder(dataset)
    with taken(folder / LEASE, f"The data set {dataset} is being planned already"):
        _plan(site, dataset, folder, configurations, processes, folds, join, correct)


def _plan(
    site: Site, dataset: int, folder: Path, configurations: list[str] | None, processes: int, folds: FoldChoice,
    join: bool, correct: bool,
) -> None:  # fmt: skip
    from nnunet_fed.exchange.outgoing_log import FILE, OutgoingLog
    from nnunet_fed.planners.beginning_anew import KeptExtraction, plan_with_corrections
    from nnunet_fed.planners.explanation import explanation_table
    from nnunet_fed.planners.joining import join_and_preprocess
    from nnunet_fed.planners.planning import plan_and_preprocess as plan
    from nnunet_fed.simulation.simulate import require_trainer
    from nnunet_fed.transport.site.client import GrpcCommunicator

    outgoing = OutgoingLog(folder / FILE)
    communicator = GrpcCommunicator(site, outgoing=outgoing, corrects=correct)
    study = communicator.join("planning")

    def report(phase: str) -> None:
        communicator.report({"phase": phase, "rounds": study.rounds}, wait=True)

    run = join_and_preprocess if join else partial(plan, kept=KeptExtraction())

    def once(study: Federation) -> PlanningResult:
        base, labels = require_trainer(study), site.label_map
        return run(
            communicator, study, dataset, configurations, processes, report, labels=labels, base_trainer=base,
            folds=folds,
        )  # fmt: skip

    try:
        result = plan_with_corrections(communicator, study, once)
    except BaseException as error:
        report("failed")
        if isinstance(error, DisagreementError) and (join or communicator.site == study.sites[0]):  # once is enough
            communicator.note(str(error))
        raise
    if result.explanation:
        Console().print(explanation_table(result.explanation))
    if result.odd_plans and communicator.site == study.sites[0]:  # once is enough
        communicator.note("before anybody trains: " + " ".join(result.odd_plans))
    planned_by = "as the federation published them" if join else f"the same at all {len(study.sites)} sites"
    print(
        f"{result.dataset_name}: {result.local_cases} cases, plans {result.plans_name} ({result.plans_digest[:12]}) of "
        f"{result.total_cases} cases, {planned_by}; preprocessed: {', '.join(result.configurations)}\n"
        f"Train with: nnUNetv2_train {result.dataset_name} {result.configurations[0]} {result.fold} "
        f"-tr {study.method.trainer_name} -p {result.plans_name}\n"
        f"All that this site has sent is listed in {outgoing.path}."
    )
