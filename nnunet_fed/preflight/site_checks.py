"""What ``nnunet_fed check`` finds out at a site without a network: a finding each, with the remedy. Source: ours.

The network's part is in :mod:`nnunet_fed.transport.site.connection_checks`, the memory's in
:mod:`nnunet_fed.preflight.resources`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from nnunet_fed.agreement.plan_digest import plans_digest
from nnunet_fed.datasets.findings import FILE, counted
from nnunet_fed.datasets.folds import FOLDS, SPLITS, cases_of, has_folds, read_folds, shown
from nnunet_fed.datasets.preprocessed import PREFIX, is_complete
from nnunet_fed.files import FULL
from nnunet_fed.study.federation import PLANS_KEY, Federation, study_in
from nnunet_fed.study.methods import METHODS
from nnunet_fed.study.methods.custom_options import EXTERNAL_TRAINERS

PACKAGES = ("nnunet-fed", "nnunetv2", "torch", "grpcio")
"""Whose versions the sites compare."""
EQUAL_PACKAGES = ("nnunetv2",)
"""Those in which planning refuses a difference."""
RAW, PREPROCESSED, RESULTS = "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"
FOLDERS = (RAW, PREPROCESSED, RESULTS)
"""Environment variables of nnU-Net."""
LARGEST_SKEW = 60.0
"""Seconds that two clocks may differ: deadlines are shown by the coordinator's, certificates judged by both."""
GB = 1e9
LEAST_RESULTS_GB, LEAST_PREPROCESSED_GB = 5.0, 5.0
"""Free disk to ask for where nothing is known of network and data."""
BYTES_OF_A_VOXEL = 4
"""nnU-Net stores float32 for each channel; what packing saves is left out, and what resampling adds or takes."""
PREPROCESSED_PER_RAW = 5.0
"""Where the files were not looked at; these are mostly compressed integers. A guess, on the safe side."""


class Outcome(str, Enum):
    """How a check ended."""

    ok = "ok"
    warning = "warning"
    failed = "failed"
    skipped = "skipped"


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    about: str
    state: Outcome
    text: str
    remedy: str = ""
    """What to do about it, unless the text says so."""

    @property
    def line(self) -> str:
        """For a terminal."""
        remedy = f" {self.remedy}" if self.remedy else ""
        return f"{self.state.value:8} {self.about:14} {self.text}{remedy}"


def exit_status(findings: Iterable[Finding]) -> int:
    """0: nothing to complain of; 1: a check failed; 3: there are warnings only (2 is a command that cannot run)."""
    states = {finding.state for finding in findings}
    return 1 if Outcome.failed in states else 3 if Outcome.warning in states else 0


