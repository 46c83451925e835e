"""Find out what a path is, and read from it what a report needs. Neither torch nor nnU-Net is imported."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunet_fed.agreement.fingerprint_files import OWN, common_file, own_file
from nnunet_fed.coordinator.history import record_of
from nnunet_fed.coordinator.store import Store
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.evaluation.summary import MODELS
from nnunet_fed.report.training_log import TrainingLog, read_training_log
from nnunet_fed.study.federation import PLANS_KEY

logger = logging.getLogger(__name__)

Content = dict[str, Any]


@dataclass(frozen=True)
class SiteFiles:
    """What a simulated site left; empty where it left nothing."""

    record: Content = field(default_factory=dict)
    """``federation.json``."""
    log: TrainingLog = field(default_factory=TrainingLog)
    fold: str = ""
    """Of the training that record and log are of: the last one."""
    validation: dict[str, Content] = field(default_factory=dict)
    """nnU-Net's ``summary.json`` by model: ``final``, ``global``, ...; of several folds with the cases of all."""
    lesions: Content = field(default_factory=dict)
    """``lesions.json`` of the final model; of several folds with the cases of all."""
    plans: Content = field(default_factory=dict)
    fingerprint: Content = field(default_factory=dict)
    """Of all sites' cases."""
    local_fingerprint: Content = field(default_factory=dict)
    """Of this site's cases."""
    labels: Content = field(default_factory=dict)
    """Of ``dataset.json``."""


@dataclass(frozen=True)
class Run:
    """A simulation, or a coordinator's record alone."""

    name: str
    summary: Content
    """``summary.json``; empty for a record alone."""
    record: Content
    """What ``nnunet_fed status --json`` prints; empty where the run had no coordinator."""
    sites: dict[str, SiteFiles]

    @property
    def study(self) -> Content:
        """The study's settings, from the record, else from what a site or its plans say."""
        known = [self.record.get("study"), *(files.record.get("study") for files in self.sites.values())]
        known += [files.plans.get(PLANS_KEY, {}).get("study") for files in self.sites.values()]
        return next((study for study in known if study), {})

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.summary.get("method") or self.study.get("method", {}).get("name", "unknown method"))

    @property
    def cross_site(self) -> Content | None:
        """Dice of each site's model at each site, from the summary, else from the coordinator's record."""
        runs = [run for run in self.record.get("runs", {}).values() if run.get("purpose") == "training"]
        return self.summary.get("cross_site") or (runs[-1].get("cross_site") if runs else None)

    @property
    def site_names(self) -> list[str]:
        """All sites of which anything is known."""
        return list(dict.fromkeys([*self.summary.get("sites", {}), *self.record.get("sites", {}), *self.sites]))

    @property
    def training(self) -> list[Content]:
        """The collectives of the last training that the coordinator served."""
        runs = [run for run in self.record.get("runs", {}).values() if run.get("purpose") == "training"]
        return list(runs[-1]["collectives"]) if runs else []


@dataclass(frozen=True)
class Comparison:
    """What ``nnunet_fed compare`` left."""

    name: str
    content: Content
    """``compare.json``."""
    cases: list[dict[str, str]]
    """Rows of ``compare.csv``."""
    planned: Run | None
    runs: list[Run]
    """The first seed of each method, in the order of ``compare.json``."""


def read_source(path: Path) -> Run | Comparison:
    """Read a simulation, a comparison, a coordinator's state directory, or a record as JSON.

    Raises:
        ConfigurationError: the path is none of them, or one of its files cannot be read.
    """
    if path.is_file():
        return _record_alone(path)
    if (path / "compare.json").is_file():
        return _comparison(path)
    if any((path / name).is_file() for name in ("summary.json", "record.json")):
        return read_run(path)
    if (path / "journal.sqlite").is_file():
        return _state(path)
    what = "does not exist" if not path.exists() else "holds no run"
    raise ConfigurationError(
        f"{path} {what}. Name the --out folder of a finished 'nnunet_fed simulate' (it has summary.json) or "
        "'nnunet_fed compare' (compare.json), a coordinator's --state folder, or a file with what "
        "'nnunet_fed status --json' prints."
    )


