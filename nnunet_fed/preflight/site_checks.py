"""What ``nnunet_fed check`` finds out at a site without a network: a finding each, with the remedy. Source: ours.

The folders' part is in :mod:`nnunet_fed.preflight.folder_checks`, the network's in
:mod:`nnunet_fed.transport.site.connection_checks`, the memory's in :mod:`nnunet_fed.preflight.resources`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nnunet_fed.agreement.plan_digest import plans_digest
from nnunet_fed.study.federation import PLANS_KEY, Federation, study_in
from nnunet_fed.study.methods import METHODS
from nnunet_fed.study.methods.custom_options import EXTERNAL_TRAINERS

PACKAGES = ("nnunet-fed", "nnunetv2", "torch", "grpcio")
"""Whose versions the sites compare."""
EQUAL_PACKAGES = ("nnunetv2",)
"""Those in which planning refuses a difference."""
LARGEST_SKEW = 60.0
"""Seconds that two clocks may differ: deadlines are shown by the coordinator's, certificates judged by both."""
GB = 1e9


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
