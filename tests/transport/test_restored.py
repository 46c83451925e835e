"""A coordinator that is restored from a back-up, or whose rounds are undone, over the real network."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import Serve, Served, make_study, together

from nnunet_fed.coordinator.generations import rewind
from nnunet_fed.coordinator.store import Store
from nnunet_fed.errors import RefusedError
from nnunet_fed.exchange.keys import key_of, scope_of_round
from nnunet_fed.transport.site.client import GrpcCommunicator

STUDY = make_study("ab", rounds=20)


def model(number: int) -> str:
    return key_of(scope_of_round(number), "model")


def give(communicator: GrpcCommunicator, number: int, value: float) -> float:
    return float(communicator.mean(model(number), {"w": np.float32([value])}, 1)["w"][0])


def both(sites: list[GrpcCommunicator], number: int, *values: float) -> list[object]:
    return together(*(lambda s=s, v=v: give(s, number, v) for s, v in zip(sites, values, strict=True)))  # type: ignore[misc]


def again(served: Served, serve: Serve, folder: Path, back_up: Path | None = None) -> Served:
    """Another coordinator at the same address, perhaps with an older state."""
    served.stop()
    if back_up is not None:
        shutil.rmtree(folder)
        shutil.copytree(back_up, folder)
    return serve(STUDY, folder, address=served.server.address)


def test_sites_that_train_go_on_with_a_restored_coordinator(serve: Serve, tmp_path: Path) -> None:
    """One waits in a round of which the coordinator has lost everything: it contributes again."""
    state, back_up = tmp_path / "of coordinator", tmp_path / "back-up"
    served = serve(STUDY, state)
    sites = [served.seat(name, tls={"connect_minutes": 1}) for name in "ab"]
    both(sites, 0, 0, 2)
    served.stop()
    shutil.copytree(state, back_up)
    served = serve(STUDY, state, address=served.server.address)
    assert both(sites, 1, 1, 3) == [2, 2]
    assert both(sites, 2, 2, 4) == [3, 3]
    answers: list[Any] = []
    waiting = threading.Thread(target=lambda: answers.append(give(sites[0], 3, 3)), daemon=True)
    waiting.start()
    while not served.coordinator.status()["open"]:
        pass
    served = again(served, serve, state, back_up)
    assert give(sites[1], 3, 5) == 4
    waiting.join(60)
    assert answers == [4]
    assert sites[0].held == sites[1].held
    assert sites[0].newest("model") == model(3)


def test_sites_that_differ_go_back_with_a_restored_coordinator(serve: Serve, tmp_path: Path) -> None:
    state, back_up = tmp_path / "of coordinator", tmp_path / "back-up"
    served = serve(STUDY, state)
    sites = [served.seat(name, tls={"connect_minutes": 1}) for name in "ab"]
    both(sites, 0, 0, 2)
    served.stop()
    shutil.copytree(state, back_up)
    served = serve(STUDY, state, address=served.server.address)
    both(sites, 1, 1, 3)
    held = sites[1].held
    both(sites, 2, 2, 4)
    sites[1].held = held  # it was killed before it had the last model
    served = again(served, serve, state, back_up)

    def refused(site: GrpcCommunicator, number: int) -> None:
        with pytest.raises(RefusedError, match=r"went back to the model of round-0000.*--c"):
            give(site, number, 1)

    together(lambda: refused(sites[0], 3), lambda: refused(sites[1], 2))
    for site in sites:
        before = site.run
        site.join("training", STUDY.digest_of_fold(0), "3d_fullres", "T", held=site.held)
        assert (site.run, site.generation, site.standing) == (f"{before}.1", 1, "ahead")
        site.held = None
        assert site.newest("model") == model(0)
    assert both(sites, 1, 5, 7) == [6, 6]


def test_a_training_that_runs_learns_that_rounds_were_undone(serve: Serve, tmp_path: Path) -> None:
    state = tmp_path / "of coordinator"
    served = serve(STUDY, state)
    sites = [served.seat(name, tls={"connect_minutes": 1}) for name in "ab"]
    for number in range(3):
        both(sites, number, number, number)
    served.stop()
    store = Store(state)
    rewind(store, "1")
    store.close()
    serve(STUDY, state, address=served.server.address)
    for ask in (
        lambda: give(sites[0], 3, 3),
        lambda: sites[0].fetch(model(2)),
        lambda: sites[0].newest("model"),
    ):
        with pytest.raises(RefusedError, match="went back to the model of round-0001"):
            ask()
    assert sites[0].status_at_once()["undone"].keys() == {sites[0].run}
    sites[0].note("this can be told nevertheless")


def test_nobody_has_contributed_to_what_is_fetched(serve: Serve) -> None:
    site = serve(STUDY).seat("a")
    with pytest.raises(RefusedError, match="Nobody has contributed to 'round-0000/model'"):
        site.fetch(model(0))
    assert site.gathered("r/x") is None
