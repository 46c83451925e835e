"""What is wrong with a case, from what was read of its files: each file, the images together, the label with them.

Geometry is judged as ``verify_dataset_integrity`` of nnU-Net does: another shape or spacing is an error, another
origin or direction a warning. Source: ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunet_fed.datasets.findings import Finding, Severity, counted
from nnunet_fed.inspection.reading import FOURTH, MOST_VALUES, OVERWRITE, VECTOR, FileFacts, sidecar_of
from nnunet_fed.inspection.unfit import GREY, INDICES

SPACING_TOLERANCE = 1e-3
"""Relative: headers have float32 and texts of a few digits."""
ORIGIN_TOLERANCE = 1e-2
"""In voxels."""
DIRECTION_TOLERANCE = 1e-3
NOISE = 1e-3
"""A label's value so close to a whole number is that number with rounding noise."""

Read = tuple[str, FileFacts]
"""A file's place for a reader of the table, and what was read of it."""


@dataclass(frozen=True)
class Case:
    """What was read of a case."""

    name: str
    images: Sequence[Read]
    label: Read | None
    """``None``: there is no such file, which is told elsewhere."""


def findings_of(case: Case, channels: int | None, known: Collection[int] | None, mapped: bool) -> Iterator[Finding]:
    """All that is wrong with a case.

    Args:
        case: its files.
        channels: number of ``channel_names``; ``None``: not known.
        known: values that a label may have; ``None``: not known.
        mapped: label files will be written anew with whole numbers (``labels`` in ``site.toml``).
    """
    files = [*case.images, *([case.label] if case.label else [])]
    for place, facts in files:
        yield from _unreadable(case.name, place, facts)
        if facts.read_as_zero:
            found = f"{counted(facts.read_as_zero, 'voxel')} NaN or infinite, where nnU-Net reads 0"
            remedy = "Replace them by numbers that make sense for these images, unless 0 does."
            yield _warning("NaN or infinite", case.name, place, found, "finite numbers", remedy)
        if facts.odd_spacing:
            found = f"its header says voxel size {_by(facts.odd_spacing)} (slices first), and nnU-Net takes "
            remedy = "Export the file anew, or write the right voxel size into its header, unless that is right."
            found += f"{_by(facts.spacing)}"
            yield _warning("spacing", case.name, place, found, "numbers above 0", remedy)
    images = [(place, facts) for place, facts in case.images if not facts.problem and not facts.layout]
    if channels is not None and len(images) == len(case.images):
        yield from _planes(case.name, images, channels)
    for place, facts in images:
        yield from _intensities(case.name, place, facts)
    for place, facts in images[1:]:
        # nnU-Net's readers refuse channels whose voxel sizes differ by more than this
        yield from _geometry(case.name, place, facts, *images[0], tolerance=1e-5)
    if case.label and not case.label[1].problem and not case.label[1].layout:
        place, facts = case.label
        if facts.planes != 1:
            found, wanted = f"{facts.planes} planes (colours)", "1 plane, with the values of the labels"
            yield _error("planes of a label", case.name, place, found, wanted, INDICES)
            return
        yield from _label_values(case.name, place, facts, known, mapped)
        if images:
            yield from _geometry(case.name, place, facts, *images[0])


def of_all_cases(cases: Sequence[Case]) -> Iterator[Finding]:
    """What can only be seen of all cases together."""
    labels = [case.label[1] for case in cases if case.label and not case.label[1].problem and not case.label[1].layout]
    if labels and not any(value > 0 for facts in labels for value in facts.values):
        remedy = "If that is right, the site may take part: what it trains on is background only."
        found = f"there is none in {counted(len(labels), 'label file')}"
        yield Finding(Severity.warning, "no foreground", found, "foreground in some cases", remedy)
    firsts = [
        (case, *case.images[0]) for case in cases
        if case.images and not case.images[0][1].problem and not case.images[0][1].layout
    ]  # fmt: skip
    kinds = Counter(facts.dimensions for _, _, facts in firsts)
    if len(kinds) > 1:
        usual, fewer = kinds.most_common()[0][0], kinds.most_common()[-1][0]
        remedy = f"Replace it by a file of {usual} dimensions, or remove the case."
        for case, place, facts in firsts:
            if facts.dimensions == fewer:
                found = f"a file of {fewer} dimensions among {kinds[usual]} of {usual}"
                yield _error("dimensions", case.name, place, found, f"{usual} dimensions in all cases", remedy)
    elif 3 in kinds and is_flat([facts for *_, facts in firsts]) is False:
        yield from _flat_elsewhere([facts for *_, facts in firsts])
        remedy = "If it is a slice cut out by mistake, replace or remove the case; as a volume it counts as it is."
        for case, place, facts in firsts:
            if facts.shape[0] == 1:
                found = f"one slice (shape {_by(facts.shape)})"
                yield _warning("one slice", case.name, place, found, "volumes, as the other cases are", remedy)


