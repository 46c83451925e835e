"""Look all files of a data set through before anything is computed: what nnU-Net would take without a word."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.planners.dataset import RawDataset, reader_of

Segmentation = tuple[npt.NDArray[np.float32], dict[str, Any]]
"""What nnU-Net's ``read_seg`` returns: one channel, and the geometry."""


def inspect(
    dataset: RawDataset, title: str, workers: int, work: Callable[[Any, str, Segmentation], list[float]]
) -> None:
    """Read all label files, and check that compressed images are complete; ITK puts zeros where a ``.nii.gz`` ends.

    Source: ours. Cases are read in threads, since reading and decompressing happen outside Python.

    Args:
        dataset: whose files are read.
        title: of the progress bar.
        workers: number of threads.
        work: gets a reader, the case and its segmentation; returns values that dataset.json does not know.

    Raises:
        ConfigurationError: a file cannot be read or is damaged, or a label has unknown values; names case and file.
    """
    reader_class = reader_of(dataset)

    def of_case(case: str) -> list[float]:
        files = dataset.cases[case]
        file, reader = files["label"], reader_class()
        try:
            for file in (*files["images"], files["label"]):
                _check_compression(Path(file))
            segmentation = reader.read_seg(file)
        except Exception as error:  # the readers raise whatever their libraries do
            raise ConfigurationError(
                f"Case {case} of {dataset.name}: {file} cannot be read: {error}. Replace the file or remove the case."
            ) from error
        return work(reader, case, segmentation)

    unknown: dict[str, list[float]] = {}
    # a console of its own: sites that are threads of one process would share the global one
    with ThreadPoolExecutor(workers) as pool, Progress(console=Console(stderr=True)) as progress:
        jobs = {case: pool.submit(of_case, case) for case in dataset.cases}
        try:
            for case, job in progress.track(jobs.items(), description=f"{title} of {dataset.name}"):
                if job.result():
                    unknown[case] = job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if unknown:
        _refuse(dataset, unknown)


def known_values(dataset: RawDataset) -> list[int]:
    """All values that dataset.json allows in a label file, regions and ``ignore`` included."""
    entries = dataset.json["labels"].values()
    return sorted({int(value) for entry in entries for value in (entry if isinstance(entry, list) else [entry])})


def foreign_values(seg: npt.NDArray[np.float32], known: Collection[int]) -> list[float]:
    """Values of a label file that are not among the known ones, NaN included."""
    flat = seg.ravel()
    # every value begins a run; labels have few of them, so that sorting the beginnings costs next to nothing
    beginnings = np.append(flat[:1], flat[1:][flat[1:] != flat[:-1]])
    return [value for value in np.unique(beginnings).tolist() if value not in known]


def _check_compression(path: Path) -> None:
    """Decompress a gzip file to its end, where its checksum stands; other files are left to the reader."""
    with path.open("rb") as raw:
        if raw.read(2) != b"\x1f\x8b":
            return
    with gzip.open(path) as file:
        while file.read(1 << 20):
            pass


def _refuse(dataset: RawDataset, unknown: dict[str, list[float]]) -> None:
    case, values = next(iter(unknown.items()))
    others = f" (and so in {len(unknown) - 1} other cases)" if len(unknown) > 1 else ""
    raise ConfigurationError(
        f"Case {case} of {dataset.name}: {dataset.cases[case]['label']} has voxels of value "
        f"{', '.join(f'{value:g}' for value in values)}{others}, but dataset.json knows only "
        f"{', '.join(map(str, known_values(dataset)))}. Correct the file, or add the value to 'labels'."
    )
