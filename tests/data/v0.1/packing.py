"""Pack what ``make.py`` has made: what a later version needs, and nothing of the machine on which it was made."""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

DROPPED = ("checkpoint_best.pth", "debug.json", "lock")
"""Files of a training that continuing it does not need."""
TEXTS = (".json", ".jsonl", ".toml", ".txt")
OF_THIS_MACHINE = (str(Path.home()), sys.prefix)


def pack(work: Path, out: Path, methods: tuple[str, ...], plans: str) -> None:
    """Write an archive of the preprocessed data, which all studies share, and one of each study."""
    planned = work / methods[0] / "sites"
    data = {
        path: path.relative_to(planned.parent)
        for path in _files(planned)
        if "nnUNet_preprocessed" in path.parts and not path.name.startswith(plans)
    }
    image = min((work / "data" / "test" / "imagesTs").iterdir())
    _write(out / "preprocessed.tar.xz", {**data, image: Path("imagesTs") / image.name}, work)
    for method in methods:
        _write(out / f"{method}.tar.xz", _of_study(work / method, plans), work)
    _write(out / "finished.tar.xz", {**_of_study(work / "finished", plans), **_results(work / "finished")}, work)


def _of_study(study: Path, plans: str) -> dict[Path, Path]:
    """The study, the coordinator's state, the plans, and what the training has written."""
    kept = {}
    for path in _files(study):
        is_state = path.relative_to(study).parts[0] == "coordinator" and path.suffix != ".log"
        is_result = "nnUNet_results" in path.parts and path.suffix not in (".log", ".png", ".txt")
        if is_state or is_result or path.name in (f"{plans}.json", "federation.toml", "site.toml"):
            kept[path] = path.relative_to(study)
    return kept


def _results(study: Path) -> dict[Path, Path]:
    """Of a finished study: what a report shows besides."""
    shown = [study / "summary.json", study / "record.json", *study.rglob("training_log_*.txt")]
    return {path: path.relative_to(study) for path in shown}


def _files(folder: Path) -> Iterable[Path]:
    """Without what links lead to, which is the data that another study has."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            yield from _files(path)
        elif path.is_file() and path.name not in DROPPED:
            yield path


def _write(archive: Path, files: dict[Path, Path], work: Path) -> None:
    with tarfile.open(archive, "w:xz", preset=9) as packed:
        for path, name in sorted(files.items(), key=lambda item: item[1]):
            content = path.read_bytes()
            if path.suffix in TEXTS:
                content = content.replace(str(work).encode(), b"/study")
            for place in (str(work), *OF_THIS_MACHINE):
                assert place.encode() not in content, f"{path} names {place}"
            entry = tarfile.TarInfo(str(name))
            entry.size = len(content)
            packed.addfile(entry, io.BytesIO(content))
