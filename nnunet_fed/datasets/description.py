"""What dataset.json must say, by nnU-Net's own rules: ``LabelManager``, the planner and ``verify_dataset_integrity``.

What nnU-Net refuses at some point is an error here, what it takes without a word and computes wrongly a warning.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from nnunet_fed.datasets.findings import Finding, Severity
from nnunet_fed.study.labels import BACKGROUND, IGNORE, in_numbers

NAME = "dataset.json"


def read_description(path: Path) -> tuple[dict[str, Any] | None, list[Finding]]:
    """The content of a ``dataset.json``, ``None`` if it cannot be read, and what is wrong with the file."""
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        repeated.extend(sorted({name for name in names if names.count(name) > 1}))
        return dict(pairs)

    try:
        text = _decoded(path.read_bytes())
        if text.startswith("\ufeff"):  # nnU-Net's own reading fails with it
            raise ValueError("it begins with a byte order mark (BOM); save it as plain UTF-8")
        content = json.loads(text, object_pairs_hook=unique)
        if not isinstance(content, dict):
            raise ValueError("it holds no table {...}")
    except FileNotFoundError:
        remedy = "Write one, as nnU-Net's documentation of dataset.json says."
        return None, [_error("no dataset.json", f"{path} does not exist", "this file", remedy)]
    except (OSError, ValueError, RecursionError) as error:
        remedy = "Correct the file; a checker of JSON shows the place."
        found = f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
        return None, [_error("no dataset.json", found, "JSON as nnU-Net reads it", remedy)]
    if not repeated:
        return content, []
    found = f"{', '.join(map(repr, repeated))} stands there twice; the last one counts"
    return content, [_warning("repeated keys", found, "each key once", "Remove or rename one of the two.")]


def _decoded(content: bytes) -> str:
    """As UTF-8, or a :class:`ValueError` for whoever saved it otherwise."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        place = content[: error.start].count(b"\n") + 1
        raise ValueError(f"it is not UTF-8 (line {place}); save it as plain UTF-8 in an editor") from None


def check_description(content: Mapping[str, Any], endings: Collection[str], mapped: bool) -> list[Finding]:
    """All that is wrong with a ``dataset.json``. Keys that nnU-Net does not know are nobody's business.

    Args:
        content: of the file.
        endings: file endings that nnU-Net's readers know, in small letters.
        mapped: ``labels`` in ``site.toml`` will give the labels other values, so theirs need not be nnU-Net's.
    """
    return [
        *_missing_keys(content),
        *_channels(content),
        *(_labels(content["labels"], content.get("regions_class_order"), mapped) if "labels" in content else ()),
        *_file_ending(content, endings),
        *_other_keys(content),
    ]


def channel_names(content: Mapping[str, Any]) -> dict[str, str]:
    """Names of the channels by number, in the order of the numbers, whatever the order in the file."""
    names = content.get("channel_names", content.get("modality", {}))
    return {key: names[key] for key in sorted(names, key=int)}


def known_values(content: Mapping[str, Any]) -> list[int]:
    """All values that ``labels`` allows in a label file, background, regions and ``ignore`` included; sorted."""
    entries = in_numbers(content["labels"]).values()
    return sorted({0} | {int(value) for entry in entries for value in (entry if isinstance(entry, list) else [entry])})


def _missing_keys(content: Mapping[str, Any]) -> Iterator[Finding]:
    missing = [key for key in ("labels", "numTraining", "file_ending") if key not in content]
    if "channel_names" not in content and "modality" not in content:
        missing.append("channel_names")
    if missing:
        remedy = "Add what is missing; see nnU-Net's documentation of dataset.json."
        yield _error("missing keys", f"it lacks {', '.join(missing)}", "all keys that nnU-Net needs", remedy)


