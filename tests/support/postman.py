"""A postman in the place of GCML's peer process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nnunet_fed.exchange.payload import Array, encode, measure
from nnunet_fed.gossip.mailbox import Letter, Mailbox, State, described
from nnunet_fed.gossip.schedule import Version

Weights = dict[str, Array]


class Postman:
    """Does what the peer process does, when the training looks whether that still runs: between two rounds."""

    def __init__(self) -> None:
        self.posted: list[tuple[Letter, tuple[str, ...]]] = []
        self.bring: Callable[[Mailbox, State], None] = lambda mailbox, state: None
        self.mailbox: Mailbox | None = None

    def __call__(self, trainer: Any) -> Postman:
        self.mailbox = Mailbox(Path(trainer.output_folder) / "mailbox")
        self.mailbox.publish_contacts({}, {"b": 4})
        self.exit_status()
        return self

    def exit_status(self) -> None:
        self.collect()
        assert self.mailbox is not None
        state = self.mailbox.state()
        assert state is not None
        self.bring(self.mailbox, state)

    def ask_to_end(self) -> bool:
        self.collect()
        return False

    def collect(self) -> None:
        assert self.mailbox is not None
        outgoing = self.mailbox.outgoing()
        if outgoing is not None and outgoing[2]:
            self.posted.append((outgoing[0], outgoing[2]))
            self.mailbox.served(outgoing[0])


def deliver(mailbox: Mailbox, state: State, weights: Weights, counter: int, epoch: int, **changes: Any) -> None:
    """A letter of site b."""
    if counter <= mailbox.received().get("b", 0):
        return
    payload = mailbox.arriving / "payload"
    payload.write_bytes(b"".join(encode(weights)))
    digest, size = measure(encode(weights))
    facts = {"run": state.run, "initial": state.initial, "schema": described(weights)[0], **changes}
    mailbox.deliver(
        Letter(version=Version("b", {"b": counter}, epoch), training_cases=4, digest=digest, size=size, **facts),
        payload,
    )