def _flat_elsewhere(images: Sequence[FileFacts]) -> Iterator[Finding]:
    """Slices whose only layer is not the first axis, which nnU-Net takes for volumes."""
    for axis, name in ((1, "y"), (2, "x")):
        flat = [facts for facts in images if facts.shape[axis] == 1]
        if len(flat) > len(images) / 2:
            found = (
                f"{len(flat)} of {len(images)} images are one voxel thick along {name}, such as {_by(flat[0].shape)}"
            )
            remedy = (
                "If they are slices, save images and labels as files of 2 dimensions, or with this axis as z, which "
            )
            remedy += "is the first of SimpleITK's arrays and the last of nibabel's. As volumes they count as they are."
            wanted = "slices along z: for others nnU-Net plans in three dimensions"
            yield Finding(Severity.warning, "one slice", found, wanted, remedy)


def is_flat(images: Sequence[FileFacts]) -> bool:
    """Whether a data set has two dimensions by nnU-Net's planner: its median case has one slice."""
    slices = [facts.shape[0] for facts in images if facts.shape]
    return bool(slices) and float(np.median(slices)) == 1.0


def _unreadable(case: str, place: str, facts: FileFacts) -> Iterator[Finding]:
    if facts.unfit:
        kind, found, wanted, remedy = facts.unfit
        yield _error(kind, case, place, found, wanted, remedy)
    elif facts.problem:
        remedy = "Replace the file by a whole one, or remove the case."
        if facts.other_reader:
            remedy = f'Write "{OVERWRITE}": "{facts.other_reader}" into dataset.json: that class of nnU-Net reads it'
            remedy += "; or save the file anew with orthogonal axes." if "orthonormal" in facts.problem else "."
        kind = "another reader" if facts.other_reader else "unreadable files"
        yield _error(kind, case, place, f"it cannot be read: {facts.problem}", "a whole file", remedy)
    elif facts.layout == FOURTH:
        found = f"the file has {facts.dimensions} dimensions: a fourth dimension, of length {facts.planes}"
        wanted = "3 dimensions, and a file for each channel"
        remedy = (
            "Split it along the fourth dimension into one file a channel, CASE_0000, CASE_0001, ..., and name each "
            "in channel_names; a time series or the like is no input of nnU-Net: keep one volume of it."
        )
        if facts.planes == 1:
            remedy = "Save it with its first 3 dimensions only, in Python: array[..., 0]."
        yield _error("fourth dimension", case, place, found, wanted, remedy)
    elif facts.layout == VECTOR:
        found = f"{facts.planes} planes: each voxel has {facts.planes} values (colours or a vector)"
        wanted = "1 plane, one value a voxel: nnU-Net would take the values for an axis of space"
        remedy = "Save one file for each channel, CASE_0000, CASE_0001, ..., or one with grey values; a picture as PNG."
        yield _error("planes", case, place, found, wanted, remedy)


def _planes(case: str, images: Sequence[Read], channels: int) -> Iterator[Finding]:
    found = [facts.planes for _, facts in images]
    if sum(found) == channels and len(set(found)) == 1:
        return
    if set(found) == {1}:
        told = f"{counted(len(images), 'image file')}, and dataset.json names {counted(channels, 'channel')}"
        remedy = "Add the missing files, or correct channel_names."
        yield _error("channels", case, images[0][0], told, "a file for each channel", remedy)
        return
    share, rest = divmod(channels, len(images))
    wanted = f"{share} plane{'' if share == 1 else 's'}" if not rest and share else f"{channels} planes in all"
    for place, facts in images:
        if rest or facts.planes != share:
            told = f"{facts.planes} planes{' (colours and transparency)' if facts.planes == 4 else ' (colours)'}"
            told = "1 plane (grey)" if facts.planes == 1 else told
            remedy = GREY if share == 1 else "Save it as the other images are, with red, green and blue only."
            if share == 1 and len(images) == 1:
                remedy += (
                    " If colours matter, name three channels at all sites: "
                    '"channel_names": {"0": "R", "1": "G", "2": "B"}.'
                )
            yield _error("planes", case, place, told, f"{wanted}, for {channels} channel_names", remedy)


def _intensities(case: str, place: str, facts: FileFacts) -> Iterator[Finding]:
    if facts.not_finite:
        found = f"{counted(facts.not_finite, 'voxel')} NaN or infinite"
        remedy = "Replace them by numbers that make sense for these images."
        yield _error("NaN or infinite", case, place, found, "finite numbers", remedy)
    elif facts.lowest == facts.highest:
        kind = "empty images" if facts.highest == 0 else "constant images"
        remedy = "See whether the export went wrong; if so replace the file, or remove the case."
        yield _warning(kind, case, place, f"all voxels are {facts.lowest:g}", "an image", remedy)


