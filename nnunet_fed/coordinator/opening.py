"""How a coordinator begins, or goes on where the last one stopped: the study and the attempt that it serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nnunet_fed.coordinator.store import Store
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.study.federation import Federation


def open_attempt(store: Store) -> int:
    """Open an attempt, the first one or another: sites plan and train from the start. Returns its number."""
    attempt = (store.fact("attempt") or 0) + 1
    with store.transaction():
        store.set_fact("attempt", attempt)
        store.add_event(None, None, f"attempt {attempt} opened")
    return attempt


def open_study(study: Federation, store: Store) -> tuple[Federation, int]:
    """Journal what is new of a study, and open an attempt if there is none.

    Args:
        study: as ``federation.toml`` has it now.
        store: the coordinator's memory.

    Returns:
        The study, in which what it does not set is as in the version that opened it; the number of the attempt.

    Raises:
        ConfigurationError: the store belongs to a study of other mathematics.
    """
    known = store.latest_study()
    if known is not None:
        study = study.with_defaults(store.fact("defaults") or {})
        _check_same(Federation.restore(known), study, store.folder)
    attempt: int | None = store.fact("attempt")
    with store.transaction():
        if known is None:
            store.set_fact("defaults", study.defaults())
        if known != study.stored():
            store.add_study(study.stored())
        before = set(study.sites if known is None else known["sites"])
        for site in sorted(before.symmetric_difference(study.sites)):
            came = site in study.sites
            store.add_event(None, site, "is in the study now" if came else "is not in the study any more")
    return study, open_attempt(store) if attempt is None else attempt


def _check_same(known: Federation, study: Federation, folder: Path) -> None:
    if known.digest == study.digest:
        return
    before, now = _mathematics(known), _mathematics(study)
    edited = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    raise ConfigurationError(
        f"The state directory {folder} belongs to another study: what changes the mathematics was edited since "
        f"({', '.join(edited)}). Undo that, or give the new study another --state."
    )


def _mathematics(study: Federation) -> dict[str, Any]:
    """By the name of the field; the method's own fields by ``method.NAME``."""
    content = {name: value for name, value in study.stored().items() if name not in study.OPERATIONAL}
    method = content.pop("method")
    return {**content, **{f"method.{name}": value for name, value in method.items()}}
