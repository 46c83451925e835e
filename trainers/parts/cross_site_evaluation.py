"""Each site's deployable model, evaluated at every other site: models travel, data do not. Source: ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_fed.errors import NoContributionError, RoundClosedError
from nnunet_fed.exchange.cross_site_matrix import DICE, Column, matrix, model_key
from nnunet_fed.methods.tensors import load_arrays, shared_tensors, to_arrays
from nnunet_fed.trainers.parts.further_validation import mean_dice, validate_below, weights_kept
from nnunet_fed.trainers.parts.publishing import publish
from nnunet_fed.trainers.parts.training_record import RECORD

if TYPE_CHECKING:
    from nnunet_fed.trainers.parts.federated_trainer import FederatedTrainer

FOLDER = "cross_site"
"""Below the fold's: ``cross_site/SITE/validation`` is that of another site's model."""
HERE, MATRIX = "evaluated_here", "matrix"
"""In the record, under ``cross_site``: Dice of each model at this site, and of each model at each site."""


def is_complete(trainer: FederatedTrainer) -> bool:
    """Whether all that there is to be evaluated has been, in this training; the same on every rank."""
    return MATRIX in _recorded(Path(trainer.output_folder))


def evaluate_across_sites(trainer: FederatedTrainer, save_probabilities: bool, tell: Callable[[str], None]) -> None:
    """Hand the deployable models round, one after another, and evaluate those of the others; called on every rank.

    A model travels with all its tensors, private ones included, and with every bit. It is evaluated by nnU-Net's
    validation in ``cross_site/SITE/validation``. A site that was killed and goes on leaves out what its record has
    already. A model that a site cannot get, since its owner or this site was away, is not evaluated there.

    Args:
        trainer: which has validated the model that this site deploys.
        save_probabilities: as in nnU-Net.
        tell: hears what is being done.

    Raises:
        DeadlineError: the deadline passed with fewer than ``min_sites`` sites.
        DisagreementError: a model has other tensors than this site's network.
    """
    communicator, folder = trainer.communicator, Path(trainer.output_folder)

    def dice_in(place: Path) -> float | None:
        return mean_dice(place) if trainer.local_rank == 0 else None  # which writes it, and alone speaks to the others

    evaluated: Column = _recorded(folder).get(HERE, {})
    for site in communicator.sites:
        if site in evaluated:  # before the training was killed
            continue
        mine = site == communicator.site
        tell(f"handing out the model of {site}")
        own = shared_tensors(trainer.bare(trainer.network))
        try:
            received = publish(communicator, model_key(site), site, partial(to_arrays, own))
        except (NoContributionError, RoundClosedError):
            trainer.happened(f"the model of {site} was not handed out here: that site or this one was away")
            continue
        if not mine:
            tell(f"evaluating the model of {site}")
            with weights_kept(trainer) as network:
                load_arrays(shared_tensors(network), received)
                validate_below(trainer, f"{FOLDER}/{site}", save_probabilities)
        evaluated[site] = dice_in(folder if mine else folder / FOLDER / site)
        trainer.note_facts(cross_site={HERE: evaluated})
    evaluated[communicator.site] = dice_in(folder)
    try:
        columns = communicator.gather(DICE, evaluated)
    except RoundClosedError:
        trainer.happened("the others have told each other the Dice of the models without this site")
        columns = {communicator.site: evaluated}
    found = matrix(columns, communicator.sites)
    trainer.note_facts(cross_site={HERE: evaluated, MATRIX: found})
    trainer.print_to_log_file(f"Dice of each site's model at each site: {found}")


def _recorded(folder: Path) -> dict[str, Any]:
    """What this training's record has of it; a training that starts anew starts a new record."""
    path = folder / RECORD
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found: dict[str, Any] = content.get("cross_site", {})
    return found
