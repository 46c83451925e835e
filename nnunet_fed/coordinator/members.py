"""Who takes part: joining and leaving, standing, and what the sites tell of themselves. Part of the coordinator."""

from __future__ import annotations

import logging
import re
import threading
import time
from typing import Any, Literal

from nnunet_fed.coordinator.generations import Generations
from nnunet_fed.coordinator.log_fields import about
from nnunet_fed.coordinator.store import Store
from nnunet_fed.errors import RefusedError
from nnunet_fed.exchange.keys import LONGEST_KEY
from nnunet_fed.study.federation import Federation, Fold

logger = logging.getLogger(__name__)

KEY_PART = re.compile(r"[A-Za-z0-9_.-]{1,100}")
LONGEST_TEXT = 10_000
"""Characters of a note or a reason that are journalled."""
MOST_PACKAGES, LONGEST_VERSION = 20, 100

Purpose = Literal["planning", "training"]


class Members:
    """The sites of a study and their runs. Thread-safe.

    Args:
        study: the study.
        attempt: that is open.
        store: the coordinator's memory.
        generations: of the runs.
        changed: guards the store.
    """

    def __init__(
        self, study: Federation, attempt: int, store: Store, generations: Generations, changed: threading.Condition
    ):
        self._study = study
        self._generations = generations
        self._attempt = attempt
        self._store = store
        self._changed = changed
        self.seen: dict[str, float] = {}
        """When each site called last, in seconds since the epoch."""
        self.progress: dict[str, dict[str, Any]] = {}
        """What each site said last of what it is doing."""
        self.progress_in: dict[str, dict[str, dict[str, Any]]] = {}
        """The same by run and site, of runs that the site has joined: it may train several folds at once."""

    def join(
        self,
        site: str,
        purpose: Purpose,
        digest: str,
        configuration: str,
        trainer: str,
        fresh: bool,
        fold: Fold | None,
        can_go_back: bool,
    ) -> str:
        """Let a site into a run, which its arguments name (rule 1 of the protocol).

        Args:
            site: name of the site.
            purpose: what the run is for.
            digest: of the study in the site's plans and this fold (training).
            configuration: of nnU-Net (training).
            trainer: name of the trainer class (training).
            fresh: the training starts without ``--c``.
            fold: of the study, that the run is for (training); ``None``: the one whose digest it is, since a site of
                version 0.1 does not name it.
            can_go_back: the site's version of nnunet_fed knows that rounds of a training may be undone.

        Returns:
            The run's id.

        Raises:
            RefusedError: the site is not in the study, has plans of another study, names a fold that the study does not
                train, starts afresh a run that it has contributed to, or does not know how to go back in a run whose
                rounds were undone.
        """
        self._require_member(site)
        if fold is None:
            fold = self._fold_of(digest)
        if purpose == "training" and digest != self._study.digest_of_fold(fold):
            raise RefusedError(
                f"The plans at site '{site}' belong to another study than '{self._study.name}', which this coordinator "
                "serves. Run 'nnunet_fed plan_and_preprocess' again, or correct 'coordinator' in site.toml."
            )
        parts = [configuration, trainer, f"fold_{fold}"] if purpose == "training" else ["planning"]
        if not all(KEY_PART.fullmatch(part) for part in parts):
            raise RefusedError(f"{configuration!r} and {trainer!r} cannot name a configuration and a trainer.")
        run = "-".join([self._study.digest_of_fold(fold)[:12], *parts, str(self._attempt)])
        with self._changed, self._store.transaction():
            if purpose == "planning":
                run = self.planning_run() or run
            elif fold not in self._study.trained_folds and run not in self._store.runs():
                known = ", ".join(map(str, self._study.trained_folds))
                raise RefusedError(
                    f"The study '{self._study.name}' trains fold {known}, and site '{site}' fold {fold}. Train one of "
                    "the study's, say in site.toml which of them this site's fold is, or set 'folds' in "
                    "federation.toml at the coordinator and restart it."
                )
            described = {"purpose": purpose, "configuration": configuration, "trainer": trainer, "fold": fold}
            self._store.add_run(run, {**described, "attempt": self._attempt})
            run = self._generations.newest(run)
            if purpose == "training" and not can_go_back and self._generations.number(run) > 0:
                raise RefusedError(
                    f"Rounds of this training were undone, which the version of nnunet_fed at site '{site}' does not "
                    "know. Install the version that the coordinator has, and continue with --c."
                )
            if fresh and self._store.has_contributed(run, site):
                raise RefusedError(
                    f"Site '{site}' has already contributed to this training (attempt {self._attempt}). Continue it "
                    "with --c, or let the coordinator open a new attempt (nnunet_fed new-attempt STATE)."
                )
            self._store.set_standing(run, site, "active")
            self._store.add_event(run, site, "joined" if fresh or purpose == "planning" else "joined with --c")
            self.seen[site] = time.time()
        return run

    def _fold_of(self, digest: str) -> Fold:
        of_digest = (fold for fold in self._study.trained_folds if self._study.digest_of_fold(fold) == digest)
        return next(of_digest, self._study.fold)

    def _require_member(self, site: str) -> None:
        if site not in self._study.sites:
            raise RefusedError(
                f"Site '{site}' is not in the study '{self._study.name}' (sites: {', '.join(self._study.sites)}). "
                "Correct 'name' in site.toml, or add the site to federation.toml at the coordinator and restart it."
            )

    def introduce(self, site: str, versions: dict[str, str]) -> dict[str, dict[str, str]]:
        """Note the versions with which a site works; returns those of all sites that have told theirs.

        Args:
            site: name of the site, which need not have joined.
            versions: by package.

        Raises:
            RefusedError: the site is not in the study, or these are no versions.
        """
        self._require_member(site)
        texts = [*versions, *versions.values()]
        if len(texts) > 2 * MOST_PACKAGES or any(len(text) > LONGEST_VERSION for text in texts):
            raise RefusedError(f"What site '{site}' tells of its versions is too long.")
        with self._changed, self._store.transaction():
            known: dict[str, dict[str, str]] = {**(self._store.fact("versions") or {}), site: versions}
            self._store.set_fact("versions", known)
            self.seen[site] = time.time()
        return {name: told for name, told in known.items() if name in self._study.sites}

    def planning_run(self) -> str | None:
        """Id of the run in which the sites have planned, or are planning; ``None``: nobody has begun."""
        with self._changed:
            runs = self._store.runs().items()
            described = {"purpose": "planning", "attempt": self._attempt}
            first = next((run for run, about_it in runs if described.items() <= about_it.items()), None)
            return None if first is None else self._generations.newest(first)

    def heard(self, run: str, site: str) -> None:
        """Note that a site speaks in a run: one that was absent is back.

        Raises:
            RefusedError: the site is not in the study, or has not joined the run.
        """
        with self._changed:
            self._require_member(site)
            self._require_joined(run, site)
            self.seen[site] = time.time()
            if self._store.standing(run)[site] == "absent":
                with self._store.transaction():
                    self._store.set_standing(run, site, "active")
                    self._store.add_event(run, site, "came back")

    def send_away(self, run: str, site: str, sentence: str) -> None:
        """Journal why a site is not waited for; it is back once it is heard of. Planning waits for it nevertheless."""
        with self._changed, self._store.transaction():
            if self._store.runs()[run]["purpose"] == "training":
                self._store.set_standing(run, site, "absent")
            self._store.add_event(run, site, sentence)

    def report(self, run: str, site: str, progress: dict[str, Any]) -> bool:
        """Note what a site is doing in a run, for those who watch; returns whether it is a site of the study.

        Raises:
            RefusedError: it does not say that.
        """
        if not isinstance(progress, dict) or not isinstance(progress.get("phase"), str):
            raise RefusedError("A site's progress names a phase.")
        if site not in self._study.sites:
            return False
        with self._changed:
            self.seen[site] = time.time()
            self.progress[site] = progress
            if site in self._store.standing(run):
                self.progress_in.setdefault(run, {})[site] = progress
        return True

    def doing(self, run: str, site: str) -> str:
        """A site's name and what it said last of what it is doing, for those who wait for it in a run."""
        progress = self.progress_in.get(run, {}).get(site) or self.progress.get(site)
        return f"{site} ({progress['phase']})" if progress else site

    def note(self, run: str, site: str, text: str) -> None:
        """Journal something that happened at a site; raises :class:`RefusedError` if it has not joined the run."""
        with self._changed, self._store.transaction():
            self._require_joined(run, site)
            self._store.add_event(run, site, text[:LONGEST_TEXT])
        logger.info("site %s: %s", site, text[:LONGEST_TEXT], extra=about(run, site=site))

    def leave(self, run: str, site: str, reason: str, returns: bool) -> None:
        """Journal that a site takes its leave, for good or for now; raises :class:`RefusedError` if it has not joined
        the run."""
        with self._changed, self._store.transaction():
            self._require_joined(run, site)
            self._store.set_standing(run, site, "absent" if returns else "left")
            self._store.add_event(run, site, f"left{' for now' if returns else ''}: {reason[:LONGEST_TEXT]}")

    def _require_joined(self, run: str, site: str) -> None:
        if site not in self._store.standing(run):
            raise RefusedError(f"Site '{site[:100]}' has not joined the run '{run[:LONGEST_KEY]}'.")