def read_run(folder: Path) -> Run:
    """Read a simulation; raises :class:`ConfigurationError` if a file is damaged."""
    summary, record = _read(folder / "summary.json"), _read(folder / "record.json")
    if summary and not isinstance(summary.get("sites"), dict):
        raise ConfigurationError(f"{folder / 'summary.json'} names no sites: it is not of 'nnunet_fed simulate'.")
    if not summary:
        logger.warning("%s has no summary.json: the report has no Dice of its sites.", folder)
    places = sorted(path for path in (folder / "sites").glob("*") if path.is_dir())
    return Run(folder.resolve().name, summary, record, {place.name: _site(place) for place in places})


def _record_alone(path: Path) -> Run:
    record = _read(path)
    if not isinstance(record.get("study"), dict) or not isinstance(record.get("sites"), dict):
        raise ConfigurationError(f"{path} is no record: write one with 'nnunet_fed status --json > {path.name}'.")
    if "runs" not in record:
        raise ConfigurationError(
            f"{path} has no 'runs', so it is only a status: 'nnunet_fed status --json' prints the whole record."
        )
    return Run(str(record["study"].get("name", path.stem)), {}, record, {})


def _state(folder: Path) -> Run:
    try:
        store = Store(folder, migrate=False)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"{error} A coordinator that runs tells its record with 'nnunet_fed status --json > record.json'; report "
            "that file."
        ) from None
    try:
        record = record_of(store)
    finally:
        store.close()
    return Run(str(record["study"].get("name", folder.name)), {}, record, {})


def _comparison(folder: Path) -> Comparison:
    content = _read(folder / "compare.json")
    methods = content.get("methods")
    if not isinstance(methods, dict) or not methods:
        raise ConfigurationError(f"{folder / 'compare.json'} has no methods: let 'nnunet_fed compare' finish first.")
    runs = []
    for method, figures in methods.items():
        seeds = sorted(figures.get("seeds") or [0])
        place = folder / "runs" / f"{method}-{seeds[0]}"
        if (place / "summary.json").is_file():
            runs.append(read_run(place))
        else:
            logger.warning("%s is not there: the report has no training curves and images of %s.", place, method)
    planned = folder / "planned"
    table = folder / "compare.csv"
    rows = list(csv.DictReader(table.open(encoding="utf-8", newline=""))) if table.is_file() else []
    there = any((planned / name).is_file() for name in ("summary.json", "record.json"))
    return Comparison(folder.resolve().name, content, rows, read_run(planned) if there else None, runs)


def _site(place: Path) -> SiteFiles:
    folds = sorted((place / "nnUNet_results").glob("*/*/fold_*"), key=lambda path: path.stat().st_mtime)
    prepared = sorted((place / "nnUNet_preprocessed").glob(f"*/{OWN}"))
    files: dict[str, Any] = {}
    if folds:
        fold = folds[-1]
        of_model = sorted(fold.parent.glob("fold_*"))
        logs = sorted(fold.glob("training_log_*.txt"))  # named by the time
        files = {
            "record": _read(fold / "federation.json"),
            "log": read_training_log(log.read_text(encoding="utf-8", errors="replace") for log in logs),
            "fold": fold.name.removeprefix("fold_") if len(of_model) > 1 else "",
            "validation": {
                model: found
                for model, below in MODELS.items()
                if (found := _together([path / below / "validation" / "summary.json" for path in of_model]))
            },
            "lesions": _together([path / "validation" / "lesions.json" for path in of_model]),
        }
    if prepared:
        folder = prepared[-1].parent  # with a label map, the data set that is trained
        plans = sorted(folder.glob("*Plans.json"))
        files |= {
            "fingerprint": _read(common_file(folder)),
            "local_fingerprint": _read(own_file(folder)),
            "plans": _read(plans[-1]) if plans else {},
            "labels": _read(folder / "dataset.json").get("labels", {}),
        }
    return SiteFiles(**files)


def _together(paths: Iterable[Path]) -> Content:
    """What the same file of several folds says: the last one's content, with the cases of all."""
    together: Content = {}
    for content in filter(None, map(_read, paths)):
        for name in ("metric_per_case", "cases"):
            if name in content and name in together:
                more = content[name]
                content[name] = {**together[name], **more} if isinstance(more, dict) else [*together[name], *more]
        together.update(content)
    return together


def _read(path: Path) -> Content:
    """The object in a JSON file; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} should hold a JSON object.")
    return content


def models_of(summary: Mapping[str, Any]) -> list[str]:
    """The models whose Dice a simulation's summary tells, the deployed one first under the name that says most."""
    known = list(summary.get("mean_dice", {}))
    if "personal" in known:
        return [model for model in ("personal", "global", "federated", "super") if model in known]
    return ["final", *(model for model in known if model not in ("final", "global"))]
