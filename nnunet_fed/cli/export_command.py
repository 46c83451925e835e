"""``nnunet_fed export``: a trained model as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nnunet_fed.prediction.checkpoint_files import FINAL_CHECKPOINT


def export(
    model: Annotated[Path, typer.Option("-m", metavar="MODEL_FOLDER", help="With plans.json and the folds.")],
    out: Annotated[Path, typer.Option("-o", metavar="FILE", help="The zip file.")],
    folds: Annotated[
        list[str] | None, typer.Option("-f", metavar="FOLD ...", help="Folds; default: all that were trained.")
    ] = None,
    checkpoints: Annotated[
        list[str] | None, typer.Option("-chk", metavar="NAME ...", help=f"Checkpoints; default: {FINAL_CHECKPOINT}.")
    ] = None,
) -> None:
    """Put a model into one file for nnUNetv2_install_pretrained_model_from_zip; no validation is needed."""
    from nnunet_fed.prediction.export import export_model

    for name in export_model(model, out, folds, checkpoints or (FINAL_CHECKPOINT,)):
        typer.echo(name)
    typer.echo(f"Install it elsewhere with: nnUNetv2_install_pretrained_model_from_zip {out}")
