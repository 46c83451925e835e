"""The data set that a site plans with: its own, or one built beside it with the federation's labels."""

from __future__ import annotations

import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.paths import nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets
from rich.console import Console
from rich.progress import Progress

from nnunet_fed.datasets.listing import laid_out
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.files import link, move, write_json
from nnunet_fed.planners.dataset import RawDataset, find_dataset, looked_at, reader_of
from nnunet_fed.study.federation import digest_of
from nnunet_fed.study.labels import LabelMap, ResolvedMap, in_numbers

logger = logging.getLogger(__name__)
PROVENANCE = "provenance"
"""Key of a mapped data set's dataset.json that tells what it was made from."""
_CARRIED = ("imagesTs", "splits_final.json", "cases.csv")
"""Linked as they are, if they are there."""


def prepare_dataset(
    dataset_id: int, label_map: LabelMap | None = None, workers: int = 4, *, keep_look: bool = True
) -> RawDataset:
    """The data set that a site plans and trains with.

    Without a map that is the site's own, once all its files have been looked through. With a map it is a data set
    beside that one: images are links, label files are rewritten, and ``dataset.json`` has the federation's labels and
    a ``provenance``. It is built again when a file of the original or the map has changed. Source: ours; files are
    read and written by nnU-Net's class for this data set.

    Args:
        dataset_id: nnU-Net's number of the site's own data set.
        label_map: of ``site.toml``; ``None``: the labels are the federation's already.
        workers: label files that are mapped at the same time.
        keep_look: keep what was read of the files, for the next time.

    Raises:
        ConfigurationError: the data set, the map, the number of the mapped data set or a file is wrong.
    """
    if label_map is not None and dataset_id == label_map.dataset:
        raise ConfigurationError(
            f"{dataset_id} is mapped_dataset in site.toml, which is built from the site's own data set. Plan with the "
            "number of that one."
        )
    dataset = looked_at(dataset_id, label_map, keep=keep_look)
    if label_map is None:
        return dataset
    resolved = label_map.resolve(dataset.json["labels"], str(dataset.folder / "dataset.json"))
    target = _target(dataset, label_map)
    provenance = {
        "made_by": "nnunet_fed",
        "source": dataset.name,
        "values": {str(old): new for old, new in resolved.values.items()},
        "digest": _digest(dataset, resolved),
    }
    if not _is_complete(target, dataset, provenance):
        logger.info("Building %s: %s", target.name, _in_words(dataset, resolved))
        try:
            _build(target, dataset, resolved, provenance, workers)
        except OSError as error:
            raise ConfigurationError(
                f"{target} cannot be built: {error}. Make room, or make {target.parent} writable."
            ) from None
    return replace(find_dataset(label_map.dataset), dimensions=dataset.dimensions)


def _target(dataset: RawDataset, label_map: LabelMap) -> Path:
    """Folder of the mapped data set, once it is sure that nothing else would be overwritten or mistaken for it."""
    number, name = label_map.dataset, label_map.dataset_name(dataset.name)
    folder = Path(nnUNet_raw) / name
    others = [str(other) for other in find_candidate_datasets(number) if other != name]
    if folder.is_dir() and _provenance(folder).get("source") != dataset.name:
        others.append(name)
    if others:
        raise ConfigurationError(
            f"{', '.join(others)} has the number {number} and was not made from {dataset.name}. Set mapped_dataset in "
            "site.toml to a number that is free."
        )
    return folder


def _provenance(folder: Path) -> dict[str, Any]:
    try:
        provenance = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))[PROVENANCE]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return provenance if isinstance(provenance, dict) else {}


def _digest(dataset: RawDataset, resolved: ResolvedMap) -> str:
    files = [Path(file) for files in dataset.cases.values() for file in (*files["images"], files["label"])]
    states = [[str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return digest_of([dataset.json, resolved.labels, sorted(resolved.values.items()), states, _carried(dataset)])


def _carried(dataset: RawDataset) -> list[str]:
    return [name for name in _CARRIED if (dataset.folder / name).exists()]


def _is_complete(target: Path, dataset: RawDataset, provenance: dict[str, Any]) -> bool:
    ending = dataset.json["file_ending"]
    places = [place for case, files in dataset.cases.items() for _, place in laid_out(case, files, ending)]
    return _provenance(target) == provenance and all((target / place).is_file() for place in places)


def _in_words(dataset: RawDataset, resolved: ResolvedMap) -> str:
    names = {number: label for label, number in resolved.labels.items()}
    return ", ".join(
        f"{label} {value} -> {names[resolved.values[value]]} {resolved.values[value]}"
        for label, value in in_numbers(dataset.json["labels"]).items()
    )


def _build(target: Path, dataset: RawDataset, resolved: ResolvedMap, provenance: dict[str, Any], workers: int) -> None:
    # hidden names, in which nnU-Net sees no data set; only a complete one gets its own
    building, old = (target.with_name(f".{target.name}.{state}") for state in ("building", "old"))
    for folder in (building, old):
        if folder.exists():
            shutil.rmtree(folder)
    for name in ("imagesTr", "labelsTr"):
        (building / name).mkdir(parents=True)
    _link_files(building, dataset)

    _map_labels(building, dataset, resolved, workers)
    left_out = ("dataset", "regions_class_order")
    content = {key: value for key, value in dataset.json.items() if key not in left_out}
    content |= {"labels": resolved.labels, PROVENANCE: provenance}
    write_json(building / "dataset.json", content, indent=4)
    if target.exists():
        move(target, old)
    move(building, target)
    shutil.rmtree(old, ignore_errors=True)


def _map_labels(building: Path, dataset: RawDataset, resolved: ResolvedMap, workers: int) -> None:
    """Write all label files anew. Cases are read in threads, since unpacking happens outside Python."""
    reader_class = reader_of(dataset)

    def of_case(case: str) -> None:
        reader = reader_class()
        seg, properties = reader.read_seg(dataset.cases[case]["label"])
        whole = np.rint(seg[0])  # the look has let rounding noise pass
        mapped = np.zeros(whole.shape, np.uint16)
        for value, number in resolved.values.items():
            if number:
                mapped[whole == value] = number
        reader.write_seg(mapped, str(building / "labelsTr" / f"{case}{dataset.json['file_ending']}"), properties)

    # a console of its own: sites that are threads of one process would share the global one
    with ThreadPoolExecutor(workers) as pool, Progress(console=Console(stderr=True)) as progress:
        jobs = [pool.submit(of_case, case) for case in dataset.cases]
        try:
            for job in progress.track(jobs, description=f"Mapping labels of {dataset.name}"):
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _link_files(building: Path, dataset: RawDataset) -> None:
    for case, files in dataset.cases.items():
        for source, place in laid_out(case, files, dataset.json["file_ending"]):
            if not place.startswith("labelsTr/"):
                link(source, building / place)
    for name in _carried(dataset):
        link(dataset.folder / name, building / name)
