"""The training cases of a data set by nnU-Net's rules for names, and the names that it would drop or confuse."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunet_fed.datasets.findings import Finding, Severity, counted

IMAGES, LABELS = "imagesTr", "labelsTr"
SEGMENTATION = "_seg"
"""What nnU-Net appends to a case's name for its preprocessed labels; a case of such a name is in no training."""


@dataclass
class Listing:
    """The cases of a data set."""

    cases: dict[str, dict[str, Any]] = field(default_factory=dict)
    """As in nnU-Net: by name, ``images`` (files in the order of the channels) and ``label``; sorted by name."""
    findings: list[Finding] = field(default_factory=list)


def list_cases(folder: Path, content: Mapping[str, Any]) -> Listing:
    """Find the training cases; no file is opened.

    Args:
        folder: of the data set.
        content: of its ``dataset.json``, with a file ending that nnU-Net knows.
    """
    listing = Listing()
    if "dataset" in content:
        _explicit(folder, content, listing)
    else:
        _by_name(folder, str(content["file_ending"]), listing)
    listing.findings += _names(list(listing.cases))
    number = content.get("numTraining")
    if listing.cases and type(number) is int and number != len(listing.cases):
        found = f"numTraining = {number}, but there are {len(listing.cases)} training cases"
        remedy = "Complete the data set, or correct the number."
        listing.findings.append(_error("numTraining", found, "the number of training cases", remedy, "dataset.json"))
    return listing


def laid_out(case: str, files: Mapping[str, Any], ending: str, name: str | None = None) -> Iterator[tuple[Path, str]]:
    """A case's files, and where they belong in a data set without a list of files.

    Args:
        case: its name.
        files: of :func:`list_cases`.
        ending: of the data set's files.
        name: new name of the case; ``None``: the old one.

    Yields:
        Each file and its new place, relative to the new folder; also the files with the spacings of TIFF volumes.
    """
    name = name or case
    label, first = Path(files["label"]), Path(files["images"][0])
    for number, image in enumerate(files["images"]):
        yield Path(image), f"{IMAGES}/{name}_{number:04d}{ending}"
    yield label, f"{LABELS}/{name}{ending}"
    sidecars = {
        f"{IMAGES}/{name}.json": first.with_name(first.name.removesuffix(ending)[:-5] + ".json"),
        f"{LABELS}/{name}.json": label.with_name(label.name.removesuffix(ending) + ".json"),
    }
    yield from ((path, place) for place, path in sidecars.items() if path.is_file())


def place_of(folder: Path, file: str | Path) -> str:
    """A file's place for a reader: below the data set's folder, or in full."""
    path = Path(file)
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def is_there(file: str | Path) -> bool:
    """Whether there is such a file; false also where a folder on the way may not be read."""
    return os.path.isfile(file)  # noqa: PTH113 - Path.is_file raises then


def _explicit(folder: Path, content: Mapping[str, Any], listing: Listing) -> None:
    table = content["dataset"]
    remedy = 'Write "dataset": {"CASE": {"images": ["imagesTr/CASE_0000.nii.gz"], "label": "labelsTr/CASE.nii.gz"}}.'
    wanted = "for each case 'images', a list of files, and 'label', a file"
    if not isinstance(table, dict) or not table:
        found = f"the table of files 'dataset' is {json.dumps(table)[:60]}"
        listing.findings.append(_error("list of files", found, wanted, remedy, "dataset.json"))
        return
    bad = [case for case, files in table.items() if not _is_entry(files)]
    listing.findings += [
        _error("list of files", f"in the table 'dataset' it is {json.dumps(table[case])[:80]}", wanted, remedy,
               "dataset.json", case)
        for case in bad
    ]  # fmt: skip
    listing.findings += [
        _error("names", f"the case's name {case!r} holds a '/' or is empty", "a name of a file", "Rename it.",
               "dataset.json", case)
        for case in table if not case or "/" in case or "\\" in case
    ]  # fmt: skip
    listing.cases = {
        case: {
            "images": [_located(folder, image) for image in files["images"]],
            "label": _located(folder, files["label"]),
        }
        for case, files in table.items() if case not in bad
    }  # fmt: skip
    for case, files in listing.cases.items():
        missing = [file for file in (*files["images"], files["label"]) if not is_there(file)]
        listing.findings += [_missing(folder, case, file) for file in missing]


