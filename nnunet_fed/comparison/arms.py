"""Arms of a fair comparison: each method and seed once, on the same sites, plans, folds, start and number of steps.

A federation has as many epochs with every method: what a method takes for local fine-tuning after the rounds, it has
fewer rounds. Nothing else is set by method, but what the user says. Source: ours.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

from pydantic import ValidationError
from rich.console import Console

from nnunet_fed.agreement.stages import stages_of
from nnunet_fed.comparison import pooled_data
from nnunet_fed.comparison.pooled_data import Planned, fix_folds, pool
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.evaluation.summary import result_table
from nnunet_fed.files import move, new_folder, write_text
from nnunet_fed.simulation.simulate import Simulation, require_trainer, simulate
from nnunet_fed.study.federation import Federation, Fold
from nnunet_fed.study.labels import Sources
from nnunet_fed.study.methods import METHODS, method_settings
from nnunet_fed.study.toml import explain, from_toml, to_toml

logger = logging.getLogger(__name__)
SETTINGS, PLANNED, POOLED, RUNS, UNFINISHED = "compare.toml", "planned", "pooled", "runs", "unfinished"
LOOKS = "data_check"
"""In the folder of a comparison. What is being made is in the last one, and moves when it is complete."""
VARIANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""A name of a variant: it becomes part of a folder's, and options follow it after a dot."""
PACKAGES = ("nnunet-fed", "nnunetv2", "torch")
"""Whose versions must be the same in all arms."""


@dataclass(frozen=True)
class Comparison:
    """What to compare."""

    sites: dict[str, Path]
    """Raw data set of each site."""
    out: Path
    """A new folder, or that of an earlier comparison with the same settings, whose finished arms are kept."""
    methods: tuple[str, ...]
    """Names of methods, ``pooled``, and names of :attr:`variants`."""
    seeds: tuple[int, ...]
    study: Mapping[str, Any]
    """Settings of :class:`Federation` that all arms share: all but name, sites, method and seed."""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By method or variant: options of its table that are not the defaults."""
    variants: Mapping[str, str] = field(default_factory=dict)
    """Methods by further names under which they take part, too, with other options."""
    labels: Mapping[str, Sources] = field(default_factory=dict)
    """As for a :class:`Simulation`."""
    device: str = "cpu"
    threads: int | None = None
    pretrained: Path | None = None
    """The checkpoint whose digest the study names."""
    devices: tuple[int, ...] = ()
    """As for a :class:`Simulation`."""

    def study_of(self, method: str, seed: int) -> Federation:
        """The study of an arm; raises :class:`ConfigurationError` if there is none with this budget."""
        kind, known = self.variants.get(method, method), (*METHODS, pooled_data.SITE)
        if method_settings(kind, {})["name"] not in known:
            raise ConfigurationError(f"--methods: there is no {kind!r}; known: {', '.join(known)}.")
        named_well = VARIANT.fullmatch(method) and method not in known
        if method in self.variants and (not named_well or kind == pooled_data.SITE):
            raise ConfigurationError(
                f"--methods {method}={kind}: a variant has a name that is no method's, of letters, digits, - and _, "
                f"and is of any method but '{pooled_data.SITE}', as in fedgs_strong=fedgs."
            )
        options = dict(self.options.get(method, {}))
        if method == pooled_data.SITE and options:
            raise ConfigurationError(f"--option {pooled_data.SITE}.{next(iter(options))}: 'pooled' has no options.")
        table = method_settings("local" if method == pooled_data.SITE else kind, options)
        settings = {**self.study, "name": f"{method}-{seed}", "sites": tuple(self.sites), "method": table, "seed": seed}
        if method == pooled_data.SITE:
            settings |= {"sites": (pooled_data.SITE,), "min_sites": None, "cross_site": False}
        study = _validated(settings)
        if study.method.own_channels:
            raise ConfigurationError(
                f"--option {method}.{study.method.own_channels_option}: with it the sites plan another way, and all "
                "methods of a comparison share one planning. Leave it out."
            )
        epochs = study.method.fine_tuning
        rounds, rest = divmod(epochs, study.local_epochs)
        if rest or rounds >= study.rounds:
            raise ConfigurationError(
                f"{method} fine-tunes for {epochs} epochs, which are taken from its {study.rounds} rounds of "
                f"{study.local_epochs}, so that all methods take as many steps: at least a round must remain, and they "
                f"must be whole rounds. Use more --rounds, or --option {method}.finetune_epochs=N."
            )
        return _validated({**settings, "rounds": study.rounds - rounds})

    def run_of(self, method: str, seed: int) -> Path:
        """Folder of an arm, which is there once the arm has finished."""
        return self.out / RUNS / f"{method}-{seed}"

    @property
    def arms(self) -> list[tuple[str, int]]:
        """Method and seed of each arm, seed by seed."""
        return [(method, seed) for seed in self.seeds for method in self.methods]

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same whenever an arm is added."""
        return {
            "device": self.device,
            "sites": {name: str(folder.resolve()) for name, folder in sorted(self.sites.items())},
            "study": dict(self.study),
            "labels": {site: dict(sources) for site, sources in self.labels.items()},
            "versions": {package: version(package) for package in PACKAGES},
            "options": {method: dict(self.options.get(method, {})) for method in self.methods},
            "variants": dict(self.variants),
        }  # fmt: skip


