"""What ``nnunet_fed check`` finds out of a site's folders: rights, cases for the fold, and room. Source: ours."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryFile

from nnunet_fed.datasets.findings import FILE, counted
from nnunet_fed.datasets.folds import FOLDS, SPLITS, cases_of, has_folds, read_folds, shown
from nnunet_fed.datasets.preprocessed import PREFIX, is_complete
from nnunet_fed.files import FULL
from nnunet_fed.preflight.site_checks import GB, Finding, Outcome
from nnunet_fed.study.federation import Federation

RAW, PREPROCESSED, RESULTS = "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"
FOLDERS = (RAW, PREPROCESSED, RESULTS)
"""Environment variables of nnU-Net."""
LEAST_RESULTS_GB, LEAST_PREPROCESSED_GB = 5.0, 5.0
"""Free disk to ask for where nothing is known of network and data."""
BYTES_OF_A_VOXEL = 4
"""nnU-Net stores float32 for each channel; what packing saves is left out, and what resampling adds or takes."""
PREPROCESSED_PER_RAW = 5.0
"""Where the files were not looked at; these are mostly compressed integers. A guess, on the safe side."""


def check_paths(datasets: Collection[int] = (), trainer: str | None = None) -> Finding:
    """nnU-Net's three folders, and in them the folders of data sets: whether this user can read and write them.

    Args:
        datasets: nnU-Net's numbers.
        trainer: whose results count; those of others may be other users'.
    """
    problems = []
    for name in FOLDERS:
        folder = os.environ.get(name)
        if not folder:
            problems.append(f"the environment variable {name} is not set")
        elif not Path(folder).is_dir():
            problems.append(f"{name} = {folder} is no folder")
        elif not _is_usable(Path(folder), name != RAW):
            problems.append(f"{name} = {folder} cannot be {'read' if name == RAW else 'written'} by this user")
    if problems:
        return Finding("nnU-Net paths", Outcome.failed, f"{'; '.join(problems)}.", "Set them as nnU-Net's setup says.")
    inner = {
        RAW: ("imagesTr", "labelsTr"),
        PREPROCESSED: ("gt_segmentations", f"{PREFIX}*"),
        RESULTS: (f"{trainer}__*",),
    }
    closed: dict[str, list[str]] = {"read": [], "written": []}
    for name, patterns in inner.items():
        for dataset in filter(None, (dataset_folder(name, number) for number in datasets)):
            inside = [folder for pattern in patterns for folder in dataset.glob(pattern)]
            closed["read"] += _closed(dataset, inside, writes=False)
            closed["written"] += _closed(dataset, inside, writes=True) if name != RAW else []
    text = "; ".join(
        f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''} cannot be {what} by this user"
        for what, paths in closed.items()
        if paths
    )
    results = os.environ[RESULTS]
    if closed["read"] or any(Path(results) in Path(path).parents for path in closed["written"]):
        remedy = "Let the owner give you the right to them, or name other folders."
        return Finding("nnU-Net paths", Outcome.failed, f"{text}.", remedy)
    if closed["written"]:
        return Finding("nnU-Net paths", Outcome.warning, f"{text}.", "This user can train there, but not plan again.")
    return Finding("nnU-Net paths", Outcome.ok, ", ".join(os.environ[name] for name in FOLDERS))


def _is_usable(folder: Path, writes: bool) -> bool:
    """Whether this user can list a folder and, if asked, make a file in it."""
    if not writes:
        return os.access(folder, os.R_OK | os.X_OK)
    try:  # a network share may refuse what the permissions allow
        with TemporaryFile(dir=folder):
            return os.access(folder, os.R_OK | os.X_OK)
    except OSError as error:
        return error.errno in FULL  # which is another check's to tell


def _closed(dataset: Path, inside: list[Path], writes: bool) -> list[str]:
    """Of a data set's folder, of the files in it and of some folders in it, what this user cannot read or write."""
    mode = os.W_OK if writes else os.R_OK
    folders = [dataset, *inside, *(below for folder in inside for below in folder.glob("**/") if below != folder)]
    closed = [str(folder) for folder in folders if not _is_usable(folder, writes)]
    files = (file for folder in folders if os.access(folder, os.R_OK | os.X_OK) for file in folder.iterdir())
    return closed + [str(file) for file in files if not file.is_dir() and not os.access(file, mode)]


