"""Gossip between peers: who sends to whom in a round, which models are news, and which model stays.

Source: the send probabilities and the push to a random peer are those of GML, GCML's predecessor (Chen and Yuan, arXiv
2401.06180 and 2401.15434), of which we read abstracts and a third party's review; of GCML's own protocol the abstract
says only that it is peer to peer. Topologies, versions and the choice of a model are the notes' (1.6, 5.5), *ours*.

No site asks another, or a coordinator, whose turn it is: every draw is a hash of the study's seed, the round and the
names involved. It takes nothing from nnU-Net's random numbers, needs no place in a checkpoint, and is the same at every
site on any machine. numpy only: the process that talks to the peers has no torch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np

from nnunet_fed.errors import ConfigurationError, DisagreementError
from nnunet_fed.exchange.payload import Array, Tensors

Topology = Literal["bernoulli", "uniform_push", "derangement", "matching", "ring", "exponential"]
Verdict = Literal["accept", "stale", "replay"]
Keep = Literal["local", "best", "merge"]
Candidate = Literal["local", "before", "merged", "incoming"]
_CANDIDATES: tuple[Candidate, ...] = get_args(Candidate)

LEAST_LIKELIHOOD = 1 / 16
"""A peer that never answers is still tried now and then (5.5)."""

FURTHEST = 10_000
"""Versions by which a site's own counter may grow at a time because another says so."""

NO_FAILURES: Mapping[str, int] = MappingProxyType({})


# ---------------------------------------------------------------------------------------------------- who sends to whom


