"""``nnunet_fed rewind`` and ``new-attempt``: what an administrator does to the memory of a stopped coordinator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nnunet_fed.errors import ConfigurationError

if TYPE_CHECKING:
    from nnunet_fed.coordinator.store import Store

StateArgument = Annotated[Path, typer.Argument(metavar="STATE", help="The stopped coordinator's --state.")]


def rewind(
    state: StateArgument,
    round_: Annotated[
        str,
        typer.Argument(
            metavar="ROUND", help="The last round that stands, as the record counts: 3, round-0003, or start."
        ),
    ],
    run: Annotated[str | None, typer.Option(metavar="ID", help="Which training, if there are several.")] = None,
) -> None:
    """Undo rounds: the training goes on from the model of an earlier one, at all sites."""
    from nnunet_fed.coordinator.generations import rewind as go_back

    with _opened(state) as store:
        model = go_back(store, round_, run)
    print(
        f"The training goes on from the model of {model.scope}, as the run {model.run}. Start the coordinator, then "
        "the training at every site with --c."
    )


def new_attempt(state: StateArgument) -> None:
    """Open a new attempt: all sites plan and train from the start."""
    from nnunet_fed.coordinator.opening import open_attempt

    with _opened(state) as store:
        number = open_attempt(store)
    print(f"Attempt {number} is open. Start the coordinator, then plan and train at every site, without --c.")


@contextmanager
def _opened(state: Path) -> Iterator[Store]:
    from nnunet_fed.coordinator.store import Store

    if not (state / "journal.sqlite").is_file():
        raise ConfigurationError(f"{state} is not the state directory of a coordinator: it holds no journal.sqlite.")
    store = Store(state)
    try:
        yield store
    finally:
        store.close()
