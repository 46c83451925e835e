"""A trained model as one file, which nnU-Net's own command installs elsewhere. Source: ours.

nnU-Net's ``nnUNetv2_export_model_to_zip`` wants a validation, and puts its figures with the names of the cases into the
file. Here is what prediction reads, and nothing else.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.files import replacing
from nnunet_fed.prediction.bundle import BUNDLE, Bundle, FoldBundle, fold_of, verify_fold
from nnunet_fed.prediction.checkpoint_files import FINAL_CHECKPOINT


def export_model(
    model_folder: Path, out: Path, folds: Sequence[str] | None = None, checkpoints: Sequence[str] = (FINAL_CHECKPOINT,)
) -> list[str]:
    """Write plans, data set description and checkpoints into a zip file; with FedSM all that its super model needs.

    Args:
        model_folder: nnU-Net's, with ``plans.json`` and the folds' folders.
        out: the file; an existing one is replaced once the new one is complete.
        folds: their numbers, or ``all``; ``None``: those that have the first of the checkpoints.
        checkpoints: names of files in a fold's folder.

    Returns:
        What is in it, by path below nnU-Net's folder of results.

    Raises:
        ConfigurationError: a file is missing, or ``out`` cannot be written.
        FederationError: a file of a super model is not the one that its bundle describes.
    """
    folder = model_folder.resolve()
    trained = sorted(path.parent.name.removeprefix("fold_") for path in folder.glob(f"fold_*/{checkpoints[0]}"))
    wanted = trained if folds is None else list(dict.fromkeys(folds))
    if not wanted:
        raise ConfigurationError(
            f"No fold in {model_folder} has a {checkpoints[0]}: give the folder of a model whose training has ended "
            "(with fold_0 and plans.json in it), or name another checkpoint with -chk."
        )
    files = [folder / "plans.json", folder / "dataset.json"]
    entries: dict[str, FoldBundle] = {}
    for fold in wanted:
        entry = fold_of(folder, fold)
        if entry is not None:
            verify_fold(folder, fold, entry)
            entries[fold] = entry
        names = dict.fromkeys([*checkpoints, *(entry.sha256 if entry is not None else ())])
        files += [folder / f"fold_{fold}" / name for name in names]
    missing = [str(path.relative_to(folder)) for path in files if not path.is_file()]
    if missing:
        raise ConfigurationError(f"{model_folder} lacks {', '.join(missing)}: copy it again, or choose folds with -f.")
    root = folder.parents[1]
    told = [path.relative_to(root).as_posix() for path in files]
    try:
        with replacing(out) as part, zipfile.ZipFile(part, "w") as archive:  # weights cannot be compressed
            for path, name in zip(files, list(told), strict=True):
                archive.write(path, name)
            if entries:
                told.append((folder / BUNDLE).relative_to(root).as_posix())
                archive.writestr(told[-1], Bundle(folds=entries).model_dump_json(indent=2))
    except OSError as error:
        raise ConfigurationError(f"{out} cannot be written: {error.strerror}.") from None
    return told
