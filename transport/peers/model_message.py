"""A model as two peers speak of it: the message that describes it, and whether it suits a training. Source: ours."""

from __future__ import annotations

import re

from nnunet_fed.errors import RefusedError
from nnunet_fed.gossip.mailbox import Letter, State
from nnunet_fed.gossip.schedule import Version
from nnunet_fed.transport.channel.options import PEER_PROTOCOL
from nnunet_fed.transport.proto import federation_pb2 as pb

LARGEST_NUMBER = 2**53
"""Of counters and epochs: what JSON holds everywhere."""
DIGEST = re.compile(r"[0-9a-f]{32}")


def message_of(letter: Letter) -> pb.Model:
    """A letter on the wire."""
    return pb.Model(
        protocol=PEER_PROTOCOL, site=letter.version.site, run=letter.run, vector=letter.version.vector,
        epoch=letter.version.epoch, training_cases=letter.training_cases, initial=letter.initial, schema=letter.schema,
        digest=letter.digest, size=letter.size,
    )  # fmt: skip


def letter_of(model: pb.Model) -> Letter:
    """A letter off the wire; raises :class:`RefusedError` if it says what none of ours would."""
    version = Version(model.site, dict(sorted(model.vector.items())), model.epoch)
    numbers = (*version.vector.values(), version.epoch, model.training_cases)
    if (
        not DIGEST.fullmatch(model.digest)
        or version.counter < 1
        or model.training_cases < 1
        or max(numbers) > LARGEST_NUMBER
    ):
        raise RefusedError(f"Site '{model.site}' describes its model by what cannot be.")
    return Letter(
        model.run, version, model.training_cases, model.initial, model.schema, model.digest, model.size
    )  # fmt: skip


def incompatibility(theirs: pb.Model | pb.PullRequest, state: State, name: str) -> str:
    """Why the model, or the request for one, does not go with this site's training; empty: it does."""
    if theirs.protocol != PEER_PROTOCOL:
        return (
            f"Site '{theirs.site}' speaks version {theirs.protocol} of the protocol, site '{name}' version "
            f"{PEER_PROTOCOL}. Install the same version of nnunet_fed everywhere."
        )
    if theirs.run != state.run:
        return (
            f"Site '{theirs.site}' trains in another run ({theirs.run[:12]}) than site '{name}' ({state.run[:12]}): "
            "study, configuration and attempt must be the same."
        )
    if theirs.schema != state.schema:
        return f"The network of site '{theirs.site}' has other tensors than that of site '{name}'."
    return ""
