"""Which fold of the study a command at a site trains: nnU-Net's command names this site's fold. Source: ours."""

from __future__ import annotations

from typing import NamedTuple

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.study.federation import Federation, Fold
from nnunet_fed.study.site import Site


class TrainedFold(NamedTuple):
    """What a command trains."""

    study: Fold
    """The fold of the study: the run that the site takes part in."""
    all_cases: bool
    """On all cases of this site, though the command names a number: results of each fold have a folder then."""


def trained_fold(command: Fold, study: Federation, site: Site) -> TrainedFold:
    """The fold of the study that a command trains at a site.

    It is the one that the command names, unless ``site.toml`` maps folds. Whether the study has it, the coordinator
    says: its study may have got more folds than the one in the plans.

    Args:
        command: the fold that nnU-Net's command names.
        study: in the plans.
        site: this site's settings.

    Raises:
        ConfigurationError: the command's fold is none that this site trains, or of more than one fold of the study.
    """
    by_study: dict[Fold, Fold] = {}
    if site.fold is not None and site.fold != "all":
        by_study[study.fold] = site.fold
        if command == study.fold and not study.folds and not site.folds:  # as in version 0.1
            return TrainedFold(study.fold, False)
    by_study |= {_fold(name): own for name, own in site.folds.items()}
    otherwise: Fold | None = "all" if site.fold == "all" else None
    taken: dict[Fold, Fold] = {}
    for fold in dict.fromkeys([*by_study, *study.trained_folds]):
        own = by_study.get(fold, otherwise or fold)
        if own != "all" and taken.setdefault(own, fold) != fold:
            raise ConfigurationError(
                f"The folds {taken[own]} and {fold} of the study would both be this site's fold {own}, whose folder "
                "can hold one: say in 'folds' of site.toml which of this site's folds each of them is."
            )
    if command in taken:
        return TrainedFold(taken[command], False)
    if command != "all":
        if by_study.get(command, "all") != "all":
            raise ConfigurationError(
                f"Fold {command} of the study is this site's fold {by_study[command]}, as site.toml says: train fold "
                f"{by_study[command]}."
            )
        if isinstance(site.fold, int):
            raise ConfigurationError(
                f"The study trains fold {study.fold}, which is this site's fold {site.fold}, this command fold "
                f"{command}. Train fold {site.fold}, or map more folds by 'folds' in site.toml."
            )
        return TrainedFold(command, by_study.get(command, otherwise) == "all")
    if "all" in study.trained_folds:
        return TrainedFold("all", False)
    if len(study.trained_folds) > 1:
        raise ConfigurationError(
            f"The study trains the folds {', '.join(map(str, study.trained_folds))}, and the results of 'all' have one "
            "folder only. To train on all cases in each of them, set 'fold = \"all\"' in site.toml, and name the "
            "study's fold in the command."
        )
    return TrainedFold(study.fold, False)


def _fold(name: str) -> Fold:
    return "all" if name == "all" else int(name)
