"""Planning and preprocessing at one site, in step with the others."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess_dataset

from nnunet_fed.agreement.fingerprint import INTENSITIES, LocalFingerprint, own_intensities
from nnunet_fed.agreement.fingerprint_files import COMMON, keep_own
from nnunet_fed.agreement.odd_plans import ODD, far_from_own, require_voxels, thin_patches
from nnunet_fed.agreement.plan_digest import comparable, differences
from nnunet_fed.agreement.stages import FIRST_STAGES, to_preprocess
from nnunet_fed.datasets.folds import FoldChoice
from nnunet_fed.datasets.preprocessed import complete_marker, is_complete
from nnunet_fed.errors import ConfigurationError, DisagreementError, FederationError
from nnunet_fed.evaluation.lesions import SMALL_LESIONS, small_lesion_thresholds
from nnunet_fed.exchange.communicator import Collectives
from nnunet_fed.exchange.keys import PLANNING, PLANS, PUBLISHED, key_of
from nnunet_fed.files import NEXT_TO_NOTHING, free_bytes, in_words, move, no_room, write_json
from nnunet_fed.planners.answered import FILE, AnsweredCollectives
from nnunet_fed.planners.beginning_anew import KeptExtraction
from nnunet_fed.planners.dataset import PLAN_AGAIN, RawDataset, check_agreement, describe, file_states
from nnunet_fed.planners.enough_cases import check_cases, trained_fold, warn_of_little_room
from nnunet_fed.planners.explanation import Row, explain
from nnunet_fed.planners.extraction import extract
from nnunet_fed.planners.geometry import harmonised_planner
from nnunet_fed.planners.harmonised import check_preprocessor, planner_class
from nnunet_fed.planners.leftovers import (
    bring_folds_up_to_date,
    drop_newer_references,
    note_cases,
)
from nnunet_fed.planners.mapping import prepare_dataset
from nnunet_fed.planners.other_results import require_no_other_results
from nnunet_fed.study.federation import PLANS_KEY, Federation, Fold
from nnunet_fed.study.labels import LabelMap

logger = logging.getLogger(__name__)
DESCRIPTIONS = key_of(PLANNING, "dataset")
"""Key of what the sites compare."""
_LINES_SHOWN = 30
_LARGE = {*FIRST_STAGES, *FIRST_STAGES.values()}
"""Configurations that nnU-Net does not plan for every data set."""


@dataclass(frozen=True)
class PlanningResult:
    """What planning and preprocessing left at this site."""

    dataset_name: str
    plans_name: str
    plans_digest: str
    """Digest of all that is equal in every site's plans."""
    configurations: tuple[str, ...]
    """Configurations that are preprocessed."""
    total_cases: int
    """Training cases at all sites."""
    local_cases: int
    """Training cases at this site."""
    explanation: tuple[Row, ...] = field(default=(), compare=False)
    """What this site would have planned alone; none if it is not known."""
    odd_plans: tuple[str, ...] = ()
    """What had better be looked at before anybody trains; the same at all sites, and logged."""
    fold: Fold = 0
    """That this site trains: the study's, or ``all`` where it has too few cases for a cross-validation."""


@dataclass(frozen=True)
class Agreement:
    """What the sites have agreed on, at one of them."""

    dataset: RawDataset
    local: LocalFingerprint
    planner: Any
    plans: dict[str, Any]
    total_cases: int
    odd_plans: tuple[str, ...]
    """As in :class:`PlanningResult`, of the configurations that were asked about."""


