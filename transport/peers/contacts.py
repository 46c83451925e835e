"""Which peers answer, and how many training cases they have. Source: ours."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import MappingProxyType

from nnunet_fed.gossip.mailbox import Mailbox
from nnunet_fed.transport.peers.model_message import LARGEST_NUMBER


class Contacts:
    """Which peers answer, and how many training cases they have; the training reads it in the mailbox. Thread-safe."""

    def __init__(self, mailbox: Mailbox):
        self._mailbox = mailbox
        self._lock = threading.Lock()
        self._failures = mailbox.contacts()
        self._members: dict[str, int] = {}
        mailbox.publish_contacts(self._failures, self._members)

    def members(self) -> set[str]:
        """Names of the peers heard of that have not left."""
        with self._lock:
            return set(self._members)

    def reached(self, peer: str) -> None:
        """A peer has called or answered: its failures are forgotten."""
        self._change(peer, failed=False)

    def missed(self, peer: str) -> None:
        """A peer was not reached."""
        self._change(peer, failed=True)

    def introduced(self, peer: str, training_cases: int, leaving: bool) -> None:
        """A peer takes part with so many training cases, or no more."""
        cases = training_cases if 0 < training_cases <= LARGEST_NUMBER and not leaving else None
        self._change(peer, False, {peer: cases})

    def _change(self, peer: str, failed: bool, introduced: Mapping[str, int | None] = MappingProxyType({})) -> None:
        with self._lock:
            failures = {**self._failures, peer: self._failures.get(peer, 0) + 1 if failed else 0}
            known = {**self._members, **introduced}
            members = {name: cases for name, cases in known.items() if cases is not None}
            if (failures[peer], members) != (self._failures.get(peer, 0), self._members):
                self._mailbox.publish_contacts(failures, members)
            self._failures, self._members = failures, members