def check_fold(study: Federation, cases: Collection[str], raw: Path, preprocessed: Path | None) -> Finding:
    """See that the site has the cases for the study's fold, and that the folds are of these cases.

    Args:
        study: as the coordinator has it.
        cases: names of this site's training cases.
        raw: folder of the raw data set.
        preprocessed: folder of what is preprocessed of it, if there is one.
    """
    number = counted(len(cases), "training case")
    if len(cases) < study.min_cases:
        text = f"{number}, but the study asks every site for at least {study.min_cases} (min_cases)."
        return Finding("fold", Outcome.failed, text, "Add cases, or ask who leads the study.")
    if study.fold == "all":
        return Finding("fold", Outcome.ok, f"all, with {number}")
    folders = [folder for folder in (raw, preprocessed) if folder is not None]
    if not has_folds(len(cases), *folders):
        text = f"{number}, too few for nnU-Net's {FOLDS} folds: this site trains on all of them."
        remedy = f"Give nnUNetv2_train the fold 'all', not {study.fold}."
        if study.folds:
            remedy = "Set 'fold = \"all\"' in site.toml."
        return Finding("fold", Outcome.warning, text, remedy)
    made = next((folder / SPLITS for folder in reversed(folders) if (folder / SPLITS).is_file()), None)
    if made is None:
        return Finding("fold", Outcome.ok, f"{study.fold}, of {FOLDS} that nnU-Net makes of {number}")
    named = cases_of(read_folds(made))
    added, gone = sorted(set(cases) - named), sorted(named - set(cases))
    if added or gone:
        told = [f"{shown(found)} {what}" for found, what in ((added, "new"), (gone, "gone")) if found]
        text = f"{made} is of other cases than there are now: {', '.join(told)}."
        return Finding(
            "fold", Outcome.warning, text, "Plan again: 'nnunet_fed plan_and_preprocess' brings it up to date."
        )
    return Finding("fold", Outcome.ok, f"{study.fold} of {made}, with {number}")


def dataset_folder(variable: str, number: int) -> Path | None:
    """Of a data set below one of nnU-Net's folders; ``None``: it is not there."""
    root = os.environ.get(variable)
    return next(iter(sorted(Path(root).glob(f"Dataset{number:03d}_*"))), None) if root else None


def preprocessed_bytes(raw: Path | None, done: Path | None, voxels: float | None = None) -> float:
    """Disk that preprocessing a data set will still take, in bytes.

    Args:
        raw: folder of the data set, if there is one.
        done: folder of the preprocessed cases, if it is known.
        voxels: of all images and labels, if they were looked at.
    """
    if done is not None and is_complete(done):
        return 0.0
    if voxels is not None:
        return BYTES_OF_A_VOXEL * voxels
    size = sum(file.stat().st_size for file in raw.glob("*Tr/*")) if raw else 0
    return max(PREPROCESSED_PER_RAW * size, LEAST_PREPROCESSED_GB * GB)


def voxels_of_images(folder: Path | None) -> float | None:
    """Of all images of a data set, as ``check --data`` and planning have read them; ``None``: they have not.

    Args:
        folder: of the data set in ``nnUNet_preprocessed``, if there is one.
    """
    try:
        kept = json.loads(((folder or Path()) / FILE).read_text(encoding="utf-8"))
        sizes = [math.prod(entry["facts"]["shape"]) * entry["facts"].get("planes", 1) for entry in kept["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(sum(sizes)) if sizes else None


def check_disk(preprocessed: float, results: float) -> Finding:
    """Compare free disk with what is needed.

    Args:
        preprocessed: bytes that go to ``nnUNet_preprocessed``.
        results: bytes that go to ``nnUNet_results``, if that is known; else 0.
    """
    needed = {PREPROCESSED: preprocessed, RESULTS: max(results, LEAST_RESULTS_GB * GB)}
    folders = {name: Path(os.environ.get(name, "")) for name in needed}
    if not all(os.environ.get(name) and folder.is_dir() for name, folder in folders.items()):
        return Finding("disk", Outcome.skipped, "nnU-Net's folders are not there")
    together: dict[int, tuple[str, float]] = {}  # by file system
    for name, size in needed.items():
        device = folders[name].stat().st_dev
        names, before = together.get(device, ("", 0.0))
        together[device] = f"{names} and {name}" if names else name, before + size
    shown: list[str] = []
    short: list[str] = []
    for names, size in together.values():
        free = shutil.disk_usage(folders[names.split()[0]]).free
        text = f"{free / GB:.0f} GB free for {names}, about {size / GB:.1f} GB needed"
        (shown if free >= size else short).append(text)
    if short:
        return Finding("disk", Outcome.failed, f"{'; '.join(short)}.", "Free some, or point nnU-Net at another disk.")
    return Finding("disk", Outcome.ok, "; ".join(shown))
