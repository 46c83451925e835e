"""A site's raw data set: find it, describe it, and compare the sites' descriptions."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from io import StringIO
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import nnunetv2.utilities.utils
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nnunet_fed.datasets.description import NAME, channel_names, check_description, read_description
from nnunet_fed.datasets.findings import FILE, Report, error_console, require
from nnunet_fed.datasets.listing import list_cases
from nnunet_fed.errors import ConfigurationError, DisagreementError
from nnunet_fed.inspection.look import Look, look_at
from nnunet_fed.inspection.reading import choose_reader, endings, reader_class
from nnunet_fed.study.federation import canonical_json
from nnunet_fed.study.labels import LabelMap, in_numbers
from nnunet_fed.study.method_table import MethodTable

# nnU-Net lists the cases in a pool of forked processes, before and after planning talks to the coordinator. A process
# that has ever opened a gRPC channel must not fork, be it closed since: now and then a child hangs, and the pool waits
# for it for ever. For the few regular expressions that the pool evaluates, threads do.
nnunetv2.utilities.utils.Pool = ThreadPool

PLAN_AGAIN = (
    "Then plan again: first with --correct at each site that was corrected, which withdraws what it has told, and with "
    "the same command as before at all others."
)
PLANNED_AS = "0.1.0"
"""The version of nnunet_fed since which planning computes the same: sites of different versions plan together. To be
raised by whoever changes what planning computes."""
_SHOWN_ONLY = ("training cases",)
"""Rows of the table in which sites may differ."""
_CHANNELS = "channels"
"""The row in which they may differ if each has its own."""


@dataclass(frozen=True)
class RawDataset:
    """A data set in ``nnUNet_raw``."""

    id: int
    name: str
    folder: Path
    json: dict[str, Any]
    """The content of ``dataset.json``."""
    cases: dict[str, dict[str, Any]]
    """nnU-Net's table of training cases: by name, ``images`` (a file a channel, or one of colours) and ``label``."""
    dimensions: int = 3
    """2 if most cases have one slice; known once the files were looked at (:func:`looked_at`)."""

    @property
    def channel_names(self) -> list[str]:
        """Names of the channels in the order of their numbers."""
        return list(channel_names(self.json).values())

    @property
    def preprocessed(self) -> Path:
        """nnU-Net's folder for this data set's fingerprint, plans and preprocessed cases."""
        return Path(nnUNet_preprocessed) / self.name


def preprocessed_folder(dataset_id: int) -> Path:
    """nnU-Net's folder for the fingerprint and the plans of a data set, whether it is there or not.

    Raises:
        ConfigurationError: nnU-Net's paths are not set, or there is no such data set.
    """
    return Path(nnUNet_preprocessed) / _name_of(dataset_id)


def find_dataset(dataset_id: int, label_map: LabelMap | None = None) -> RawDataset:
    """Look a data set up as nnU-Net does, and check ``dataset.json`` and that all files are there; none is opened.

    Args:
        dataset_id: nnU-Net's number.
        label_map: of ``site.toml``; with one, the labels need not be as nnU-Net wants them.

    Raises:
        ConfigurationError: nnU-Net's paths are not set, there is no such data set, or something of it is wrong.
    """
    name = _name_of(dataset_id)
    folder = Path(nnUNet_raw) / name
    content, findings = read_description(folder / NAME)
    if content is not None:
        findings += check_description(content, endings(), label_map is not None)
    require([Report(name, folder, tuple(findings), 0)])
    assert content is not None  # or there would be an error
    listing = list_cases(folder, content)
    require([Report(name, folder, tuple(listing.findings), len(listing.cases))])
    return RawDataset(dataset_id, name, folder, content, listing.cases)


def looked_at(dataset_id: int, label_map: LabelMap | None = None, *, keep: bool = True) -> RawDataset:
    """Look at all of a data set, show what is found, and go on if nothing is wrong.

    What is found, and what was read of the files, is kept in ``nnUNet_preprocessed``, and makes the next look quick.

    Args:
        dataset_id: nnU-Net's number.
        label_map: of ``site.toml``, if the labels will be mapped.
        keep: write it; without, nothing is written or taken over.

    Raises:
        ConfigurationError: nnU-Net's paths are not set, or there is no such data set.
        DataError: with all that is wrong with it.
    """
    if keep:
        look, kept = look_at_dataset(dataset_id, label_map)
    else:
        name = _name_of(dataset_id)
        look, kept = look_at(Path(nnUNet_raw) / name, name, None, label_map), None
    console = error_console()
    look.report.show(console)
    if kept is not None and look.report.findings:
        console.print(f"All findings stand in {kept}.", soft_wrap=True)
    require([look.report])
    return replace(find_dataset(dataset_id, label_map), dimensions=look.report.dimensions)


def look_at_dataset(dataset_id: int, label_map: LabelMap | None = None) -> tuple[Look, Path]:
    """Look at all of a data set, and keep what is found beside what is preprocessed of it.

    Returns:
        The look, and the JSON with all of it.

    Raises:
        ConfigurationError: nnU-Net's paths are not set, there is no such data set, or nothing can be kept there.
    """
    name = _name_of(dataset_id)
    kept = Path(nnUNet_preprocessed) / name / FILE
    look = look_at(Path(nnUNet_raw) / name, name, kept, label_map)
    try:
        look.write(kept)
    except OSError as error:
        raise ConfigurationError(f"{kept} cannot be written: {error}. Make its folder writable.") from None
    return look, kept


