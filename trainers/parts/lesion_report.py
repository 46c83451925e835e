"""``lesions.json`` beside nnU-Net's validation results: Dice and recall by lesion size. Source: ours."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nnunetv2.configuration import default_num_processes
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from rich.console import Console
from rich.progress import Progress

from nnunet_fed.errors import FederationError
from nnunet_fed.evaluation.lesions import SMALL_LESIONS, CaseResult, aggregate, evaluate, foreground_classes
from nnunet_fed.files import write_json
from nnunet_fed.study.federation import PLANS_KEY

FILE = "lesions.json"


def evaluate_lesions(trainer: nnUNetTrainer) -> None:
    """Compare the predictions of a validation with the references, lesion by lesion; on rank 0 only.

    Writes ``validation/lesions.json``: what :func:`nnunet_fed.evaluation.lesions.aggregate` says of all cases, the
    thresholds that the plans carry (``small_lesions``; plans made before they did have none, so no lesion is small or
    large), and under ``cases`` each lesion and the number of false positives, by case and class.

    Args:
        trainer: which has validated.

    Raises:
        FederationError: a case cannot be compared; names it.
    """
    if trainer.local_rank != 0:
        return
    folder = Path(trainer.output_folder) / "validation"
    ending, labels = trainer.dataset_json["file_ending"], trainer.dataset_json["labels"]
    references = Path(trainer.preprocessed_dataset_folder_base) / "gt_segmentations"
    thresholds = trainer.plans_manager.plans[PLANS_KEY].get(SMALL_LESIONS, {})
    make_reader = trainer.plans_manager.image_reader_writer_class

    def of_case(file: Path) -> dict[str, CaseResult]:
        case, reader = file.name.removesuffix(ending), make_reader()
        try:
            reference, _ = reader.read_seg(str(references / file.name))
            prediction, _ = reader.read_seg(str(file))
            # the images' spacing, as in planning: a label file need not have one
            *_, properties = trainer.dataset_class(trainer.preprocessed_dataset_folder, [case]).load_case(case)
            return evaluate(reference[0], prediction[0], properties["spacing"], labels, thresholds)
        except Exception as error:  # the readers raise whatever their libraries do
            raise FederationError(
                f"The prediction {file} cannot be compared with the reference in {references}: "
                f"{type(error).__name__}: {error}. Restore both files, then validate again with --val."
            ) from error

    files = {file.name.removesuffix(ending): file for file in sorted(folder.glob(f"*{ending}"))}
    # threads, since reading and decompressing happen outside Python
    with ThreadPoolExecutor(default_num_processes) as pool, Progress(console=Console(stderr=True)) as progress:
        results = pool.map(of_case, files.values())
        cases = dict(zip(files, progress.track(results, len(files), description="Comparing lesions"), strict=True))
    content: dict[str, Any] = {
        SMALL_LESIONS: {name: thresholds.get(name) for name in foreground_classes(labels)},
        **aggregate(cases.values()),
        "cases": {case: {name: asdict(result) for name, result in found.items()} for case, found in cases.items()},
    }
    write_json(folder / FILE, content)
    trainer.print_to_log_file(f"Dice and recall by lesion size are in {folder / FILE}.")