def compare(comparison: Comparison, console: Console) -> dict[str, str]:
    """Train and validate all arms that are not there yet, one after another.

    Planning and preprocessing are done once (``out/planned``) and shared. An arm that was interrupted begins anew.

    Returns:
        Sites that are left out of all figures, and why.

    Raises:
        ConfigurationError: a setting is wrong, or not the one with which the folder was made; nothing has started then.
        FederationError: an arm failed.
    """
    _check(comparison)
    remember(comparison)
    shutil.rmtree(comparison.out / UNFINISHED, ignore_errors=True)
    planned, first = comparison.out / PLANNED, comparison.study_of("local", comparison.seeds[0])
    if not planned.is_dir():
        console.print("Planning and preprocessing, once for all methods.")
        _complete(comparison.out, planned, partial(_plan, comparison, first, console))
    left_out = _left_out(comparison, planned)
    if pooled_data.SITE in comparison.methods and not (comparison.out / POOLED / "federation.toml").is_file():
        shutil.rmtree(comparison.out / POOLED, ignore_errors=True)
        pooled_study = comparison.study_of(pooled_data.SITE, comparison.seeds[0])
        pool(planned, comparison.out / POOLED, _with_plans(pooled_study, planned))
    for number, (method, seed) in enumerate(comparison.arms, start=1):
        run, arm = comparison.run_of(method, seed), f"Arm {number} of {len(comparison.arms)}: {method}, seed {seed}"
        if run.is_dir():
            console.print(f"{arm}, is there already.")
        else:
            console.print(f"{arm}.")
            _complete(comparison.out, run, partial(_train, comparison, method, seed, console))
    return left_out


def remember(comparison: Comparison) -> None:
    """Write the settings; or see that those with which the folder was made are these.

    Methods and seeds may be added. Raises :class:`ConfigurationError` that names what differs.
    """
    path = comparison.out / SETTINGS
    settings: dict[str, Any] = from_toml(to_toml(comparison.settings))
    if path.is_file():
        before = from_toml(path.read_text(encoding="utf-8"))
        for table in ("options", "variants"):
            earlier = before.get(table, {})
            for method in set(earlier) & set(settings[table]):
                _require_same(path, f"{table}.{method}", earlier[method], settings[table][method])
            settings[table] = {**earlier, **settings[table]}
        for key in ("device", "sites", "study", "labels", "versions"):
            _require_same(path, key, before.get(key), settings.get(key))
    else:
        new_folder(comparison.out)
    write_text(path, to_toml(settings))