def _name_of(dataset_id: int) -> str:
    for variable in ("nnUNet_raw", "nnUNet_preprocessed"):
        if not os.environ.get(variable):
            raise ConfigurationError(f"The environment variable {variable} is not set. Point it at nnU-Net's folder.")
    try:
        return str(convert_id_to_dataset_name(dataset_id))
    except RuntimeError as error:
        start = f"Dataset{dataset_id:03d}"
        if str(error).startswith("More than one"):
            raise ConfigurationError(
                f"There is more than one data set with the id {dataset_id}: {_places(start)}. nnU-Net counts every "
                f"folder whose name begins with {start}: give all but one another id, or move them elsewhere."
            ) from None
        raise ConfigurationError(
            f"There is no data set with the id {dataset_id} below {nnUNet_raw} and {nnUNet_preprocessed}. "
            f"Put it into a folder {start}_NAME."
        ) from None


def _places(start: str) -> str:
    """Names of the data sets that begin so, and in which of nnU-Net's folders each stands."""
    found: dict[str, list[str]] = {}
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        for path in sorted(Path(os.environ.get(variable) or os.devnull).glob(f"{start}*/")):
            found.setdefault(path.name, []).append(variable)
    return ", ".join(f"{name} (in {' and '.join(variables)})" for name, variables in found.items())


def file_states(cases: Mapping[str, Mapping[str, Any]]) -> dict[str, list[list[Any]]]:
    """Name, size and time of each file, by case: what was made of the files can be kept for as long as they stay."""
    return {
        str(case): [_file_state(Path(file)) for file in (*files["images"], files["label"])]
        for case, files in cases.items()
    }


def _file_state(path: Path) -> list[Any]:
    state = path.stat()
    return [path.name, state.st_size, state.st_mtime_ns]


def reader_of(dataset: RawDataset) -> Any:
    """nnU-Net's class that reads and writes the files of a data set."""
    return reader_class(choose_reader(dataset.json, [files["images"][0] for files in dataset.cases.values()]))


def describe(dataset: RawDataset, planner: str, base_trainer: str | None = None) -> dict[str, Any]:
    """What the sites compare before they plan; nothing in it tells of a single case.

    Args:
        dataset: this site's data set, which was looked at.
        planner: name of the planner's class.
        base_trainer: name and digest of the one that the study names; ``None``: it names none.

    Returns:
        JSON values by the name of the property.
    """
    return {
        _CHANNELS: dataset.channel_names,
        "labels": _ordered_labels(in_numbers(dataset.json["labels"])),
        "regions_class_order": dataset.json.get("regions_class_order"),
        "dimensions": dataset.dimensions,
        "nnunetv2": ".".join(re.findall(r"\d+", version("nnunetv2"))[:3]),
        "nnunet_fed": PLANNED_AS,
        "planner": planner,
        **({} if base_trainer is None else {"base trainer": base_trainer}),
        "training cases": len(dataset.cases),
    }


def _ordered_labels(labels: Mapping[str, Any]) -> list[list[Any]]:
    """Pairs of name and value; sorted by value unless there are regions, whose order is that of the outputs."""
    pairs = [[name, value] for name, value in labels.items()]
    if any(isinstance(value, list) for value in labels.values()):
        return pairs
    return sorted(pairs, key=lambda pair: pair[1])


def check_agreement(
    descriptions: Mapping[str, Mapping[str, Any]], method: MethodTable, remedy: str = PLAN_AGAIN
) -> None:
    """Compare what :func:`describe` said at each site.

    Args:
        descriptions: by site.
        method: of the study, which says whether channels may differ.
        remedy: what to do once a difference is put right.

    Raises:
        DisagreementError: with a table of properties by sites; a star marks what differs from most sites.
    """
    shown_only = (*_SHOWN_ONLY, _CHANNELS) if method.own_channels else _SHOWN_ONLY
    rows = list(next(iter(descriptions.values())))
    cells: dict[str, dict[str, str]] = {}
    disagreed = []
    for row in rows:
        values = {site: description.get(row) for site, description in descriptions.items()}
        odd = set() if row in shown_only else _odd_ones(values)
        if odd:
            disagreed.append(row)
        cells[row] = {site: _cell(row, value) + (" *" if site in odd else "") for site, value in values.items()}
    if disagreed:
        option = method.own_channels_option if _CHANNELS in disagreed else None
        own_channels = f" Or let all plan with '{option} = true' in federation.toml: then each has its own channels."
        raise DisagreementError(
            f"The sites' data sets differ in {', '.join(disagreed)}:\n\n{_table(list(descriptions), cells)}\n\n"
            "Correct dataset.json, the data or the installation at the sites marked with '*'; labels can be mapped in "
            f"site.toml.{own_channels if option else ''} {remedy}"
        )


def _odd_ones(values: Mapping[str, Any]) -> set[str]:
    """Sites whose value is not that of most sites; all of them if there is no such value."""
    texts = {site: canonical_json(value) for site, value in values.items()}
    (most, number), *others = Counter(texts.values()).most_common()
    if not others:
        return set()
    return {site for site, text in texts.items() if text != most or others[0][1] == number}


def _cell(row: str, value: Any) -> str:
    if row == "labels" and isinstance(value, list):
        return ", ".join(f"{name}={number}" for name, number in value)
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return "-" if value is None else str(value)


def _table(sites: list[str], cells: Mapping[str, Mapping[str, str]]) -> str:
    """In plain text, whatever the terminal's width: it is part of an error, and of the coordinator's record."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_row("", *map(Text, sites))
    for name, texts in cells.items():
        table.add_row(name, *(Text(texts[site]) for site in sites))
    console = Console(file=StringIO(), width=10**6)  # so that nothing wraps
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
