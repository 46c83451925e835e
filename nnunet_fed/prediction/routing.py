"""Which model predicts a case: the folds' selectors, one decision, and the record of it.

Source: the rule is the published code's, there for every 2D image (see :mod:`nnunet_fed.methods.fedsm`); one decision
per case, folds, the gates and the record are ours.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.files import write_json
from nnunet_fed.methods.fedsm import GLOBAL, Route, best_model_gate, check_gamma, route
from nnunet_fed.methods.selector import (
    SelectorCase,
    SelectorConfiguration,
    case_log_probabilities,
    draw_patches,
    tempered,
)
from nnunet_fed.prediction.bundle import SELECTOR_FILE, FoldBundle, read_selector
from nnunet_fed.study.federation import digest_of

logger = logging.getLogger(__name__)


class Router:
    """The super model's decision for one or several folds of a bundle.

    The selector runs on the CPU, so that a decision does not depend on the device of the prediction.

    Args:
        folder: the model folder.
        folds: the bundle's entries that are asked for, with files that were verified.
        gamma: threshold; ``None``: the one that the bundle names.
        force: give every case to this site's model, or to the global one, without asking the selector.

    Raises:
        FederationError: the folds do not belong together, there is no such model, or a selector cannot be read.
    """

    def __init__(self, folder: Path, folds: Mapping[str, FoldBundle], gamma: float | None, force: str | None):
        self._folds = folds
        entries = tuple(folds.values())
        common: dict[str, list[Any]] = {
            "sites": [entry.sites for entry in entries],
            "selectors": [entry.selector for entry in entries],
            "gamma": [] if gamma is not None else [entry.gamma for entry in entries],
        }
        for what, values in common.items():
            if len(set(values)) > 1:
                listed = "; ".join(f"fold {fold}: {value}" for fold, value in zip(folds, values, strict=True))
                raise ConfigurationError(
                    f"The folds in {folder} were trained with different {what} ({listed}). Choose folds that belong "
                    f"together with -f{' or give --gamma' if what == 'gamma' else ''}."
                )
        self.gamma = check_gamma(entries[0].gamma if gamma is None else gamma)
        self.configuration: SelectorConfiguration = entries[0].selector
        self.available = sorted(set.intersection(*(set(entry.personal_checkpoints) for entry in entries)))
        """Sites whose personalized models are here."""
        self._force = force
        if force is not None and force not in (GLOBAL, *self.available):
            raise ConfigurationError(
                f"--force {force}: there is no such model in {folder}; there are {GLOBAL}, "
                f"{', '.join(self.available)}. One that is not shared is to be had at its own site only."
            )
        self._selectors = [
            read_selector(folder / f"fold_{fold}" / SELECTOR_FILE, entry.selector) for fold, entry in folds.items()
        ]
        self._global_instead = _served_by_global(entries)
        for fold, entry in folds.items():
            if not entry.trusted and force is None:
                logger.warning(
                    "Every case is predicted by the global model: the selector of fold %s reached an accuracy of %.3f "
                    "on the validation cases of all sites, less than the %.3f that the study asks for.",
                    fold, entry.accuracy, entry.selector_min_accuracy,
                )  # fmt: skip

    @property
    def needs_header(self) -> bool:
        """Whether :meth:`choose` needs the header features of a case."""
        return self._force is None and self.configuration.header_features

    @property
    def settings(self) -> dict[str, Any]:
        """What decides, as JSON values."""
        model = digest_of({fold: entry.model_dump(mode="json") for fold, entry in self._folds.items()})
        return {"model": model, "gamma": self.gamma, "force": self._force}

    def choose(self, data: torch.Tensor, header: torch.Tensor | None) -> tuple[Route, dict[str, float] | None]:
        """The model for a case, and the sites' probabilities, averaged over the folds (``None`` if forced).

        Args:
            data: preprocessed by nnU-Net, of shape (channels, z, y, x).
            header: see :func:`nnunet_fed.methods.selector.header_features`, if :attr:`needs_header`.

        Raises:
            FederationError: no patch fits the case.
        """
        if self._force is not None:
            return Route(self._force, "forced"), None
        return self.choose_for(SelectorCase(draw_patches(data, self.configuration), header))

    def choose_for(self, seen: SelectorCase) -> tuple[Route, dict[str, float]]:
        """The selectors' choice for a case, and the sites' probabilities."""
        of_folds = [
            tempered(case_log_probabilities(selector, [seen])[0], entry.temperature).exp()
            for selector, entry in zip(self._selectors, self._folds.values(), strict=True)
        ]
        far = [entry.familiarity.unfamiliarity(seen) for entry in self._folds.values() if entry.familiarity]
        sites = next(iter(self._folds.values())).sites
        probabilities: dict[str, float] = dict(zip(sites, torch.stack(of_folds).mean(0).tolist(), strict=True))
        taken = route(
            probabilities,
            self.gamma,
            trusted=all(entry.trusted for entry in self._folds.values()),
            unfamiliarity=float(np.mean(far)) if far else None,
            global_instead=self._global_instead,
            available=self.available,
        )
        return taken, probabilities


def _served_by_global(entries: tuple[FoldBundle, ...]) -> frozenset[str]:
    """Sites whose personalized models are not better, on the average over the folds in which this was measured."""
    measured = [entry.validation_dice for entry in entries if entry.validation_dice is not None]
    means = {
        site: np.mean([[dice[site].personal, dice[site].common] for dice in measured if site in dice], axis=0)
        for site in {site for dice in measured for site in dice}
    }
    return best_model_gate(
        {site: float(personal) for site, (personal, _) in means.items()},
        {site: float(common) for site, (_, common) in means.items()},
    )


class RoutingLog:
    """``routing.json``: which model predicted each case, and why; on disk before the case's segmentation is.

    Args:
        path: the file.
        settings: what decides; equal if an earlier prediction is continued.
        continued: keep what an earlier prediction noted.

    Raises:
        ConfigurationError: the prediction to be continued had other settings, or its record cannot be read.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], continued: bool):
        self._path = path
        self._content: dict[str, Any] = {**settings, "cases": {}}
        if not (continued and path.is_file()):
            return
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            noted = dict(earlier.pop("cases"))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigurationError(f"{path} cannot be read ({error!r}). Predict into a new folder.") from None
        if earlier != settings:
            differing = [name for name in settings if earlier.get(name) != settings[name]]
            raise ConfigurationError(
                f"{path} was begun with another {', '.join(differing) or 'version'}. Continue with the same options "
                "and model, or predict into a new folder."
            )
        self._content["cases"] = noted

    def note(self, case: str, taken: Route, probabilities: Mapping[str, float] | None) -> None:
        """Enter a case, or replace its entry."""
        self._content["cases"][case] = {
            "choice": taken.choice,
            "reason": taken.reason,
            "unfamiliarity": taken.unfamiliarity,
            "probabilities": None if probabilities is None else dict(probabilities),
        }
        write_json(self._path, self._content)

    def counts(self) -> Counter[tuple[str, str]]:
        """Number of cases by choice and reason."""
        return Counter((entry["choice"], entry["reason"]) for entry in self._content["cases"].values())