def _label_values(
    case: str, place: str, facts: FileFacts, known: Collection[int] | None, mapped: bool
) -> Iterator[Finding]:
    if facts.not_finite:
        found = f"{counted(facts.not_finite, 'voxel')} NaN or infinite"
        yield _error("NaN or infinite", case, place, found, "values of labels", "Give these voxels a label's value.")
    if known is None:
        return
    foreign = [value for value in facts.values if value not in known]
    noisy = [value for value in foreign if abs(value - round(value)) <= NOISE and round(value) in known]
    unknown = [value for value in foreign if value not in noisy]
    values = ", ".join(map(str, known))
    if unknown:
        more = " and more" if len(facts.values) == MOST_VALUES else ""
        found = f"voxels of value {', '.join(map(_digits, unknown[:8]))}{', ...' if len(unknown) > 8 else ''}{more}"
        remedy = "Correct the file, or add the value to 'labels' in dataset.json ('labels' in site.toml can map it)."
        yield _error("unknown label values", case, place, found, f"only {values}, as dataset.json says", remedy)
    if noisy and not mapped:
        found = f"voxels of value {', '.join(map(_digits, noisy[:8]))}: whole numbers with rounding noise"
        remedy = (
            "Save the file with whole numbers, in Python: sitk.WriteImage(sitk.Cast(sitk.Round(image), "
            "sitk.sitkUInt8), file); or let 'mapped_dataset' and 'labels' in site.toml do so (docs/labels.md)."
        )
        wanted = f"{values}, which nnU-Net cuts off instead of rounding"
        yield _error("rounding noise", case, place, found, wanted, remedy)


def _geometry(
    case: str, place: str, facts: FileFacts, other: str, image: FileFacts, tolerance: float = SPACING_TOLERANCE
) -> Iterator[Finding]:
    """Compare a file with the case's first image."""
    remedy = "Resample or export it anew in the image's grid, or remove the case."
    if facts.shape != image.shape:
        found, wanted = f"shape {_by(facts.shape)}", f"shape {_by(image.shape)}, as {other}"
        yield _error("shape", case, place, found, wanted, remedy)
        return
    if facts.spacing and image.spacing and not _close(image.spacing, facts.spacing, tolerance):
        found = f"spacing {_by(facts.spacing, 8)} mm (slices first)"
        wanted = f"spacing {_by(image.spacing, 8)} mm, as {other}"
        yield _error("spacing", case, place, found, wanted, remedy)
        return
    remedy = (
        "nnU-Net lays the arrays over each other and looks at neither: see in a viewer whether they fit, and if not "
        "resample the file into the image's grid."
    )
    step = max(image.spacing[-len(image.origin) :], default=1.0) if image.origin else 1.0
    if len(facts.origin) == len(image.origin) and not _near(facts.origin, image.origin, ORIGIN_TOLERANCE * step):
        found, wanted = f"origin {_by(facts.origin)}", f"origin {_by(image.origin)}, as {other}"
        yield _warning("origin", case, place, found, wanted, remedy)
    if len(facts.direction) == len(image.direction) and not _near(
        facts.direction, image.direction, DIRECTION_TOLERANCE
    ):
        found, wanted = f"direction {_row(facts.direction)}", f"direction {_row(image.direction)}, as {other}"
        yield _warning("direction", case, place, found, wanted, remedy)


def spacing_findings(
    case: str, image: str, facts: FileFacts, reader: str, folder: Path, path: Path
) -> Iterator[Finding]:
    """What is wrong with the spacing of a case's first image: of TIFF volumes that it is not told."""
    sidecar = sidecar_of(path, reader, is_label=False)
    if facts.problem or facts.layout or sidecar is None or facts.spacing:
        return
    found = f"there is no {sidecar.name} with its spacing beside it, so nnU-Net takes 1 x 1 x 1 mm"
    remedy = f'Write {{"spacing": [z, y, x]}} into {sidecar.parent.name}/CASE.json for each case.'
    yield _warning("no spacing", case, image, found, sidecar.relative_to(folder).as_posix()
                   if sidecar.is_relative_to(folder) else str(sidecar), remedy)  # fmt: skip


def _close(values: Sequence[float], others: Sequence[float], tolerance: float) -> bool:
    return len(values) == len(others) and bool(np.allclose(values, others, rtol=tolerance, atol=1e-8))


def _near(values: Sequence[float], others: Sequence[float], tolerance: float) -> bool:
    return bool(np.allclose(values, others, rtol=0, atol=tolerance))


def _digits(value: float) -> str:
    """As many as float32 has, so that 1.0000002 is not 1."""
    return f"{value:.8g}"


def _by(values: Sequence[float], digits: int = 6) -> str:
    return " x ".join(f"{value:.{digits}g}" for value in values)


def _row(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{round(value, 4) + 0.0:g}" for value in values) + ")"


def _error(kind: str, case: str, place: str, found: str, wanted: str, remedy: str) -> Finding:
    return Finding(Severity.error, kind, found, wanted, remedy, case, place)


def _warning(kind: str, case: str, place: str, found: str, wanted: str, remedy: str) -> Finding:
    return Finding(Severity.warning, kind, found, wanted, remedy, case, place)