def _located(folder: Path, text: str) -> str:
    """A file of the list, as nnU-Net finds it: variables of the environment count, and other paths begin here."""
    return str((folder / os.path.expandvars(text)).absolute())


def _is_entry(files: Any) -> bool:
    if not isinstance(files, dict) or not isinstance(files.get("label"), str):
        return False
    images = files.get("images")
    return isinstance(images, list) and bool(images) and all(isinstance(image, str) for image in images)


def _by_name(folder: Path, ending: str, listing: Listing) -> None:
    images, labels = folder / IMAGES, folder / LABELS
    found = listing.findings
    readable = {path for path in (images, labels) if _is_readable(path, found)}
    if images not in readable:
        return
    numbers = _channels_by_case(folder, images, ending, found)
    known = {path.name for path in _with_ending(folder, labels, ending, found)} if labels in readable else set()
    of_nobody = known - {f"{case}{ending}" for case in numbers}
    alike = {_folded(name): name for name in sorted(of_nobody)}
    for case in sorted(numbers):
        there = sorted(numbers[case])
        lacking = next((number for number in range(there[-1]) if number not in there), None)
        label = labels / f"{case}{ending}"
        listing.cases[case] = {
            "images": [
                str(images / f"{case}_{number:04d}{ending}")
                for number in sorted({*there} if lacking is None else {*there, lacking})
            ],
            "label": str(label),
        }
        if lacking is not None:
            found.append(_missing(folder, case, images / f"{case}_{lacking:04d}{ending}"))
        if labels in readable and label.name not in known:
            other = next(
                (name for name in (f"{case}_0000{ending}", alike.get(_folded(label.name))) if name in known), None
            )
            found.append(_no_label(folder, case, label, other))
            of_nobody.discard(other or "")
    if not listing.cases and not any(finding.kind == "names" for finding in found):
        told = f"{images} holds no training case *_0000{ending}"
        remedy = "Put the images there, or correct file_ending in dataset.json."
        found.append(_error("no cases", told, f"CASE_0000{ending}", remedy, "dataset.json"))
    elif listing.cases:
        remedy = "Add the images, or remove the label."
        found += [
            _warning("label without image", f"there is no image {name.removesuffix(ending)}_0000{ending}",
                     "an image for each label", remedy, f"{LABELS}/{name}")
            for name in sorted(of_nobody)
        ]  # fmt: skip


def _is_readable(path: Path, found: list[Finding]) -> bool:
    if not path.is_dir():
        remedy = "Put the files there, or list them in the table 'dataset' of dataset.json."
        found.append(_error("missing folder", f"there is no folder {path}", "nnU-Net's raw layout", remedy))
    elif not os.access(path, os.R_OK | os.X_OK):
        remedy = f"Make it readable for whoever runs nnU-Net: chmod +rx '{path}'"
        found.append(_error("missing folder", f"the folder {path} may not be read", "a readable folder", f"{remedy}."))
    else:
        return True
    return False


def _channels_by_case(folder: Path, images: Path, ending: str, found: list[Finding]) -> dict[str, list[int]]:
    pattern = re.compile(rf"(.+)_(\d{{4}}){re.escape(ending)}", re.DOTALL)
    numbers: dict[str, list[int]] = {}
    for path in _with_ending(folder, images, ending, found):
        match = pattern.fullmatch(path.name)
        if match is None:
            remedy = f"Name it CASE_0000{ending}, with the number of its channel, or remove it."
            name = f"the name {path.name!r} has no number of a channel; nnU-Net would cut it off elsewhere"
            found.append(_error("names", name, f"CASE_0000{ending}", remedy, place_of(folder, path)))
        else:
            numbers.setdefault(match[1], []).append(int(match[2]))
    return numbers


