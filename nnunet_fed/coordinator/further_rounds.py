"""More rounds than a training was planned with: ``more_rounds`` was raised in ``federation.toml``. Source: ours."""

from __future__ import annotations

import logging

from nnunet_fed.coordinator.generations import Generations, is_after_rounds, kept_models
from nnunet_fed.coordinator.log_fields import about
from nnunet_fed.coordinator.store import Store
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.exchange.keys import scope_of_round
from nnunet_fed.study.federation import Federation

logger = logging.getLogger(__name__)


def begin_more_rounds(known: Federation, study: Federation, store: Store, generations: Generations) -> None:
    """Let trainings that are over go on: their sites are waited for again.

    What the sites did after the rounds (an evaluation across sites) stands in the record, and counts no more: the
    training goes on as another generation of its run then.

    Args:
        known: the study as the coordinator had it before.
        study: as it has it now.
        store: the coordinator's memory.
        generations: of its runs.

    Raises:
        ConfigurationError: there are fewer rounds than before.
    """
    if study.more_rounds < known.more_rounds:
        raise ConfigurationError(
            f"more_rounds was {known.more_rounds}, and is {study.more_rounds} now: rounds cannot be taken back by it. "
            "Set it to what it was; 'nnunet_fed rewind' undoes rounds."
        )
    if study.more_rounds == known.more_rounds:
        return
    last = scope_of_round(known.all_rounds - 1)
    why = f"{study.all_rounds} rounds in all, where there were {known.all_rounds}"
    for run, models in kept_models(store).items():
        if run in generations.undone():
            continue
        if study.method.EXCHANGES and store.participants(run, last) is None:
            continue  # it is not over, and its sites will find out when it is
        if is_after_rounds(store.collectives(run)) and models:
            generations.open(run, models[-1].scope, why)
            continue
        with store.transaction():
            for site, standing in store.standing(run).items():
                if standing == "left":
                    store.set_standing(run, site, "active")
            store.add_event(run, None, f"goes on: {why}")
        logger.info("the run %s goes on: %s", run, why, extra=about(run))