def uniform(*parts: int | str) -> float:
    """A number in [0, 1) that depends on the parts and on nothing else, no library's version included."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return (int.from_bytes(digest[:7], "big") >> 3) / 2**53


def likelihood(failures: int) -> float:
    """How likely a peer is drawn, relative to one without failures: each in a row halves it, down to 1/16 (5.5)."""
    return max(2.0**-failures, LEAST_LIKELIHOOD)


@dataclass(frozen=True)
class Schedule:
    """Who sends to whom in each round, as a function of the study's seed, the round and the live members (5.5).

    ================ =====================================================================================
    ``bernoulli``    a site sends with its probability, to a random peer (GML)
    ``uniform_push`` every site sends, to a random peer
    ``derangement``  every site sends and receives once: a random permutation that leaves nobody in place
    ``matching``     random pairs, both ways; with an odd number of members one is left out
    ``ring``         every site sends to the next one by name
    ``exponential``  every site sends 1, 2, 4, ... places on, a step further in each round
    ================ =====================================================================================

    The last four need the members to agree on the round and on who lives. Where they do not, some get two models or
    none, which harms nothing: no model waits for another, and none is averaged.
    """

    topology: Topology
    seed: int
    """The study's."""
    expected_senders: float | None = None
    """c of ``bernoulli``, above 0; ``None``: half of the members. 1 is the literal reading of GML (A6)."""

    def send_probabilities(self, cases: Mapping[str, int]) -> dict[str, float]:
        """p of each site in ``bernoulli``: ``min(1, c alpha / sum alpha)``, alpha its number of training cases.

        Args:
            cases: training cases of each live member.

        Raises:
            ConfigurationError: a number of cases is below 1.
        """
        for site, number in cases.items():
            if number < 1:
                raise ConfigurationError(
                    f"Site '{site}' has {number} training cases; a site that trains has at least 1."
                )
        expected = len(cases) / 2 if self.expected_senders is None else self.expected_senders
        total = sum(cases.values())
        return {site: min(1.0, expected * number / total) for site, number in cases.items()}

    def pushes(self, number: int, cases: Mapping[str, int]) -> dict[str, str]:
        """Whom each sender of a round tries first, if no site has had a failure.

        Args:
            number: of the round.
            cases: training cases of each live member.
        """
        first = {site: self.candidates(number, site, cases) for site in sorted(cases)}
        return {site: peers[0] for site, peers in first.items() if peers}

    def candidates(
        self, number: int, site: str, cases: Mapping[str, int], failures: Mapping[str, int] = NO_FAILURES
    ) -> tuple[str, ...]:
        """Whom one site tries in a round, in order: all peers; nobody if it does not send.

        First comes the topology's choice, then the others at random. Peers that failed come later in random orders,
        and in the other topologies give way to a random peer, by :func:`likelihood`.

        Args:
            number: of the round.
            site: which asks.
            cases: training cases of each live member, the site itself among them.
            failures: of this site to reach a peer, since their last contact.

        Raises:
            ConfigurationError: the site is no member, or as :meth:`send_probabilities`.
        """
        if site not in cases:
            raise ConfigurationError(
                f"Site '{site}' is not among the members of the gossip, {', '.join(sorted(cases))}: add it to the list."
            )
        peers = [peer for peer in sorted(cases) if peer != site]
        if not peers:
            return ()
        if (
            self.topology == "bernoulli"
            and uniform(self.seed, number, "send", site) >= self.send_probabilities(cases)[site]
        ):
            return ()

        def waiting_time(peer: str) -> float:
            """Exponential of the peer's rate: the shortest is drawn with a probability proportional to the rate."""
            drawn = uniform(self.seed, number, "peer", site, peer)
            return -math.log1p(-drawn) / likelihood(failures.get(peer, 0))

        at_random = tuple(sorted(peers, key=waiting_time))
        if self.topology in ("bernoulli", "uniform_push"):
            return at_random
        partner = self._scheduled(number, sorted(cases)).get(site)
        if partner is None:
            return ()
        if uniform(self.seed, number, "partner", site) >= likelihood(failures.get(partner, 0)):
            return at_random
        return (partner, *(peer for peer in at_random if peer != partner))

    def _scheduled(self, number: int, members: list[str]) -> dict[str, str]:
        """Receiver of each sender in the topologies that plan a round as a whole; at least two sorted members."""
        count = len(members)
        if self.topology == "derangement":
            for attempt in itertools.count():  # each succeeds with a probability near 1/e
                shuffled = self._shuffled(number, members, attempt)
                if all(one != other for one, other in zip(members, shuffled, strict=True)):
                    break
            return dict(zip(members, shuffled, strict=True))
        if self.topology == "matching":
            shuffled = self._shuffled(number, members)
            pairs = list(zip(shuffled[::2], shuffled[1::2], strict=False))
            return {one: other for pair in pairs for one, other in (pair, pair[::-1])}
        shift = 1 if self.topology == "ring" else 2 ** (number % (count - 1).bit_length())
        return {member: members[(place + shift) % count] for place, member in enumerate(members)}

    def _shuffled(self, number: int, members: list[str], attempt: int = 0) -> list[str]:
        return sorted(members, key=lambda member: uniform(self.seed, number, self.topology, attempt, member))


# --------------------------------------------------------------------------------------------------------- what is news


@dataclass(frozen=True)
class Version:
    """Which state of a site's model this is, and whose models it has learnt from (5.5)."""

    site: str
    vector: Mapping[str, int]
    """The newest counter of each site whose model has influenced the weights, and the site's own."""
    epoch: int
    """Of the site's training; for the receiver's judgement only."""

    @property
    def counter(self) -> int:
        """How many versions the site has published, 0 before the first."""
        return self.vector.get(self.site, 0)

    def published(self, epoch: int) -> Version:
        """The next version, which the site makes known after an epoch."""
        return Version(self.site, {**self.vector, self.site: self.counter + 1}, epoch)

    def influenced_by(self, other: Version) -> Version:
        """The version once a mutual phase with another model ends.

        Each site speaks for its own counter only: what the other model says of third sites is left aside, or a forged
        number would make all that they send old. What it says of this site's own counter, which a site that went on
        from an old checkpoint so learns, counts as far as :data:`FURTHEST`.
        """
        told = min(other.vector.get(self.site, 0), self.counter + FURTHEST)
        of_other = max(self.vector.get(other.site, 0), other.counter)
        vector = {**self.vector, other.site: of_other, self.site: max(self.counter, told)}
        return Version(self.site, dict(sorted(vector.items())), self.epoch)