def _channels(content: Mapping[str, Any]) -> Iterator[Finding]:
    key = "channel_names" if "channel_names" in content else "modality"
    if key not in content:
        return
    names, kind = content[key], "channel_names"
    if key != "modality" and "modality" in content and _size(content["modality"]) != _size(names):
        # nnU-Net plans by the one, and builds its network by the other
        found = f"modality has {_size(content['modality'])} channels, and channel_names {_size(names)}"
        yield _error(kind, found, "channel_names only", "Remove 'modality', which was nnU-Net's first version's.")
    wanted = 'the number of each channel, from "0" on, and its name'
    remedy = f'Write "{key}": {{"0": "T1", "1": "T2"}}, with the number of each file name\'s _0000 as the key.'
    if not isinstance(names, dict) or not names:
        yield _error(kind, f"{key} is {json.dumps(names)}", wanted, remedy)
    elif set(names) != {str(number) for number in range(len(names))}:
        if all(name.isdecimal() for name in names) and len({int(name) for name in names}) == len(names):
            ordered = {str(number): names[name] for number, name in enumerate(sorted(names, key=int))}
            remedy = f'Write "{key}": {json.dumps(ordered)}, and give the files the same numbers, from _0000 on.'
        yield _error(kind, f"{key} has the keys {', '.join(map(json.dumps, names))}", wanted, remedy)
    elif not all(isinstance(name, str) for name in names.values()):
        yield _error(kind, f"{key} has the names {', '.join(map(json.dumps, names.values()))}", "texts", remedy)


def _size(names: Any) -> int:
    return len(names) if isinstance(names, dict | list) else 0


def _labels(labels: Any, order: Any, mapped: bool) -> Iterator[Finding]:
    kind = "labels"
    if not isinstance(labels, dict) or not labels:
        remedy = 'Write "labels": {"background": 0, "tumour": 1}.'
        yield _error(kind, f"labels is {json.dumps(labels)}", "the name and the value of each label", remedy)
        return
    if all(name.isdecimal() and isinstance(value, str) for name, value in labels.items()):
        remedy = 'Swap them: "labels": {"background": 0, ...}.'
        yield _error(kind, "labels has the values as names", "names first, then values", remedy)
        return
    written = labels
    if not any(isinstance(value, list) for value in labels.values()):  # beside regions nnU-Net takes numbers only
        labels = in_numbers(labels)
        if IGNORE in labels and not mapped:
            labels[IGNORE] = written[IGNORE]  # and for 'ignore' too
    odd = {name: value for name, value in labels.items() if not _is_value(value, region=True)}
    if odd:
        found = ", ".join(f"{name} = {json.dumps(value)}" for name, value in odd.items())
        remedy = "Write whole numbers without quotes; for a region a list of them, as in [1, 2]."
        yield _error(kind, found, "a number, or a list of numbers, for each name", remedy)
        return
    taken = {name: value for name, value in written.items() if type(value) is not type(labels[name])}
    if taken:
        found = ", ".join(f"{name} = {json.dumps(value)}" for name, value in taken.items())
        remedy = "Write whole numbers, without quotes."
        yield _warning(kind, f"{found}, which nnU-Net takes for whole numbers", "whole numbers", remedy)
    yield from _background(labels)
    if not mapped:
        yield from _values(labels)
        yield from _regions(labels, order)


def _background(labels: Mapping[str, Any]) -> Iterator[Finding]:
    if BACKGROUND not in labels:
        zero = next((name for name, value in labels.items() if value == 0), None)
        remedy = f"Rename {zero!r} to 'background'." if zero else 'Add "background": 0 to labels.'
        wanted = "the label 'background' with the value 0"
        yield _error("background", f"labels has no 'background', only {', '.join(labels)}", wanted, remedy)
    elif labels[BACKGROUND] != 0:
        found = f"background = {json.dumps(labels[BACKGROUND])}"
        remedy = "Number the labels from background = 0 on, in dataset.json and in the label files."
        yield _error("background", found, "background = 0", remedy)


