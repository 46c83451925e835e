"""``plan_and_preprocess --dry-run``: what a site would send while planning, without sending it. Source: ours."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

from nnunet_fed.exchange.communicator import LocalCommunicator, LocalFederation
from nnunet_fed.exchange.outgoing_log import FILE, Outgoing, array_entry, value_entry
from nnunet_fed.exchange.payload import Array, encode, measure
from nnunet_fed.planners.planning import DESCRIPTIONS, agree
from nnunet_fed.strict_json import to_json
from nnunet_fed.study.federation import Federation, canonical_json
from nnunet_fed.study.site import Site

INDEPENDENT = (DESCRIPTIONS,)
"""Keys of what a site sends whatever the others answer."""
_BEFORE = """\
Site '{site.name}' would send this to {site.coordinator} while planning. Nothing is sent now.

Before it: its name, the version of the protocol, and the name of each phase (checking, extracting, ...).
"""
_DEPENDENT = """
What follows depends on the others' answers. Shown is what this site would send if it were alone: in earnest the
keys are the same, the values are not, and a refinement may take more or fewer steps.
"""
_AFTER = f"""
Only if the plans differed nevertheless would each site also send its plans. In earnest, everything that is sent
stands in {FILE}."""


class DryRunCommunicator(LocalCommunicator):
    """Of a site that is alone, and shows what it would send.

    Args:
        site: name of the site.
        sites: names of all sites of the study.
        show: hears of every contribution, in the words of ``outgoing.jsonl``.
    """

    def __init__(self, site: str, sites: tuple[str, ...], show: Outgoing):
        super().__init__(LocalFederation([site]), site)
        self.sites = sites
        self._show = show

    def sum(self, key: str, array: Array) -> Array:
        """Show the array; the sum over this site alone is the array."""
        self._contribute(key, "sum", measure(encode({"value": array}))[1], array_entry(array))
        return super().sum(key, array)

    def gather(self, key: str, value: Any) -> dict[str, Any]:
        """Show the value; it is gathered from this site alone."""
        self._contribute(key, "gather", len(canonical_json(value)), value_entry(value))
        return super().gather(key, value)

    def _contribute(self, key: str, verb: str, size: int, content: dict[str, Any]) -> None:
        self._show({"key": key, "verb": verb, "bytes": size, **content})


def dry_run_planning(
    site: Site,
    study: Federation,
    dataset_id: int,
    processes: int,
    write: Callable[[str], None],
    base_trainer: str | None = None,
) -> None:
    """Plan as if this site were alone, up to preprocessing, and tell all that it would contribute.

    Nothing is sent, and nothing in ``nnUNet_preprocessed`` is changed; a mapped data set is built. What does not stand
    in :data:`INDEPENDENT` follows from the others' answers: in earnest it has the same keys, but other values (how
    many voxels are sampled of each case, the edges of histograms), and a refinement may take more or fewer steps.

    Args:
        site: settings of this site.
        study: as the coordinator has it.
        dataset_id: nnU-Net's number of this site's data set.
        processes: worker processes for extraction.
        write: takes the text, piece by piece. Standard output goes to standard error meanwhile.
        base_trainer: as in planning.

    Raises:
        FederationError: as in planning.
    """
    dependent = False

    def show(entry: Mapping[str, Any]) -> None:
        nonlocal dependent
        if not dependent and entry["key"] not in INDEPENDENT:
            dependent = True
            write(_DEPENDENT)
        write(to_json(entry))

    write(_BEFORE.format(site=site))
    with _preprocessed_elsewhere(), redirect_stdout(sys.stderr):  # for what nnU-Net prints
        alone = DryRunCommunicator(site.name, study.sites, show)
        agree(
            alone, study, dataset_id, processes, labels=site.label_map, base_trainer=base_trainer, keep_look=False
        )  # fmt: skip
    write(_AFTER)


@contextmanager
def _preprocessed_elsewhere() -> Iterator[None]:
    variable = "nnUNet_preprocessed"
    given = os.environ.get(variable)
    if not given:  # the same complaint as in earnest
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ[variable] = folder
        try:
            yield
        finally:
            os.environ[variable] = given
