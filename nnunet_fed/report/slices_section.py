"""Slices of images with reference and prediction, of the worst, median and best case: for runs on this machine only."""

from __future__ import annotations

import base64
import io
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas

from nnunet_fed.datasets.description import read_description
from nnunet_fed.datasets.listing import list_cases
from nnunet_fed.evaluation.lesions import foreground_classes
from nnunet_fed.report.blocks import Figure, Paragraph, Section, number
from nnunet_fed.report.charts import COLOURS
from nnunet_fed.report.gather import Run
from nnunet_fed.report.results_section import case_dice

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]
LONGEST_SIDE = 400
"""Pixels of a slice; larger ones are thinned out."""


def slices_section(run: Run, folder: Path) -> Section:
    """Three cases of the run's deployed models.

    Args:
        run: a simulation.
        folder: where it lies.
    """
    section = Section("images", "Images")
    cases = sorted(_ranked(run, folder), key=lambda case: case[0])
    if not cases:
        return section
    chosen = {"Worst": cases[0], "Median": cases[(len(cases) - 1) // 2], "Best": cases[-1]}
    for kind, (dice, site, name, prediction, image) in chosen.items():
        reference = _reference(folder, site, name, prediction)
        if reference is None:
            continue
        figure = _figure(kind, dice, site, name, (image, reference, prediction), run.sites[site].labels)
        if figure is not None:
            section.blocks.append(figure)
    if section.blocks:
        text = (
            "The slice of each case that holds most of the reference. Solid line: reference; dashed line: prediction."
        )
        section.blocks.insert(0, Paragraph(text))
    return section


def _ranked(run: Run, folder: Path) -> Iterator[tuple[float, str, str, Path, Path]]:
    """Mean Dice, site, case, prediction and image of each validation case whose files are there."""
    for site, files in run.sites.items():
        predictions = {
            path.name: path
            for path in (folder / "sites" / site / "nnUNet_results").glob("*/*/fold_*/validation/*")
            if path.is_file() and path.suffix not in (".json", ".npz", ".pkl")
        }
        for entry_name, classes in case_dice(files.validation.get("final", {})).items():
            found = [path for name, path in predictions.items() if name.partition(".")[0] == entry_name]
            known = [value for value in classes.values() if math.isfinite(value)]
            image = _image(folder / "sites" / site, entry_name)
            if found and known and image is not None:
                yield sum(known) / len(known), site, entry_name, found[0], image


def _image(place: Path, case: str) -> Path | None:
    """The first channel of a case."""
    pattern = re.compile(re.escape(case) + r"_0000\..+")
    folders = sorted((place / "nnUNet_raw").glob("*/imagesTr"))
    for folder in folders:
        for path in sorted(folder.iterdir()):
            if pattern.fullmatch(path.name):
                return path
    for description in (place / "nnUNet_raw").glob("*/dataset.json"):  # with a list of files
        content, _ = read_description(description)
        if content and "dataset" in content and case in (cases := list_cases(description.parent, content).cases):
            return Path(cases[case]["images"][0])
    return None


def _reference(folder: Path, site: str, case: str, prediction: Path) -> Path | None:
    """nnU-Net's copy of the reference, which has the labels that were trained."""
    folders = (folder / "sites" / site / "nnUNet_preprocessed").glob("*/gt_segmentations")
    ending = prediction.name[len(case) :]
    return next((path for place in folders if (path := place / (case + ending)).is_file()), None)


def _read(path: Path) -> Array:
    """Voxels of shape (z, y, x); of colours the mean."""
    import SimpleITK

    image = SimpleITK.ReadImage(str(path))
    voxels: Array = SimpleITK.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() > 1:
        voxels = voxels[..., :3].mean(-1)
    return voxels[None] if voxels.ndim == 2 else voxels


def _figure(
    kind: str, dice: float, site: str, case: str, paths: tuple[Path, Path, Path], labels: dict[str, Any]
) -> Figure | None:
    try:
        image, reference, prediction = map(_read, paths)
    except RuntimeError as error:  # whatever SimpleITK cannot read
        logger.warning("The images of %s at %s cannot be shown: %s", case, site, type(error).__name__)
        return None
    if image.shape != reference.shape or image.shape != prediction.shape:
        logger.warning("The images of %s at %s are not shown, since their shapes differ.", case, site)
        return None
    place = int((reference > 0).sum((1, 2)).argmax())
    step = math.ceil(max(image.shape[1:]) / LONGEST_SIDE)
    shown, truth, guess = (volume[place, ::step, ::step] for volume in (image, reference, prediction))
    low, high = np.percentile(shown, (0.5, 99.5))
    classes = foreground_classes(labels) or {"foreground": tuple(range(1, int(reference.max()) + 1))}
    with mpl.rc_context({"font.size": 9.0, "font.family": "DejaVu Sans", "text.parse_math": False}):
        canvas = Canvas(figsize=(4.4, 2.6), layout="constrained")
        FigureCanvasAgg(canvas)
        for axes, title in zip(canvas.subplots(1, 2), ("image", "reference and prediction"), strict=True):
            axes.imshow(shown, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), interpolation="nearest")
            axes.set_title(title)
            axes.set_axis_off()
        overlay = canvas.axes[1]
        for index, (name, values) in enumerate(classes.items()):
            colour = ("#56B4E9", "#E69F00", "#CC79A7", "#F0E442", *COLOURS)[index % (4 + len(COLOURS))]
            for mask, style in ((np.isin(truth, values), "solid"), (np.isin(guess, values), "dashed")):
                if mask.any() and not mask.all():
                    overlay.contour(mask, levels=[0.5], colors=[colour], linestyles=[style], linewidths=1.4)
            overlay.plot([], [], color=colour, label=name)
        canvas.legend(loc="outside lower center", ncols=min(4, len(classes)), frameon=False)
        picture = io.BytesIO()
        canvas.savefig(picture, format="png", dpi=140, metadata={"Software": None})
    source = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    caption = f"{kind} case: {case} of {site}, Dice {number(dice)}."
    told = f"Slice {place + 1} of {len(image)} of case {case} of {site}, plain and outlined (reference, prediction)."
    return Figure(source, f"{told} Classes: {', '.join(classes)}. Dice {number(dice)}.", caption)
