"""One look at all of a data set: everything that is wrong with it, in one run. Source: ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from nnunet_fed.datasets.description import NAME, channel_names, check_description, known_values, read_description
from nnunet_fed.datasets.findings import Finding, Report, Severity
from nnunet_fed.datasets.folds import check_folds
from nnunet_fed.datasets.listing import is_there, list_cases, place_of
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.files import write_json
from nnunet_fed.inspection.comparing import Case, findings_of, is_flat, of_all_cases, spacing_findings
from nnunet_fed.inspection.reading import (
    OVERWRITE,
    FileFacts,
    better_reader,
    choose_reader,
    endings,
    reader_class,
    sidecar_of,
)
from nnunet_fed.inspection.workers import Job, Readers
from nnunet_fed.study.labels import LabelMap

FORMAT = 2
"""Of what is kept; to be raised by whoever changes what the facts mean."""


@dataclass(frozen=True)
class Look:
    """What a look has found, and what it has read."""

    report: Report
    reader: str
    facts: Mapping[Job, FileFacts]
    states: Mapping[Job, Any]
    """Size and time of each file, from before it was read."""

    def write(self, path: Path) -> None:
        """Keep it, for people and for the next look."""
        path.parent.mkdir(parents=True, exist_ok=True)
        files = [
            {
                "file": place_of(self.report.folder, file),
                "label": is_label,
                "state": self.states[file, is_label],
                "facts": facts.stored(),
            }
            for (file, is_label), facts in self.facts.items()
        ]
        kept = {"format": FORMAT, "nnunetv2": version("nnunetv2"), "reader": self.reader, "files": files}
        write_json(path, {**self.report.to_json(), **kept}, indent=1)


def look_at(
    folder: Path, name: str, kept: Path | None = None, label_map: LabelMap | None = None, readers: Readers | None = None
) -> Look:
    """Read ``dataset.json`` and every training file of a data set once, and tell all that is wrong.

    Args:
        folder: of the data set, in nnU-Net's raw layout.
        name: of the data set for the reader.
        kept: JSON of an earlier look: what it says of files whose size and time are as they were is taken over.
        label_map: of ``site.toml``; with one, the labels need not be as nnU-Net wants them.
        readers: processes that go on to another data set; ``None``: some are started for this one.
    """
    if readers is None:
        with Readers() as readers:
            return look_at(folder, name, kept, label_map, readers)
    content, findings = read_description(folder / NAME)
    if content is None:
        return Look(Report(name, folder, tuple(findings), 0), "", {}, {})
    wrong = check_description(content, endings(), label_map is not None)
    if label_map is not None and "labels" in content and not any(finding.kind == "labels" for finding in wrong):
        wrong += _of_map(label_map, content, folder)
    findings += wrong
    bad = {finding.kind for finding in wrong if finding.severity is Severity.error}
    if "file_ending" in bad or "file_ending" not in content:
        return Look(Report(name, folder, tuple(findings), 0), "", {}, {})
    findings += _of_reader(content)
    channels = None if "channel_names" in bad or not {"channel_names", "modality"} & set(content) else len(
        channel_names(content)
    )  # fmt: skip
    known = None if "labels" not in content or bad & {"labels", "ignore"} else known_values(content)
    listing = list_cases(folder, content)
    findings += [*listing.findings, *check_folds(folder, listing.cases)]
    there = {case: [file for file in files["images"] if is_there(file)] for case, files in listing.cases.items()}
    reader = choose_reader(content, [images[0] for images in there.values() if images])
    jobs = [
        *((file, False) for images in there.values() for file in images),
        *((files["label"], True) for files in listing.cases.values() if is_there(files["label"])),
    ]
    states = {job: _state(job[0], reader, job[1]) for job in jobs}
    facts = _facts(states, reader, name, _kept(kept, folder, reader), readers)
    if better := better_reader([facts[images[0], False] for images in there.values() if images]):
        # the first image chooses the reader, and is the one that is not as the others are
        reader, states = better, {job: _state(job[0], better, job[1]) for job in jobs}
        facts = _facts(states, reader, name, {}, readers)
    cases = []
    for case, files in listing.cases.items():
        images = [(place_of(folder, file), facts[file, False]) for file in there[case]]
        label = (
            (place_of(folder, files["label"]), facts[files["label"], True]) if (files["label"], True) in facts else None
        )
        cases.append(Case(case, images, label))
        complete = channels if len(images) == len(files["images"]) else None
        findings += findings_of(cases[-1], complete, known, label_map is not None)
        if images:
            findings += spacing_findings(case, *images[0], reader, folder, Path(there[case][0]))
    findings += of_all_cases(cases)
    flat = is_flat([facts[images[0], False] for images in there.values() if images])
    report = Report(name, folder, tuple(findings), len(listing.cases), 2 if flat else 3)
    return Look(report, reader, facts, states)


def _facts(
    states: Mapping[Job, Any], reader: str, name: str, kept: Mapping[Job, tuple[Any, FileFacts]], readers: Readers
) -> dict[Job, FileFacts]:
    """Facts of all files, in the order of the states."""
    known = {job: kept[job][1] for job, state in states.items() if job in kept and kept[job][0] == state}
    new = [job for job in states if job not in known]
    if new:
        # a console of its own: sites that are threads of one process would share the global one
        with Progress(console=Console(stderr=True)) as progress:
            bar = progress.add_task(f"Looking at {escape(name)}", total=len(new))
            known |= readers.read_all(new, reader, lambda: progress.advance(bar))
    return {job: known[job] for job in states}


def _kept(path: Path | None, folder: Path, reader: str) -> dict[Job, tuple[Any, FileFacts]]:
    """What an earlier look has read; nothing if it cannot be understood, or was another version's."""
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (content["format"], content["nnunetv2"], content["reader"]) != (FORMAT, version("nnunetv2"), reader):
            return {}
        return {
            (str(folder / entry["file"]), entry["label"]): (entry["state"], FileFacts.restore(entry["facts"]))
            for entry in content["files"]
            if "problem" not in entry["facts"]  # of which permissions, or a full memory, may have been the cause
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _state(file: str, reader: str, is_label: bool) -> list[list[int] | None]:
    """Size and time of a file, and of the one beside it in which its spacing stands."""
    paths = [Path(file), sidecar_of(Path(file), reader, is_label)]
    return [_size_and_time(path) for path in paths if path is not None]


def _size_and_time(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _of_reader(content: Mapping[str, Any]) -> list[Finding]:
    named = content.get(OVERWRITE, "None")
    if named == "None" or (isinstance(named, str) and reader_class(named) is not None):
        return []
    found = f"{OVERWRITE} names {named!r}, which nnU-Net does not have; it would choose another without a word"
    remedy = "Correct the name, or remove the key."
    return [Finding(Severity.error, OVERWRITE, found, "a class in nnunetv2.imageio", remedy, file=NAME)]


def _of_map(label_map: LabelMap, content: Mapping[str, Any], folder: Path) -> list[Finding]:
    try:
        label_map.resolve(content["labels"], str(folder / NAME))
    except ConfigurationError as error:
        found, _, remedy = str(error).rpartition(". ")
        return [Finding(Severity.error, "label map", found, "labels of dataset.json", remedy, file="site.toml")]
    return []
