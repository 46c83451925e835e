"""``federation.json``: a site's own record of a training, beside its checkpoints."""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nnunet_fed.exchange.keys import last_round
from nnunet_fed.files import write_json

RECORD = "federation.json"
"""Its file, in the folder of the fold."""
PACKAGES = ("nnunet-fed", "nnunetv2", "torch", "grpcio")


class TrainingRecord:
    """What this site exchanged, with whom, and what happened; on disk after every change.

    Args:
        path: the file; an existing one is continued when ``resumed``.
        resumed: the training continues an earlier one.
    """

    def __init__(self, path: Path, resumed: bool):
        self._path = path
        self._content: dict[str, Any] = {"rounds": [], "events": []}
        if resumed and path.is_file():
            self._content = json.loads(path.read_text(encoding="utf-8"))

    def describe(self, **facts: Any) -> None:
        """Note facts of the training, and the versions it runs with."""
        versions = {package: version(package) for package in PACKAGES}
        self._content.update(facts, versions={"python": platform.python_version(), **versions})
        self._content["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
        self._write()

    def exchanged(
        self,
        scope: str,
        weights: dict[str, float],
        sent: int,
        received: int,
        seconds: float,
        diagnostics: dict[str, float],
    ) -> None:
        """Note one exchange; an exchange that a resumed training repeats stands once."""
        self._content["rounds"] = [entry for entry in self._content["rounds"] if entry["scope"] != scope]
        self._content["rounds"].append(
            {
                "scope": scope, "weights": weights, "bytes_sent": sent, "bytes_received": received,
                "seconds": round(seconds, 3), "at": time.time(), "diagnostics": diagnostics,
            }
        )  # fmt: skip
        self._content["bytes_sent"] = self._content.get("bytes_sent", 0) + sent
        self._content["bytes_received"] = self._content.get("bytes_received", 0) + received
        self._write()

    def undo(self, last: int) -> None:
        """Note that the rounds after one, counted from 0, were undone."""
        rounds = self._content["rounds"]
        undone = [entry for entry in rounds if last_round(entry["scope"]) > last]
        self._content["rounds"] = [entry for entry in rounds if entry not in undone]
        self._content["undone_rounds"] = self._content.get("undone_rounds", []) + undone
        self._write()

    def note(self, **facts: Any) -> None:
        """Note further facts."""
        self._content.update(facts)
        self._write()

    def happened(self, text: str) -> None:
        """Note an event in words."""
        self._content["events"].append({"at": time.time(), "text": text})
        self._write()

    def _write(self) -> None:
        write_json(self._path, self._content)


def noted_in(folder: Path, fact: str) -> Any:
    """A fact in the record that an earlier training has left in a fold's folder; ``None``: it has not noted it."""
    path = folder / RECORD
    return json.loads(path.read_text(encoding="utf-8")).get(fact) if path.is_file() else None


@contextmanager
def logged_by(write: Callable[[str], None]) -> Iterator[None]:
    """Let nnU-Net's training log have what nnunet_fed logs."""

    class _Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            write(self.format(record))

    package, handler = logging.getLogger("nnunet_fed"), _Handler(logging.INFO)
    level, propagate = package.level, package.propagate
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    package.propagate = False  # nnU-Net's log shows it on the console too
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
        package.propagate = propagate
