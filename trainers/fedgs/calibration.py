"""FedGS's thresholds out of the patches that the sites' own loaders draw (notes 6.2)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nnunet_fed.errors import FederationError, RoundClosedError
from nnunet_fed.exchange.keys import key_of
from nnunet_fed.methods.fedgs import calibrated_thresholds, histogram_of
from nnunet_fed.methods.lesion_classes import Floats, LesionClasses
from nnunet_fed.trainers.parts import checkpoint
from nnunet_fed.trainers.parts.federated_trainer import FederatedTrainer

CALIBRATION = key_of("calibration", "inverse-areas")
"""Key of the histogram; a scope of its own, so that a late site can fetch it whatever the round."""
CALIBRATION_PATCHES = 200
"""Patches that each site draws (notes 6.2)."""


def agreed_thresholds(trainer: FederatedTrainer, classes: LesionClasses) -> Floats:
    """The threshold of each class, the same at every site.

    Raises:
        FederationError: no site has drawn a whole lesion.
    """
    own = _drawn_histogram(trainer, classes)
    try:
        histogram = trainer.communicator.sum(CALIBRATION, own)
    except RoundClosedError:
        histogram = trainer.communicator.fetch(CALIBRATION)["value"]
    thresholds = calibrated_thresholds(histogram)
    if np.isinf(thresholds).all():
        raise FederationError(
            f"No patch of any site holds a whole lesion of the classes {', '.join(classes.names)}, so there is no "
            "lesion size to calibrate on. Check 'classes' in the method table and the labels of the training cases, "
            "set 'threshold' to a number, or set 'truncation_guard = false'."
        )
    found = ", ".join(f"{name} {tau:.5g}" for name, tau in zip(classes.names, thresholds, strict=True))
    trainer.print_to_log_file(f"Patches with small lesions have inverse areas of at least: {found}")
    return thresholds


def _drawn_histogram(trainer: FederatedTrainer, classes: LesionClasses) -> Any:
    trainer.print_to_log_file(f"Calibrating on {CALIBRATION_PATCHES} patches.")
    states = checkpoint.random_states()  # so that training sees the batches that it sees without calibration
    batches = math.ceil(CALIBRATION_PATCHES / trainer.batch_size)
    areas = [classes.inverse_areas(next(trainer.dataloader_train)["target"]) for _ in range(batches)]
    checkpoint.restore_random_states(states)
    return histogram_of(np.concatenate(areas))