def plan_and_preprocess(
    communicator: Collectives,
    study: Federation,
    dataset_id: int,
    configurations: Sequence[str] | None = None,
    processes: int = 8,
    report: Callable[[str], None] = lambda phase: None,
    *,
    labels: LabelMap | None = None,
    base_trainer: str | None = None,
    folds: FoldChoice = FoldChoice.keep,
    kept: KeptExtraction | None = None,
) -> PlanningResult:
    """Agree with the other sites on a fingerprint, plan from it, make sure that all plans are equal, and preprocess.

    Every site calls this for its own data set; it returns once this site has preprocessed. Nothing is sent before the
    local checks have passed. Plans on which the sites do not agree are set aside as ``*.refused.json``.

    Args:
        communicator: this site's; all keys begin with ``planning/``.
        study: names the planner and, if it says so, the plans; travels in the plans under ``federation``.
        dataset_id: nnU-Net's number of this site's data set.
        configurations: what this site will train; ``None``: the study's configuration.
        processes: worker processes for extraction and preprocessing.
        report: called with the name of each phase that begins: checking, extracting, harmonising, planning,
            preprocessing, planned.
        labels: this site's label map; with one, all work is done on the mapped data set, which is built first.
        base_trainer: name and digest of the one that the study names, which the sites compare; ``None``: it names none.
        folds: what becomes of those of an earlier training.
        kept: what an earlier call has extracted, if this command plans anew.

    Raises:
        ConfigurationError: nnU-Net's paths, the data set, the planner or a configuration is wrong.
        DisagreementError: the sites' data sets or plans differ; shows where.
        WithdrawnError: a site has withdrawn what it told: the sites plan anew
            (:func:`nnunet_fed.planners.beginning_anew.plan_with_corrections`).
        FederationError: a case cannot be analysed or preprocessed.
    """
    agreement = agree(
        communicator, study, dataset_id, processes, report, labels=labels, base_trainer=base_trainer, folds=folds,
        kept=kept, asked=asked_configurations(study, configurations),
    )  # fmt: skip
    dataset, planner, plans = agreement.dataset, agreement.planner, agreement.plans
    wanted = wanted_configurations(plans, study, configurations)

    report("preprocessing")
    warn_of_little_room(dataset, agreement.local, plans, wanted)
    preprocess(communicator.site, dataset, planner.plans_identifier, plans, wanted, processes)
    explanation = explain(planner, agreement.local, plans, study.overwrite_target_spacing)
    report("planned")
    return PlanningResult(
        dataset.name,
        planner.plans_identifier,
        plans[PLANS_KEY]["plans_digest"],
        wanted,
        agreement.total_cases,
        len(dataset.cases),
        explanation,
        agreement.odd_plans,
        trained_fold(dataset, study),
    )


def agree(
    communicator: Collectives,
    study: Federation,
    dataset_id: int,
    processes: int,
    report: Callable[[str], None] = lambda phase: None,
    *,
    labels: LabelMap | None = None,
    base_trainer: str | None = None,
    folds: FoldChoice = FoldChoice.keep,
    keep_look: bool = True,
    asked: Sequence[str] = (),
    kept: KeptExtraction | None = None,
) -> Agreement:
    """The part of :func:`plan_and_preprocess` before preprocessing: all that needs the other sites.

    Without ``keep_look``, what was read of the files is not kept for the next time. Plans by which this site cannot
    preprocess what is ``asked`` for are not agreed on, so that a site can still correct what it has told.
    """
    report("checking")
    make = planner_class(study.planner)
    check_preprocessor(study.preprocessor_name)
    dataset = prepare_dataset(dataset_id, labels, processes, keep_look=keep_look)
    check_cases(communicator.site, dataset, study, folds)
    require_no_other_results(dataset, make, study)
    descriptions = communicator.gather(DESCRIPTIONS, describe(dataset, study.planner, base_trainer))
    check_agreement(descriptions, study.method)
    total_cases = sum(description["training cases"] for description in descriptions.values())

    communicator = AnsweredCollectives(communicator, dataset.preprocessed / FILE)
    report("extracting")
    own_channels = study.method.own_channels
    pooled = len(dataset.cases) if own_channels else total_cases
    local = (kept or KeptExtraction()).unless_changed(
        [pooled, dataset.json, file_states(dataset.cases)], lambda: extract(dataset.id, pooled, processes)
    )
    intensities = own_intensities(local) if own_channels else None
    dataset.preprocessed.mkdir(parents=True, exist_ok=True)
    keep_own(dataset.preprocessed, local)

    report("harmonising")
    small_lesions = {
        SMALL_LESIONS: small_lesion_thresholds(communicator, key_of(PLANNING, "lesions"), local.lesion_volumes)
    }
    planner = harmonised_planner(
        communicator,
        local,
        study.geometry,
        lambda fingerprint: make_planner(make, dataset, study, total_cases, fingerprint, **small_lesions),
        intensities,
    )
    write_json(dataset.preprocessed / COMMON, planner.dataset_fingerprint, indent=4)

    report("planning")
    plans = planner.plan_experiment()
    # for sites that join later; it is the same everywhere, so one copy is enough
    fingerprint = {**planner.dataset_fingerprint, **({INTENSITIES: {}} if own_channels else {})}
    published = {"fingerprint": fingerprint, "plans": comparable(plans), **small_lesions}
    wanted = [needed for name in asked if name in plans["configurations"] for needed in to_preprocess(plans, name)]
    try:
        _agree_on_plans(communicator, plans)
        odd_plans = tuple(thin_patches(plans, wanted))
        for text in (*odd_plans, *far_from_own(local, plans, wanted)):
            logger.warning("%s%s", ODD, text)
        require_voxels(communicator.site, local, plans, wanted)
        communicator.gather(PUBLISHED, published if communicator.site == next(iter(descriptions)) else None)
    except FederationError:
        move(planner.plans_file, planner.plans_file.with_suffix(".refused.json"))
        raise
    return Agreement(dataset, local, planner, plans, total_cases, odd_plans)


