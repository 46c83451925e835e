"""A site that comes once the federation has planned: it takes the plans as they are. Source: ours."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from nnunet_fed.agreement.fingerprint import INTENSITIES, own_intensities
from nnunet_fed.agreement.fingerprint_files import COMMON, keep_own
from nnunet_fed.agreement.plan_digest import plans_digest
from nnunet_fed.datasets.folds import FoldChoice
from nnunet_fed.errors import ConfigurationError, DisagreementError
from nnunet_fed.evaluation.lesions import SMALL_LESIONS
from nnunet_fed.exchange.keys import PUBLISHED
from nnunet_fed.files import write_json
from nnunet_fed.planners.dataset import check_agreement, describe
from nnunet_fed.planners.enough_cases import check_cases, trained_fold, warn_of_little_room
from nnunet_fed.planners.extraction import extract
from nnunet_fed.planners.harmonised import planner_class
from nnunet_fed.planners.mapping import prepare_dataset
from nnunet_fed.planners.other_results import require_no_other_results
from nnunet_fed.planners.planning import (
    DESCRIPTIONS,
    PlanningResult,
    make_planner,
    preprocess,
    wanted_configurations,
)
from nnunet_fed.study.federation import PLANS_KEY, Federation
from nnunet_fed.study.labels import LabelMap

_REMEDY = "It is this site that has to change, since the others have planned; then join again."


class JoiningCommunicator(Protocol):
    """What a site needs that joins: it reads what the others have gathered, and contributes nothing."""

    site: str

    def gathered(self, key: str) -> dict[str, Any] | None:
        """What the sites have gathered under a key; ``None``: nothing yet."""
        ...

    def note(self, text: str) -> None:
        """Tell the coordinator what happened, for the record."""
        ...


def join_and_preprocess(
    communicator: JoiningCommunicator,
    study: Federation,
    dataset_id: int,
    configurations: Sequence[str] | None = None,
    processes: int = 8,
    report: Callable[[str], None] = lambda phase: None,
    *,
    labels: LabelMap | None = None,
    base_trainer: str | None = None,
    folds: FoldChoice = FoldChoice.keep,
) -> PlanningResult:
    """Take the fingerprint and the plans of a federation that has planned, and preprocess by them.

    This site's data do not change the plans: none of their properties is sent but the number of cases, in the note with
    which the coordinator's record says that it joined. So do its plans (``joined`` under ``federation``). Arguments as
    in :func:`nnunet_fed.planners.planning.plan_and_preprocess`, but for the communicator.

    Raises:
        ConfigurationError: the federation has not planned yet, or has planned with this site; or as in planning.
        DisagreementError: this site's data set does not go with those of the others; shows where.
        FederationError: a case cannot be preprocessed.
    """
    report("checking")
    dataset = prepare_dataset(dataset_id, labels, processes)
    check_cases(communicator.site, dataset, study, folds)
    require_no_other_results(dataset, planner_class(study.planner), study)
    descriptions, published = communicator.gathered(DESCRIPTIONS), communicator.gathered(PUBLISHED)
    if descriptions is None or published is None:
        raise ConfigurationError(
            "The sites of this federation have not planned yet, so there are no plans to join. Plan with them: the "
            "same command without --join."
        )
    if communicator.site in descriptions:
        raise ConfigurationError(
            f"Site '{communicator.site}' has planned with the others. To preprocess again, give the command without "
            "--join."
        )
    own = describe(dataset, study.planner, base_trainer)
    check_agreement({**descriptions, communicator.site: own}, study.method, _REMEDY)
    agreed = next(answer for answer in published.values() if answer is not None)
    total_cases = sum(description["training cases"] for description in descriptions.values())
    fingerprint, published_digest = agreed["fingerprint"], plans_digest(agreed["plans"])
    report("extracting")
    local = extract(dataset.id, len(dataset.cases), processes)
    dataset.preprocessed.mkdir(parents=True, exist_ok=True)
    keep_own(dataset.preprocessed, local)
    if study.method.own_channels:
        fingerprint = {**fingerprint, INTENSITIES: own_intensities(local)}
    write_json(dataset.preprocessed / COMMON, fingerprint, indent=4)

    report("planning")
    # plans that were published before there was such a key have none
    about = {"joined": True, **{key: agreed[key] for key in (SMALL_LESIONS,) if key in agreed}}
    planner = make_planner(planner_class(study.planner), dataset, study, total_cases, fingerprint, **about)
    plans = {
        **agreed["plans"],
        "dataset_name": dataset.name,
        "plans_name": planner.plans_identifier,
        "image_reader_writer": planner.determine_reader_writer().__name__,
        "experiment_planner_used": type(planner).__name__,
    }
    if study.method.own_channels:
        _fill_in_channels(plans, planner)
    wanted = wanted_configurations(plans, study, configurations)
    shutil.copy(dataset.folder / "dataset.json", dataset.preprocessed)  # as nnU-Net's planner does
    planner.save_plans(plans)
    if plans[PLANS_KEY]["plans_digest"] != published_digest:
        raise DisagreementError(f"The plans of site '{communicator.site}' are not those that the federation published.")
    planned_by = ", ".join(descriptions)
    communicator.note(f"joined after planning, with {len(dataset.cases)} cases: the plans are those of {planned_by}")

    report("preprocessing")
    warn_of_little_room(dataset, local, plans, wanted)
    preprocess(communicator.site, dataset, planner.plans_identifier, plans, wanted, processes)
    report("planned")
    return PlanningResult(
        dataset.name,
        planner.plans_identifier,
        plans[PLANS_KEY]["plans_digest"],
        wanted,
        total_cases,
        len(dataset.cases),
        fold=trained_fold(dataset, study),
    )


def _fill_in_channels(plans: dict[str, Any], planner: Any) -> None:
    """What depends on this site's channels, as its planner would plan it; the others have not published theirs."""
    plans[INTENSITIES] = planner.dataset_fingerprint[INTENSITIES]
    schemes, masks = planner.determine_normalization_scheme_and_whether_mask_is_used_for_norm()
    for configuration in plans["configurations"].values():
        if "inherits_from" not in configuration:
            configuration |= {"normalization_schemes": schemes, "use_mask_for_norm": masks}
