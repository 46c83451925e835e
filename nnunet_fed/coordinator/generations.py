"""Undoing rounds: a run goes on, as another *generation* of it, from a model that it had before.

A generation is a run of its own in the journal. It begins with what had closed up to a round, that of a planning with
nothing; everything after that stays with the run before it, for the record, and counts nowhere. Source: ours.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from nnunet_fed.coordinator.log_fields import about
from nnunet_fed.coordinator.store import Collective, Store
from nnunet_fed.errors import ConfigurationError, RefusedError, WithdrawnError
from nnunet_fed.exchange.keys import MODEL, last_round, round_of
from nnunet_fed.exchange.payload import digest_of_file
from nnunet_fed.files import make_durable, same_file

logger = logging.getLogger(__name__)

WITHDRAWN_BY, GOES_ON_AFTER = "withdrawn_by", "goes_on_after"
"""What the journal says of a generation: the site for which a planning has begun anew, and the run before it."""


class Generations:
    """Which runs go on, and as which ones. Called under the store's lock.

    Args:
        store: the coordinator's memory.
    """

    def __init__(self, store: Store):
        self._store = store
        self._generations: dict[str, list[str]] = {}
        """By the first generation of a run: all of them, oldest first."""
        for run, described in store.runs().items():
            self._generations.setdefault(described.get("first", run), []).append(run)

    def newest(self, first: str) -> str:
        """Id of the run that goes on where the run ``first`` was opened; that run, unless rounds were undone."""
        return self._generations.get(first, [first])[-1]

    def number(self, run: str) -> int:
        """How often rounds of a run had been undone when it was opened."""
        return self._of(run).index(run)

    def undone(self) -> dict[str, str]:
        """By the id of each run of which rounds were undone: that of the run in which it goes on."""
        return {run: runs[-1] for runs in self._generations.values() for run in runs[:-1]}

    def require_newest(self, run: str) -> None:
        """See that a run goes on.

        Raises:
            RefusedError: rounds of it were undone: its sites have to go back.
            WithdrawnError: it is a planning that has begun anew.
        """
        newest = self._of(run)[-1]
        if newest != run:
            described = self._store.run(newest)
            if WITHDRAWN_BY in described:
                raise WithdrawnError(plan_again(described[WITHDRAWN_BY]), described[WITHDRAWN_BY])
            raise RefusedError(_go_back(described["goes_on_from"]))

    def _of(self, run: str) -> list[str]:
        return next((runs for runs in self._generations.values() if run in runs), [run])

    def open(self, run: str, scope: str, why: str) -> str:
        """Let a run go on from the model of a scope; returns the id of the run in which it does.

        Args:
            run: in which the model was made, of any generation.
            scope: of the model, whose file is there.
            why: for the record.
        """
        store, described = self._store, self._store.runs()[run]
        first = described.get("first", run)
        runs = self._generations.setdefault(first, [first])
        new = f"{first}.{len(runs)}"
        standing = [c for c in _up_to(store.collectives(run), scope) if c.status in ("closed", "empty", "pruned")]
        for collective in standing:
            if collective.status == "closed":
                result = store.result_path(new, collective.key)
                result.unlink(missing_ok=True)  # left by one who was interrupted here
                same_file(store.result_path(run, collective.key), result)
                make_durable(result)
        void = [c for old in runs for status in ("open", "failed") for c in store.collectives(old, status)]
        sentence = _go_back(scope)
        with store.transaction():
            store.add_run(new, {**described, "first": first, "goes_on_from": scope, GOES_ON_AFTER: run})
            store.continue_run(run, new, standing)
            files = [file for collective in void for file in store.release(collective.run, collective.key)]
            for collective in void:
                store.put_collective(replace(collective, status="failed", error=sentence))
            store.add_event(new, None, f"goes on from the model of {scope} in the run {run}: {why}")
        for file in files:
            file.unlink(missing_ok=True)
        runs.append(new)
        logger.warning("the run %s goes on from the model of %s, as %s: %s", run, scope, new, why, extra=about(new))
        return new

    def begin_anew(self, run: str, site: str, why: str) -> None:
        """Let a planning begin anew, with nothing.

        Args:
            run: in which the sites have planned, of any generation.
            site: that has withdrawn what it told.
            why: for the record.
        """
        described = self._store.run(run)
        first = described.get("first", run)
        runs = self._generations.setdefault(first, [first])
        new = f"{first}.{len(runs)}"
        with self._store.transaction():
            self._store.add_run(new, {**described, "first": first, WITHDRAWN_BY: site, GOES_ON_AFTER: run})
            self._store.add_event(new, site, why)
        runs.append(new)
        logger.warning("site %s %s; the sites plan anew as %s", site, why, new, extra=about(new, site=site))


def plan_again(site: str) -> str:
    """The sentence that says that a planning has begun anew."""
    return (
        f"Site '{site}' has withdrawn what it told while planning: all sites plan again from the beginning. Where "
        "'nnunet_fed plan_and_preprocess' has ended, run it again."
    )


def _go_back(scope: str) -> str:
    return f"The federation went back to the model of {scope}. Go back with it: start this training again with --c."


def _up_to(collectives: Iterable[Collective], scope: str) -> list[Collective]:
    """The collectives up to a scope, in their order: of no later round, and of no validation after the rounds."""
    number, up_to, begun = last_round(scope), [], False
    for collective in collectives:
        of_round = round_of(collective.key)
        if of_round is not None and of_round > number:
            break  # what comes after it came after the scope
        begun = begun or of_round is not None
        if of_round is not None or not begun:
            up_to.append(collective)
    return up_to


def is_after_rounds(collectives: Iterable[Collective]) -> bool:
    """Whether the sites of a run have begun what comes after the rounds."""
    begun = False
    for collective in collectives:
        of_round = round_of(collective.key)
        if begun and of_round is None:
            return True
        begun = begun or of_round is not None
    return False


class Model(NamedTuple):
    """A model to which a training can go back."""

    run: str
    scope: str


def kept_models(store: Store) -> dict[str, list[Collective]]:
    """The means whose models are kept, oldest first, by the id of each training run of the newest attempt."""
    attempt = store.fact("attempt")
    runs = [run for run, of in store.runs().items() if of["purpose"] == "training" and of["attempt"] == attempt]
    return {run: [c for c in store.collectives(run, "closed") if _is_model(c)] for run in runs}


def _is_model(collective: Collective) -> bool:
    return collective.verb == "mean" and collective.name == MODEL


def rewind(store: Store, wanted: str, run: str | None = None) -> Model:
    """Undo rounds of a training.

    Args:
        store: of a coordinator that does not run.
        wanted: scope of the model to which the training goes back, such as ``round-0003``, or the number in it.
        run: id of the training's run; ``None``: the only one that goes on.

    Returns:
        The run in which the training goes on from now on, and the scope.

    Raises:
        ConfigurationError: there is no such run, or its model is not kept.
    """
    kept, generations = kept_models(store), Generations(store)
    if not kept:
        raise ConfigurationError(
            f"No training has begun in {store.folder}, or it is one without a coordinator's rounds (GCML)."
        )
    candidates = [one for one in kept if one not in generations.undone()]
    if run is None and len(candidates) > 1:
        raise ConfigurationError(f"Say with --run which training goes back: {', '.join(candidates)}.")
    chosen = candidates[0] if run is None else run
    if chosen not in kept:
        raise ConfigurationError(f"There is no run '{chosen}'; the trainings are: {', '.join(kept)}.")
    model = next((one for one in kept[chosen] if wanted in (one.scope, str(round_of(one.key)))), None)
    if model is None:
        there = ", ".join(one.scope for one in kept[chosen]) or "no scope"
        raise ConfigurationError(
            f"The model of '{wanted}' is not kept; those of {there} are. 'keep_rounds' and 'keep_every' in "
            "federation.toml say how many are kept."
        )
    if digest_of_file(store.result_path(chosen, model.key)) != model.digest:
        raise ConfigurationError(
            f"The file of the model of {model.scope} is damaged or missing: go back to another one, or restore a "
            "back-up."
        )
    return Model(generations.open(chosen, model.scope, "rounds were undone by 'nnunet_fed rewind'"), model.scope)
