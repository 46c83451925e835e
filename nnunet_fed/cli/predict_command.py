"""``nnunet_fed predict``: the super model, with the options of nnU-Net's own command."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from nnunet_fed.cli.option_values import whole_number
from nnunet_fed.errors import ConfigurationError


class PredictionDevice(str, Enum):
    """Where the networks run."""

    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


def predict(
    source: Annotated[Path, typer.Option("-i", metavar="IN", help="Images, named as in nnU-Net's raw data sets.")],
    out: Annotated[Path, typer.Option("-o", metavar="OUT", help="Where the segmentations and routing.json go.")],
    model: Annotated[Path, typer.Option("-m", metavar="MODEL_FOLDER", help="With plans.json and fedsm_bundle.json.")],
    folds: Annotated[
        list[str] | None, typer.Option("-f", metavar="FOLD ...", help="Folds; default: all that were trained.")
    ] = None,
    previous_stage: Annotated[
        Path | None,
        typer.Option("-prev_stage_predictions", metavar="FOLDER", help="What the first stage of a cascade predicted."),
    ] = None,
    gamma: Annotated[
        float | None, typer.Option(help="Threshold of a site's probability; default: the study's.")
    ] = None,
    force: Annotated[
        str | None, typer.Option(metavar="SITE|global", help="Predict every case with this model.")
    ] = None,
    device: Annotated[
        PredictionDevice, typer.Option("-device", help="Where the networks run.")
    ] = PredictionDevice.cuda,
    step_size: Annotated[float, typer.Option("-step_size", help="Step of the sliding window, up to 1.")] = 0.5,
    disable_tta: Annotated[bool, typer.Option("--disable_tta", help="No mirroring.")] = False,
    save_probabilities: Annotated[bool, typer.Option("--save_probabilities", help="Write these too.")] = False,
    continue_prediction: Annotated[
        bool, typer.Option("--continue_prediction", help="Leave predicted cases alone.")
    ] = False,
    preprocessing: Annotated[int, typer.Option("-npp", help="Processes for preprocessing.")] = 3,
    export: Annotated[int, typer.Option("-nps", help="Processes for resampling and writing.")] = 3,
) -> None:
    """Predict with a FedSM model: for each case the selector chooses a site's model or the global one."""
    import torch

    from nnunet_fed.prediction.predictor import ROUTING, SuperModelPredictor

    if not 0 < step_size <= 1:
        raise ConfigurationError(f"-step_size {step_size:g}: it must be above 0 and at most 1.")
    if (device is PredictionDevice.cuda and not torch.cuda.is_available()) or (
        device is PredictionDevice.mps and not torch.backends.mps.is_available()
    ):
        raise ConfigurationError(f"-device {device.value}: torch finds no such device here; use -device cpu.")
    if device is PredictionDevice.cuda:
        torch.set_num_threads(1)  # as nnU-Net does: more do not help a GPU
    predictor = SuperModelPredictor(
        gamma=gamma,
        force=force,
        tile_step_size=step_size,
        use_mirroring=not disable_tta,
        device=torch.device(device.value),
    )
    wanted = None if folds is None else [fold if fold == "all" else whole_number("-f", fold) for fold in folds]
    predictor.initialize_from_trained_model_folder(str(model), wanted)
    counts = predictor.predict_folder(
        source,
        out,
        previous_stage=previous_stage,
        save_probabilities=save_probabilities,
        continue_prediction=continue_prediction,
        processes_preprocessing=preprocessing,
        processes_export=export,
    )
    for (choice, reason), number in sorted(counts.items()):
        typer.echo(f"{choice} ({reason}): {number} cases")
    typer.echo(f"Which case went where stands in {out / ROUTING}.")
