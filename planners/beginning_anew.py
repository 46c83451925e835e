"""Planning begins anew when a site withdraws what it has told: the others go along by themselves. Source: ours."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from nnunet_fed.agreement.fingerprint import LocalFingerprint
from nnunet_fed.errors import WithdrawnError
from nnunet_fed.study.federation import Federation

logger = logging.getLogger(__name__)

T = TypeVar("T")


class JoinsAgain(Protocol):
    """What planning anew needs of a communicator."""

    def join(self, purpose: str) -> Federation:
        """Join the newest run; returns the study as the coordinator has it."""
        ...


def plan_with_corrections(communicator: JoinsAgain, study: Federation, plan: Callable[[Federation], T]) -> T:
    """Plan, and from the beginning again as often as a site withdraws what it has told.

    Args:
        communicator: of this site, which has joined.
        study: as the coordinator has it.
        plan: does all of it once.
    """
    while True:
        try:
            return plan(study)
        except WithdrawnError as error:
            logger.warning("%s This command does so now.", error)
            study = communicator.join("planning")


class KeptExtraction:
    """What a command has extracted last, which need not be done again if all that it was made of is the same."""

    def __init__(self) -> None:
        self._made_of: Any = None
        self._local: LocalFingerprint | None = None

    def unless_changed(self, made_of: Any, extract: Callable[[], LocalFingerprint]) -> LocalFingerprint:
        """What was extracted last, or is now.

        Args:
            made_of: all that it depends on.
            extract: does it.
        """
        if self._local is None or self._made_of != made_of:
            self._local = None  # two of them may not fit into memory
            self._local = extract()
            self._made_of = made_of
        return self._local