def _folded(name: str) -> str:
    """The same for names that a reader takes for one: in capitals or not, ``ä`` as one character or as two."""
    return unicodedata.normalize("NFC", name).casefold()


def _with_ending(folder: Path, part: Path, ending: str, found: list[Finding]) -> Iterator[Path]:
    """The files that nnU-Net sees; what it would not see, or had better not, is told."""
    others = []
    for path in sorted(part.iterdir()):
        place = place_of(folder, path)
        if any(0xD800 <= ord(letter) < 0xE000 for letter in path.name):  # ITK ends the process
            if path.name.endswith(ending):
                shown = f"{part.name}/{os.fsencode(path.name)!r}"[:-1].replace("b'", "", 1)
                told = "its name holds bytes that are no letters, such as those of a system with another encoding"
                remedy = "Rename it, best with letters and digits only: ls -b shows the name, mv -i takes it."
                found.append(_error("names", told, "a name in UTF-8", remedy, shown))
        elif path.name.startswith("."):
            if path.name.endswith(ending):
                remedy = f"Delete the hidden files: find '{part}' -name '.*{ending}' -type f -delete"
                told = "a hidden file, such as some systems leave beside another"
                if part.name == IMAGES:
                    told += "; nnU-Net would take it for a case"
                make = _error if part.name == IMAGES else _warning
                found.append(make("hidden files", told, "images and labels only", remedy, place))
        elif path.name.endswith(ending):
            if is_there(path):
                yield path
            else:
                what = "a link to a file that is not there" if path.is_symlink() else "a folder"
                remedy = "Put the file there: nnU-Net would leave it out without a word."
                found.append(_error("missing files", f"it is {what}", "a file", remedy, place))
        elif is_there(path) and path.suffix not in (".json", ".txt", ".csv", ".md"):
            others.append(path.name)
    if others:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        told = f"{counted(len(others), 'file')} with another ending than file_ending, left out: {shown}"
        remedy = f"Convert or rename them to {ending}, or remove them."
        found.append(_warning("other endings", told, f"files that end with {ending}", remedy, place_of(folder, part)))


def _no_label(folder: Path, case: str, label: Path, other: str | None) -> Finding:
    if other is None:
        return _missing(folder, case, label)
    told, remedy = f"the label is called {LABELS}/{other}", "Rename it: labels have no number of a channel."
    if _folded(other) == _folded(label.name):
        told += ", which differs in capitals or in the way in which an accent is stored"
        remedy = "Rename it, letter by letter as its image is called."
    return _error("names", told, place_of(folder, label), remedy, f"{LABELS}/{other}", case)


def _names(cases: Sequence[str]) -> Iterator[Finding]:
    for case in cases:
        if case.endswith(SEGMENTATION):
            told = f"the case's name ends with {SEGMENTATION}: nnU-Net takes what it preprocesses for a label, and "
            told += "leaves the case out of the training"
            yield _error("names", told, "another ending", "Rename its files.", case=case)
    for folded, number in Counter(case.casefold() for case in cases).items():
        if number > 1:
            alike = [case for case in cases if case.casefold() == folded]
            told = f"{' and '.join(alike)} differ in capitals only, and are one file on Windows and macOS"
            yield _warning("names", told, "names that differ", "Rename one of them.", case=alike[0])


def _missing(folder: Path, case: str, file: str | Path) -> Finding:
    place = place_of(folder, file)
    remedy = "Add the file, or remove the case."
    return _error("missing files", "the file is not there", "all files of each case", remedy, place, case)


def _error(kind: str, found: str, wanted: str, remedy: str, file: str = "", case: str = "") -> Finding:
    return Finding(Severity.error, kind, found, wanted, remedy, case, file)


def _warning(kind: str, found: str, wanted: str, remedy: str, file: str = "", case: str = "") -> Finding:
    return Finding(Severity.warning, kind, found, wanted, remedy, case, file)