def own_versions() -> dict[str, str]:
    """Of :data:`PACKAGES`, those that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def check_versions(site: str, told: Mapping[str, Mapping[str, str]]) -> Finding:
    """Compare this site's versions with those of the others.

    Args:
        site: name of this site.
        told: by site (or the coordinator), by package; this site's own are among them. Whoever does not tell a
            package is not compared.
    """
    own = dict(sorted(told[site].items()))
    others = {other: versions for other, versions in told.items() if other != site}
    shown = ", ".join(f"{package} {number}" for package, number in own.items())
    differing = {
        package: [
            f"{versions[package]} at {other}"
            for other, versions in others.items()
            if package in versions and _release(versions[package]) != _release(number)
        ]
        for package, number in own.items()
    }
    differing = {package: places for package, places in differing.items() if places}
    if not differing:
        return Finding("versions", Outcome.ok, f"{shown}; no other at {', '.join(others)}")
    text = "; ".join(f"{package} is {own[package]} here, {', '.join(places)}" for package, places in differing.items())
    if set(differing) & set(EQUAL_PACKAGES):
        return Finding(
            "versions", Outcome.failed, f"{text}.", "Install the same everywhere: planning refuses otherwise."
        )
    return Finding("versions", Outcome.warning, f"{text}.", "Results of the sites may differ in the last digits.")


def _release(number: str) -> str:
    """Without a build's suffix, such as torch's ``+cu126``."""
    return number.partition("+")[0]


def check_clock(here: float, there: float, trip: float) -> Finding:
    """Compare clocks.

    Args:
        here: time at this site in the middle of a call, in seconds since the epoch.
        there: the coordinator's answer.
        trip: seconds that the call took; half of them is what the difference is uncertain by.
    """
    skew = there - here
    shown = f"{abs(skew):.1f} s {'behind' if skew > 0 else 'ahead of'} the coordinator's (+/- {trip / 2:.1f} s)"
    if abs(skew) <= LARGEST_SKEW + trip / 2:
        return Finding("clock", Outcome.ok, shown)
    return Finding("clock", Outcome.warning, f"{shown}.", "Let both machines follow a time server (NTP).")


def find_plans(folder: Path, name: str | None, study: Federation | None) -> dict[str, Any] | Finding:
    """The federation's plans of a data set, or what is wrong with them.

    Args:
        folder: the data set's, in ``nnUNet_preprocessed``.
        name: of the plans; ``None``: the study's, or the only ones that carry a study.
        study: as the coordinator has it, if it is known.
    """
    name = name or (study.plans_name if study else None)
    paths = [folder / f"{name}.json"] if name else sorted(folder.glob("*Plans.json"))
    found = {}
    for path in paths:
        try:
            plans = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            return Finding("plans", Outcome.failed, f"{path} cannot be read: {error}.", "Plan again.")
        if PLANS_KEY in plans:
            found[path.stem] = plans
    if len(found) == 1:
        return next(iter(found.values()))  # type: ignore[no-any-return]
    if found:
        return Finding("plans", Outcome.failed, f"{folder} has {', '.join(found)}.", "Say which with -p.")
    if name and paths[0].exists():
        text = f"{paths[0]} was not made for a federation."
        return Finding("plans", Outcome.failed, text, "Run 'nnunet_fed plan_and_preprocess', and name its plans.")
    text = f"{folder} has no {f'plans {name}' if name else 'plans of a federation'} yet"
    return Finding("plans", Outcome.skipped, f"{text}: 'nnunet_fed plan_and_preprocess' makes them.")


def check_plans(
    plans: Mapping[str, Any], study: Federation, published: Mapping[str, Any] | None, configuration: str
) -> Finding:
    """Compare a site's plans with the study at the coordinator and with the other sites' plans.

    Args:
        plans: nnU-Net's, with the study.
        study: as the coordinator has it.
        published: the digests that the sites gathered when they planned, by site; ``None``: they have not.
        configuration: that the site will train.
    """
    carried = plans[PLANS_KEY]
    again = "Run 'nnunet_fed plan_and_preprocess' again."
    if study_in(plans).digest != study.digest:
        text = f"they belong to another study than '{study.name}', which the coordinator serves."
        return Finding("plans", Outcome.failed, text, f"{again} Or correct 'coordinator' in site.toml.")
    digest = plans_digest(plans)
    if digest != carried["plans_digest"]:
        text = f"they were changed since the sites agreed on them ({carried['plans_digest'][:12]}, now {digest[:12]})."
        return Finding("plans", Outcome.failed, text, f"Undo that. {again}")
    others = {site: answer["digest"] for site, answer in (published or {}).items()}
    odd = [site for site, other in others.items() if other != digest]
    if odd:
        return Finding("plans", Outcome.failed, f"{', '.join(odd)} planned something else.", f"{again} At all sites.")
    if configuration not in plans["configurations"]:
        there = ", ".join(plans["configurations"])
        return Finding("plans", Outcome.failed, f"there is no configuration {configuration}, only {there}.", "Use -c.")
    agreed = f", agreed with {', '.join(others)}" if others else ""
    return Finding("plans", Outcome.ok, f"study {study.digest[:12]}, plans {digest[:12]}{agreed}")


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
        return Finding("fold", Outcome.warning, text, f"Give nnUNetv2_train the fold 'all', not {study.fold}.")
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


def check_trainer(plugin: Path, trainer: str | None, expected: str | None) -> Finding:
    """See that nnU-Net will find the federated trainers, and that the command names the study's.

    Args:
        plugin: the folder through which it finds them.
        trainer: what the command will say; ``None``: not given.
        expected: the trainer of the study's method; ``None``: the study is not known.
    """
    given = os.environ.get(EXTERNAL_TRAINERS, "")
    folders = [Path(part).resolve() for part in given.split(os.pathsep) if part]
    if plugin.resolve() not in folders:
        text = f"{EXTERNAL_TRAINERS} is {given or 'not set'}: nnU-Net would not find the federated trainers."
        remedy = f'Say: export {EXTERNAL_TRAINERS}="$(nnunet_fed plugin-path)"'
        return Finding("trainer", Outcome.failed, text, remedy)
    if trainer and expected and trainer != expected:
        own = {table.own_trainer() for table in METHODS.values()}
        if trainer in own or expected not in own:
            text = f"the study needs {expected}, not {trainer}."
            return Finding("trainer", Outcome.failed, text, f"Use -tr {expected}.")
        text = f"{trainer} is not {expected}, the package's own trainer of the study's method."
        return Finding("trainer", Outcome.warning, text, "It has to be a trainer of that method (docs/new_method.md).")
    return Finding("trainer", Outcome.ok, trainer or expected or "nnU-Net finds the federated trainers")


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
