"""One site tells, all have the same: what a method's author reuses in an exchange. Source: ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from nnunet_fed.errors import DisagreementError, NoContributionError
from nnunet_fed.exchange.communicator import Collectives
from nnunet_fed.exchange.keys import source_key
from nnunet_fed.exchange.payload import Array, Tensors, encode, measure
from nnunet_fed.trainers.parts.ranks import TrainingCommunicator

T = TypeVar("T")
S = TypeVar("S")

SAME_VERSIONS = "Install the same versions of nnunet_fed and numpy at all sites."
"""What to do where sites have computed different things from the same numbers."""


def digest_of_arrays(tensors: Tensors) -> str:
    """Digest of a payload, by which sites compare tensors without sending them."""
    return measure(encode(tensors))[0]


def publish(
    communicator: Collectives, key: str, source: str, tensors: Callable[[], Tensors], exact: bool = True
) -> dict[str, Array]:
    """The tensors of one site, for all: a mean in which that site weighs 1 and the others 0.

    Args:
        communicator: this site's.
        key: of the mean.
        source: the site whose tensors they are; the same at every site.
        tensors: gives them; called at the source only.
        exact: whether every bit counts, whatever the study's ``wire_dtype``.

    Raises:
        NoContributionError: the source has gone away.
    """
    mine = communicator.site == source
    return communicator.mean(key, tensors() if mine else {}, float(mine), exact)


def publish_computed(
    communicator: Collectives, key: str, sources: Iterable[str], computed: Tensors
) -> dict[str, Array]:
    """A state that every site has computed alike, published for sites that were away (rule 5 of the protocol).

    Args:
        communicator: this site's.
        key: of the mean.
        sources: the sites that can publish, the same at every site; the first that is still there does.
        computed: the state, as this site has computed it.

    Returns:
        What was published, which is what this site has, bit for bit.

    Raises:
        DisagreementError: it is something else.
        NoContributionError: all sources have gone away.
    """

    def from_source(numbered: tuple[int, str]) -> dict[str, Array]:
        number, source = numbered
        published = publish(communicator, source_key(key, number), source, lambda: computed)
        if digest_of_arrays(published) != digest_of_arrays(computed):
            raise DisagreementError(
                f"Site '{source}' has published a state as '{key}' that is not the one which site "
                f"'{communicator.site}' has computed itself, though both began with the same numbers. {SAME_VERSIONS} "
                "Then continue with --c."
            )
        return published

    return from_next_source(
        enumerate(sources), from_source, f"The sites that could publish '{key}' have all gone away."
    )


def fetch_published(communicator: TrainingCommunicator, key: str, sources: int) -> dict[str, Array]:
    """What :func:`publish_computed` has published under a key, whichever of so many sources it was.

    Raises:
        NoContributionError: all sources had gone away.
    """

    def from_source(number: int) -> dict[str, Array]:
        return communicator.fetch(source_key(key, number))

    return from_next_source(range(sources), from_source, f"No site has published '{key}'.")


def from_next_source(sources: Iterable[S], ask: Callable[[S], T], nobody: str) -> T:
    """The answer of the first of several sources that has one.

    Args:
        sources: in the order in which they are asked; the same at every site.
        ask: gives a source's answer; each try needs a key of its own.
        nobody: the sentence that says that all of them have gone away.

    Raises:
        NoContributionError: no source contributes.
    """
    for source in sources:
        try:
            return ask(source)
        except NoContributionError:
            continue
    raise NoContributionError(nobody)


def require_equal(told: Mapping[str, str | None], complaint: str, remedy: str = SAME_VERSIONS) -> None:
    """See that all sites have told the same.

    Args:
        told: by site, such as a digest that was gathered.
        complaint: the sentence, without its full stop, that says what differs.
        remedy: the sentence that says what to do.

    Raises:
        DisagreementError: says who has told what.
    """
    if len(set(told.values())) > 1:
        listed = ", ".join(f"{site}: {(value or 'none')[:12]}" for site, value in told.items())
        raise DisagreementError(f"{complaint} ({listed}). {remedy}")