def make_planner(
    make: Any,
    dataset: RawDataset,
    study: Federation,
    total_cases: int,
    fingerprint: dict[str, Any],
    **about: Any,
) -> Any:
    """The planner of this site's data set.

    Args:
        make: the planner's class.
        dataset: this site's data set.
        study: what the plans carry.
        total_cases: training cases at all sites.
        fingerprint: of all sites.
        about: what this site's plans carry beside the study.
    """
    carried = {"name": study.name, "digest": study.digest_of_fold(study.fold), "study": study.stored(), **about}
    options = {
        "plans_name": study.plans_name,
        "overwrite_target_spacing": study.overwrite_target_spacing,
        "gpu_memory_target_in_gb": study.gpu_memory_target_in_gb,
        "preprocessor_name": study.preprocessor_name,
    }
    given = {name: value for name, value in options.items() if value is not None}
    return make(dataset.id, fingerprint=fingerprint, total_cases=total_cases, study=carried, **given)


def _agree_on_plans(communicator: Collectives, plans: dict[str, Any]) -> None:
    digests = communicator.gather(PLANS, {"digest": plans[PLANS_KEY]["plans_digest"]})
    if len({answer["digest"] for answer in digests.values()}) == 1:
        return
    lines = differences(communicator.gather(key_of(PLANS, "full"), comparable(plans)))
    more = [f"... and {len(lines) - _LINES_SHOWN} more"] if len(lines) > _LINES_SHOWN else []
    raise DisagreementError(
        "The sites have planned from the same fingerprint, but their plans differ:\n\n"
        + "\n".join(lines[:_LINES_SHOWN] + more)
        + f"\n\nInstall the same versions of nnU-Net and its dependencies at all sites. {PLAN_AGAIN}"
    )


def asked_configurations(study: Federation, configurations: Sequence[str] | None) -> list[str]:
    """What a site's command names, or else the study."""
    return list(dict.fromkeys(configurations or [study.configuration]))


def wanted_configurations(
    plans: dict[str, Any], study: Federation, configurations: Sequence[str] | None
) -> tuple[str, ...]:
    """What a site preprocesses: what its command names, or else the study; for a cascade what both stages train on.

    Raises:
        ConfigurationError: the plans have no such configuration.
    """
    asked, there = asked_configurations(study, configurations), plans["configurations"]
    missing = [name for name in asked if name not in there]
    if missing:
        cascade = " nnU-Net plans 3d_lowres and the cascade only where images are much larger than a patch."
        raise ConfigurationError(
            f"The plans of this federation have no configuration {', '.join(missing)}; there are {', '.join(there)}. "
            f"Set 'configuration' in federation.toml to one of these.{cascade if {*missing} & _LARGE else ''}"
        )
    return tuple(dict.fromkeys(needed for name in asked for needed in to_preprocess(plans, name)))


def preprocess(
    site: str, dataset: RawDataset, plans_name: str, plans: dict[str, Any], wanted: Sequence[str], processes: int
) -> None:
    """Preprocess what is not preprocessed yet; raises :class:`FederationError`.

    Args:
        site: name of this site.
        dataset: its data set.
        plans_name: name of the plans file.
        plans: its content.
        wanted: configurations.
        processes: worker processes.
    """
    folders = {name: dataset.preprocessed / plans["configurations"][name]["data_identifier"] for name in wanted}
    open_ones = [name for name in wanted if not is_complete(folders[name])]
    for name in wanted:
        if name in open_ones:
            complete_marker(folders[name]).unlink(missing_ok=True)
        else:
            logger.info("%s is preprocessed already in %s", name, folders[name].name)
    drop_newer_references(dataset)
    try:
        # also without a configuration: it brings the references in gt_segmentations up to date
        preprocess_dataset(dataset.id, plans_name, open_ones, [processes])
    except Exception as error:  # whatever nnU-Net and its readers raise
        told = in_words(error, str(dataset.preprocessed)) if isinstance(error, OSError) else None
        if told is None and free_bytes(dataset.preprocessed) < NEXT_TO_NOTHING:  # Blosc does not say why
            told = no_room(dataset.preprocessed)
        if told is not None:
            for name in open_ones:  # it is made anew, and the room is needed
                shutil.rmtree(folders[name], ignore_errors=True)
            raise told from error
        raise FederationError(
            f"Site '{site}' cannot preprocess {dataset.name}: {type(error).__name__}: {error}. "
            "If a worker died, use fewer processes; then plan again."
        ) from error
    for name in open_ones:
        write_json(complete_marker(folders[name]), {"configuration": name, "cases": len(dataset.cases)}, indent=4)
    bring_folds_up_to_date(dataset)
    note_cases(dataset)