def judge(offer: Version, received: Mapping[str, int], epoch: int, max_epoch_distance: int | None = None) -> Verdict:
    """Whether a peer's model is wanted.

    ``replay``: this version of that site, or a newer one, has come already. ``stale``: the two trained for epochs that
    are too far apart.

    Args:
        offer: version of the model that is offered.
        received: counter of the newest model that came from each peer.
        epoch: of the receiver's training.
        max_epoch_distance: ``None``: any.
    """
    if offer.counter <= received.get(offer.site, 0):
        return "replay"
    if max_epoch_distance is not None and abs(offer.epoch - epoch) > max_epoch_distance:
        return "stale"
    return "accept"


def next_delivery(inbox: Collection[Version], used: Mapping[str, int]) -> Version | None:
    """Which of the models at hand is trained with next: of the peer used least often, then the newest (notes' 2).

    Args:
        inbox: versions at hand.
        used: how many mutual phases each peer's models had here.
    """
    return min(inbox, key=lambda version: (used.get(version.site, 0), -version.counter, version.site), default=None)


# ---------------------------------------------------------------------------------------------------- which model stays


def kept(keep: Keep, scores: Mapping[Candidate, float], tolerance: float = 0.005) -> Candidate:
    """Which model a site goes on with after a mutual phase (1.6).

    Args:
        keep: ``local``: its own, improved, whatever the scores; ``merge``: the merged one, likewise; ``best``: that of
            the highest score, but its own unless another exceeds it by more than the tolerance.
        scores: mean foreground Dice of each candidate on the site's frozen validation patches, for ``best`` that of
            ``local`` at least. One that is not a number never wins.
        tolerance: see above.
    """
    if keep != "best":
        return "local" if keep == "local" else "merged"

    def score(name: Candidate) -> float:
        value = scores.get(name, math.nan)
        return -math.inf if math.isnan(value) else value

    best = max(_CANDIDATES, key=score)
    return best if score(best) > score("local") + tolerance else "local"


def merged(
    own: Tensors, incoming: Tensors, weight: float, *, own_initial: str, incoming_initial: str
) -> dict[str, Array]:
    """``weight`` own + (1 - ``weight``) incoming, in new arrays; equal tensors stay as they are, bit for bit.

    Networks that did not start from the same weights have no common meaning of a channel: in the notes' toy run two
    of Dice 0.93 and 0.94 had a mean of Dice 0.

    Args:
        own: this site's weights. What is not floating-point stays its own.
        incoming: the peer's, of the same names and shapes.
        weight: the notes' beta, from 0 to 1; at 1 the site's own, bit for bit.
        own_initial: digest of the weights that this site started from.
        incoming_initial: the peer's.

    Raises:
        DisagreementError: the two started from different weights, or names or shapes differ.
    """
    if own_initial != incoming_initial:
        raise DisagreementError(
            f"The peer's model started from other weights ({incoming_initial[:12]}) than this site's "
            f"({own_initial[:12]}), and their mean would be no model: merge only with common initial weights."
        )
    if own.keys() != incoming.keys() or any(own[name].shape != incoming[name].shape for name in own):
        differing = [n for n in sorted(own.keys() | incoming.keys()) if _shape(own, n) != _shape(incoming, n)]
        raise DisagreementError(f"The peer's model has other tensors than this site's: {', '.join(differing[:5])}.")
    return {
        name: np.asarray(array + array.dtype.type(1 - weight) * (incoming[name] - array))
        if np.issubdtype(array.dtype, np.floating)
        else array.copy()
        for name, array in own.items()
    }


def _shape(tensors: Tensors, name: str) -> tuple[int, ...] | None:
    return tensors[name].shape if name in tensors else None