def _check(comparison: Comparison) -> None:
    """See that every arm can be made."""
    for name, given in (("--methods", comparison.methods), ("--seeds", comparison.seeds)):
        if not given:
            raise ConfigurationError(f"{name}: give at least one.")
    if len(set(comparison.methods)) < len(comparison.methods):
        raise ConfigurationError(f"--methods {','.join(comparison.methods)}: name each method once.")
    unused = sorted(set(comparison.options) - set(comparison.methods))
    if unused:
        raise ConfigurationError(f"--option {unused[0]}.NAME: '{unused[0]}' is none of --methods.")
    if "all" in _folds(comparison):
        raise ConfigurationError("--fold all keeps no case for validation, so nothing can be compared: use numbers.")
    *first, last = stages_of(str(comparison.study.get("configuration", "")))
    if first:
        raise ConfigurationError(
            f"--config {last}: it is the second of two trainings, and a comparison is of one. Compare with --config "
            f"{first[-1]} or 3d_fullres; 'nnunet_fed simulate' trains both stages with one method."
        )
    for method, seed in comparison.arms:
        require_trainer(comparison.study_of(method, seed))


def _plan(comparison: Comparison, study: Federation, console: Console, folder: Path) -> None:
    planning = Simulation(
        comparison.sites, folder, study, "plan", threads=comparison.threads, labels=comparison.labels,
        looks=comparison.out / LOOKS,
    )  # fmt: skip
    simulate(planning, console)
    for site in study.sites:
        fix_folds(folder / "sites" / site)


def _left_out(comparison: Comparison, planned: Path) -> dict[str, str]:
    """Sites that keep no case for validation; raises :class:`ConfigurationError` if a fold is missing, or all are."""
    sites = [Planned.read(site, planned / "sites" / site) for site in sorted(comparison.sites)]
    fold = max(map(int, _folds(comparison)))
    for site in sites:
        if site.folds and fold >= len(site.folds):
            raise ConfigurationError(f"--fold {fold}: the last fold of site '{site.site}' is {len(site.folds) - 1}.")
    left_out = {
        site.site: f"has {len(site.cases)} cases, too few for folds, and trains on all of them"
        for site in sites
        if not site.folds
    }
    if len(left_out) == len(sites):
        raise ConfigurationError(
            "No site has enough cases for a cross-validation (5), so none can be kept for validation. Add cases, or a "
            "splits_final.json to the sites' folders."
        )
    for name, reason in left_out.items():
        logger.warning("Site '%s' %s: it is left out of all figures.", name, reason)
    return left_out


def _folds(comparison: Comparison) -> list[Fold]:
    folds: list[Fold] = comparison.study.get("folds") or [comparison.study.get("fold", 0)]
    return folds


def _train(comparison: Comparison, method: str, seed: int, console: Console, folder: Path) -> None:
    study, planned = comparison.study_of(method, seed), comparison.out / PLANNED
    sites, labels = comparison.sites, comparison.labels
    if method == pooled_data.SITE:
        planned, labels = comparison.out / POOLED, {}
        sites = {pooled_data.SITE: planned / pooled_data.DATA}
    arm = Simulation(
        sites, folder, study, "validate", comparison.device, comparison.threads, planned, labels,
        pretrained=comparison.pretrained, devices=comparison.devices,
    )  # fmt: skip
    console.print(result_table({**simulate(arm, console), "method": method}))


def _with_plans(study: Federation, planned: Path) -> Federation:
    """The study with the name of the plans that planning has chosen."""
    return study.model_copy(update={"plans_name": Federation.read(planned / "federation.toml").plans_name})


def _complete(out: Path, folder: Path, make: Callable[[Path], None]) -> None:
    """Have a folder made elsewhere and moved: what a killed comparison left running never writes into the next one."""
    building = out / UNFINISHED / f"{folder.name}-{uuid4().hex[:8]}"
    make(building)
    folder.parent.mkdir(exist_ok=True)
    move(building, folder)


def _validated(settings: Mapping[str, Any]) -> Federation:
    try:
        return Federation.model_validate(settings)
    except ValidationError as error:
        name = settings["method"]["name"]
        raise ConfigurationError(f"The study of '{name}': {explain(error, Federation)}") from None


def _require_same(path: Path, key: str, before: Any, now: Any) -> None:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*before, *now]):
            _require_same(path, f"{key}.{name}", before.get(name), now.get(name))
    elif before != now:
        found, wanted = ("nothing" if value is None else json.dumps(value) for value in (before, now))
        raise ConfigurationError(
            f"{path} says that this comparison was made with {key} = {found}, but now it is {wanted}. Methods and "
            "seeds may be added, all else must stay: give the same options, or another --out."
        )
