"""Validation of FedSM's global and super model, by nnU-Net's own prediction and evaluation. Source: ours."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2.configuration import default_num_processes
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder

from nnunet_fed.exchange.keys import VALIDATION, key_of
from nnunet_fed.methods.fedsm import GLOBAL
from nnunet_fed.prediction.bundle import FoldBundle, ValidationDice, fold_of, load_tensors
from nnunet_fed.prediction.routing import Router
from nnunet_fed.trainers.fedsm.super_model import write_bundle
from nnunet_fed.trainers.parts.further_validation import below, mean_dice, predict_cases, weights_of
from nnunet_fed.trainers.parts.lesion_report import evaluate_lesions

if TYPE_CHECKING:
    from nnunet_fed.trainers.nnUNetTrainerFedSM import nnUNetTrainerFedSM

SUPER = "super"


def validate_global_and_super(trainer: nnUNetTrainerFedSM, save_probabilities: bool) -> None:
    """What stands in ``validation`` of the personalized model, in ``global/validation`` and ``super/validation``.

    With ``best_model_gate`` the sites compare their models in between, if the training runs in this process.

    Args:
        trainer: which has validated its personalized model.
        save_probabilities: as in nnU-Net.
    """
    trainer.validate_global(save_probabilities)
    folder = Path(trainer.output_folder)
    if trainer.options.best_model_gate and trainer.is_connected:
        dice = {"personal": mean_dice(folder) or 0.0, "common": mean_dice(folder / GLOBAL) or 0.0}
        gathered = trainer.communicator.gather(key_of(VALIDATION, "dice"), dice)
        if trainer.local_rank == 0:
            write_bundle(trainer, {site: ValidationDice(**values) for site, values in gathered.items()})
    entry = fold_of(folder.parent, trainer.fold)
    if entry is not None:
        _validate_super(trainer, folder, entry, save_probabilities)


def _validate_super(trainer: nnUNetTrainerFedSM, folder: Path, entry: FoldBundle, save_probabilities: bool) -> None:
    router = Router(folder.parent, {str(trainer.fold): entry}, gamma=None, force=None)
    chosen: dict[str, list[str]] = {}
    for case, seen in trainer.selector_cases("validation").items():
        chosen.setdefault(router.choose_for(seen)[0].choice, []).append(case)
    counts = {choice: len(cases) for choice, cases in sorted(chosen.items())}
    trainer.note_facts(super_model_choices=counts)
    trainer.print_to_log_file(f"Models that the super model chooses for the validation cases: {counts}")
    sources = {entry.site: folder, GLOBAL: folder / GLOBAL}
    for site in sorted(chosen.keys() - sources.keys()):
        weights = load_tensors(folder / entry.personal_checkpoints[site])["network_weights"]
        with weights_of(trainer, weights), below(trainer, SUPER):
            predict_cases(trainer, chosen[site], save_probabilities)
    if trainer.local_rank == 0:
        _collect(trainer, folder, {source: chosen.get(choice, []) for choice, source in sources.items()})
        with below(trainer, SUPER):
            evaluate_lesions(trainer)


def _collect(trainer: nnUNetTrainerFedSM, folder: Path, chosen: dict[Path, list[str]]) -> None:
    """Put predictions that are there already beside those of the super model, and evaluate all as nnU-Net does."""
    out = folder / SUPER / "validation"
    out.mkdir(parents=True, exist_ok=True)
    for source, cases in chosen.items():
        for case in cases:
            for file in (source / "validation").glob(f"{case}.*"):
                shutil.copyfile(file, out / file.name)
    labels = trainer.label_manager
    compute_metrics_on_folder(
        str(Path(trainer.preprocessed_dataset_folder_base) / "gt_segmentations"),
        str(out),
        str(out / "summary.json"),
        trainer.plans_manager.image_reader_writer_class(),
        trainer.dataset_json["file_ending"],
        labels.foreground_regions if labels.has_regions else labels.foreground_labels,
        labels.ignore_label,
        chill=True,
        num_processes=default_num_processes,
    )
