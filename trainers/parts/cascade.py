"""nnU-Net's cascade at one site: what a stage predicts for the next one, and what the next one needs before it trains.

Source: ours. The stages are trainings of their own, each federated; what passes from one to the next stays at the site.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_fed.agreement.stages import to_preprocess
from nnunet_fed.datasets.folds import SPLITS, read_folds
from nnunet_fed.errors import ConfigurationError

if TYPE_CHECKING:
    from nnunet_fed.trainers.parts.study_trainer import StudyTrainer

_SHOWN = 3


@contextmanager
def predicting_next_stages(trainer: StudyTrainer) -> Iterator[None]:
    """Let nnU-Net's validation predict for those next stages whose cases are preprocessed here; it fails for others."""
    ready = [name for name in trainer.configuration_manager.next_stage_names or () if _is_preprocessed(trainer, name)]
    for name in sorted(set(trainer.configuration_manager.next_stage_names or ()) - set(ready)):
        plans, needed = trainer.plans_manager, to_preprocess(trainer.plans_manager.plans, name)[-1]
        trainer.print_to_log_file(
            f"{needed} is not preprocessed here, so nothing is predicted for {name}. To train that later: "
            f"nnUNetv2_preprocess -d {plans.dataset_name} -plans_name {plans.plans_name} -c {needed}, then this "
            "training's command with --val."
        )
    with _with_next_stages(trainer, ready):
        yield


@contextmanager
def without_next_stages(trainer: StudyTrainer) -> Iterator[None]:
    """Let nnU-Net's validation predict for no next stage: the network is not the one that this site deploys."""
    with _with_next_stages(trainer, []):
        yield


@contextmanager
def _with_next_stages(trainer: StudyTrainer, names: list[str]) -> Iterator[None]:
    own = trainer.configuration_manager
    trainer.configuration_manager = ConfigurationManager({**own.configuration, "next_stage": names or None})
    try:
        yield
    finally:
        trainer.configuration_manager = own


def _is_preprocessed(trainer: StudyTrainer, configuration: str) -> bool:
    identifier = trainer.plans_manager.get_configuration(configuration).data_identifier
    folder = Path(nnUNet_preprocessed) / trainer.plans_manager.dataset_name / identifier
    try:
        infer_dataset_class(str(folder))
    except (FileNotFoundError, AssertionError):  # it is not there, or has no cases
        return False
    return True


def require_previous_stage(trainer: StudyTrainer, cases: Sequence[str]) -> None:
    """See that the previous stage of a cascade has predicted these cases, as the plans are now.

    Args:
        trainer: of any configuration; without a previous stage nothing is looked at.
        cases: their names.

    Raises:
        ConfigurationError: names the folds of the previous stage that this site has to train.
    """
    if not trainer.is_cascaded:
        return
    wanted = sorted(set(cases))
    missing = [case for case in wanted if not _is_predicted(trainer, case)]
    if missing:
        manager, previous = trainer.plans_manager, trainer.configuration_manager.previous_stage_name
        folds = _folds_with(trainer, missing)
        more = ", ..." if len(missing) > _SHOWN else ""
        raise ConfigurationError(
            f"{trainer.configuration_name} trains on what {previous} predicts, and of {len(missing)} of this site's "
            f"{len(wanted)} cases ({', '.join(missing[:_SHOWN])}{more}) there is no prediction that fits in "
            f"{trainer.folder_with_segs_from_previous_stage}. First train fold {', '.join(folds)} of {previous} with "
            f"the other sites ('nnUNetv2_train {manager.dataset_name} {previous} {folds[0]} "
            f"-tr {type(trainer).__name__} -p {manager.plans_name}'), up to the end of its validation; if it is "
            "trained, repeat the validation with --val."
        )


def _is_predicted(trainer: StudyTrainer, case: str) -> bool:
    data, *_ = trainer.dataset_class(trainer.preprocessed_dataset_folder, [case]).load_case(case)
    both = trainer.dataset_class(
        trainer.preprocessed_dataset_folder,
        [case],
        folder_with_segs_from_previous_stage=trainer.folder_with_segs_from_previous_stage,
    )
    try:
        _, _, predicted, _ = both.load_case(case)
    except (OSError, RuntimeError, ValueError):  # it is not there, or half a file
        return False
    return tuple(predicted.shape[-3:]) == tuple(data.shape[1:])  # if not, it is of older plans


def _folds_with(trainer: StudyTrainer, cases: Sequence[str]) -> list[Any]:
    """Folds of the previous stage whose validation predicts these cases."""
    splits = Path(trainer.preprocessed_dataset_folder_base) / SPLITS
    if trainer.fold == "all" or not splits.is_file():
        return ["all"]
    folds = read_folds(splits)
    found: list[Any] = [str(number) for number, fold in enumerate(folds) if set(cases) & set(fold["val"])]
    in_none = set(cases) - {case for fold in folds for case in fold["val"]}
    return ["all"] if in_none else found
