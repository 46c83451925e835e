"""outgoing.jsonl lists what leaves a site: no more, no less, and before it leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import Served, lines, make_study, tensors_of, together

from nnunet_fed.exchange.outgoing_log import LARGEST_ARRAY, OutgoingLog
from nnunet_fed.transport.site.client import GrpcCommunicator

Serve = Callable[..., Served]


def contributions(entries: list[dict[str, Any]]) -> dict[str, tuple[Any, ...]]:
    return {entry["key"]: (entry["bytes"], entry["digest"], entry["weight"]) for entry in entries}


def test_the_file_is_what_the_coordinator_received(serve: Serve, tmp_path: Path) -> None:
    served = serve(make_study("ab"))
    files = {site: tmp_path / site / "outgoing.jsonl" for site in "ab"}
    seats = {site: served.seat(site, outgoing=OutgoingLog(files[site])) for site in "ab"}

    def talk(seat: GrpcCommunicator) -> None:
        seat.mean("r0/model", tensors_of(seat.site), float(seat.site == "a"))
        seat.sum("r0/counts", np.arange(3))
        seat.sum("r0/few", np.eye(1, 3 * LARGEST_ARRAY, 7, dtype=np.int64).reshape(3, LARGEST_ARRAY))
        seat.sum("r0/many", np.ones((2, LARGEST_ARRAY)))
        seat.gather("r0/digests", {"of": seat.site})
        seat.report({"phase": "training"}, wait=True)
        seat.note("noted")
        seat.leave("done")

    together(*(lambda seat=seat: talk(seat) for seat in seats.values()))  # type: ignore[misc]
    (run,) = served.coordinator.status(record=True)["runs"].values()
    for site, file in files.items():
        received = {
            c["key"]: tuple(c["sites"][site][name] for name in ("bytes", "digest", "weight"))
            for c in run["collectives"]
        }
        assert contributions(lines(file, "offer")) == received
        uploads = lines(file, "upload")
        assert contributions(uploads) == {key: given for key, given in received.items() if given[2] > 0}
        assert sum(entry["bytes"] for entry in uploads) == seats[site].bytes_sent
        assert {entry["to"] for entry in lines(file)} == {served.server.address}
        whats = [entry["what"] for entry in lines(file) if entry["what"] not in ("offer", "upload")]
        assert whats == ["join", "report", "note", "leave"]

    sent = {entry["key"]: entry for entry in lines(files["a"], "upload")}
    assert sent["r0/model"]["tensors"] == {"b": ["F64", []], "w": ["F32", [70_000, 7]]}
    assert (sent["r0/counts"]["value"], sent["r0/counts"]["dtype"]) == ([0, 1, 2], "int64")
    assert sent["r0/few"]["nonzero"] == [[7, 1]]
    assert sent["r0/many"]["shape"] == [2, LARGEST_ARRAY]
    assert not {"value", "nonzero"} & sent["r0/many"].keys()
    assert sent["r0/digests"]["value"] == {"of": "a"}
    assert lines(files["a"], "note")[0]["text"] == "noted"
    assert lines(files["a"], "report")[0]["progress"] == {"phase": "training"}


def test_what_is_not_sent_again_is_not_listed_again(serve: Serve, tmp_path: Path) -> None:
    seat = serve(make_study("a")).seat("a", outgoing=OutgoingLog(tmp_path / "out.jsonl"))
    for _ in range(2):
        seat.gather("r/x", 1)
    assert len(lines(tmp_path / "out.jsonl", "upload")) == 1
    assert len(lines(tmp_path / "out.jsonl", "offer")) == 2


def test_nothing_leaves_that_cannot_be_listed(serve: Serve) -> None:
    def full(entry: Mapping[str, Any]) -> None:
        if entry["what"] == "upload":
            raise OSError("No space left on device")

    served = serve(make_study("a"))
    with pytest.raises(OSError, match="No space"):
        served.seat("a", outgoing=full).gather("r/x", 1)
    (run,) = served.coordinator.status(record=True)["runs"].values()
    assert run["collectives"] == []