def _values(labels: Mapping[str, Any]) -> Iterator[Finding]:
    values = known_values({"labels": {name: value for name, value in labels.items() if name != IGNORE}})
    if not any(values):
        remedy = "Name at least one label besides background."
        yield _error("labels", f"labels has no value but {', '.join(map(str, values))}", "one label or more", remedy)
        return
    gaps = sorted(set(range(values[-1] + 1)) - {0, *values})
    negative = [value for value in values if value < 0]
    if IGNORE in labels:
        ignore = labels[IGNORE]
        if isinstance(ignore, list):
            yield _error("ignore", f"ignore = {json.dumps(ignore)}", "one number", "Give 'ignore' one value.")
        elif ignore in values or ignore < values[-1]:
            remedy = "Give 'ignore' the highest value, in dataset.json and in the label files; 'labels' in site.toml "
            remedy += "together with 'mapped_dataset' does so."
            found = f"ignore = {ignore}, and other labels have {', '.join(map(str, values))}"
            yield _error("ignore", found, f"ignore = {values[-1] + 1}, the highest value", remedy)
        elif ignore > values[-1] + 1:
            gaps += range(values[-1] + 1, ignore)
    if gaps or negative:
        remedy = (
            "Let site.toml map the labels to consecutive values: 'mapped_dataset' and 'labels' with the names of "
            "dataset.json (docs/labels.md), at each site with such values; or number them anew in dataset.json and in "
            "all label files."
        )
        every = [*values, *([labels[IGNORE]] if IGNORE in labels and not isinstance(labels[IGNORE], list) else [])]
        lacking = f", without {', '.join(map(str, gaps))}" if gaps else ""
        found = f"labels has the values {', '.join(map(str, every))}{lacking}"
        yield _error("label values with a gap", found, "consecutive values 0, 1, 2, ...", remedy)
    single = [value for value in labels.values() if not isinstance(value, list)]
    twice = sorted({value for value in single if single.count(value) > 1})
    for value in twice:
        names = [name for name, other in labels.items() if other == value]
        remedy = "Give each label its own value, or leave all names but one out."
        yield _warning("labels", f"{' and '.join(names)} are both {value}", "a value of its own for each name", remedy)


def _regions(labels: Mapping[str, Any], order: Any) -> Iterator[Finding]:
    key = "regions_class_order"
    if not any(isinstance(value, list) and len(value) > 1 for value in labels.values()):
        return  # nnU-Net does not read it
    regions = {
        name: set(value) if isinstance(value, list) else {value}
        for name, value in labels.items()
        if name != IGNORE and (set(value) if isinstance(value, list) else {value}) != {0}
    }
    remedy = f"Add {key}: for each region, in the order of labels, the value that its voxels get in a segmentation; "
    remedy += "a region comes before those within it."
    wanted = f"{key} with {len(regions)} values, one for each of {', '.join(regions)}"
    if not isinstance(order, list) or len(order) != len(regions):
        found = f"labels has regions, and {key} is {'missing' if order is None else json.dumps(order)}"
        yield _error(key, found, wanted, remedy)
        return
    known = set(known_values({"labels": labels}))
    if not all(_is_value(value, region=False) and value in known for value in order):
        yield _error(key, f"{key} = {json.dumps(order)}", f"values of labels: {sorted(known)}", remedy)
        return
    names = list(regions)
    for place, name in enumerate(names):
        hidden = next((inner for inner in names[:place] if regions[inner] < regions[name]), None)
        if hidden is not None:
            found = f"the region {name} comes after {hidden}, which lies within it: no voxel would ever be {hidden}"
            wanted = "a region before those within it"
            yield _warning(key, found, wanted, f"Put {name} before {hidden} in labels, and its value in {key}.")


def _file_ending(content: Mapping[str, Any], endings: Collection[str]) -> Iterator[Finding]:
    if "file_ending" not in content:
        return
    ending = content["file_ending"]
    if not isinstance(ending, str) or ending.lower() not in endings:
        remedy = (
            f"Write one of {', '.join(sorted(endings))}, with the dot; convert the files if they are none of these."
        )
        found = f"file_ending is {json.dumps(ending)}"
        yield _error("file_ending", found, "an ending that nnU-Net reads", remedy)


def _other_keys(content: Mapping[str, Any]) -> Iterator[Finding]:
    number = content.get("numTraining", 0)
    if not _is_value(number, region=False):
        remedy = "Write the number of training cases, without quotes."
        yield _error("numTraining", f"numTraining is {json.dumps(number)}", "a whole number", remedy)


def _is_value(value: Any, region: bool) -> bool:
    if region and isinstance(value, list):
        return bool(value) and all(_is_value(part, region=False) for part in value)
    return type(value) is int


def _error(kind: str, found: str, wanted: str, remedy: str) -> Finding:
    return Finding(Severity.error, kind, found, wanted, remedy, file=NAME)


def _warning(kind: str, found: str, wanted: str, remedy: str) -> Finding:
    return Finding(Severity.warning, kind, found, wanted, remedy, file=NAME)
