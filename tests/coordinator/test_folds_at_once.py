"""Folds of one study at one coordinator, in turn or at once: runs that know nothing of each other."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
from desk import Desk
from rich.console import Console

from nnunet_fed.coordinator.watch import status_table
from nnunet_fed.errors import NoRoomError, RefusedError
from nnunet_fed.exchange.payload import encode
from nnunet_fed.exchange.uploads import INTERRUPTED, UPLOADS
from nnunet_fed.study.federation import Fold

Make = Callable[..., Desk]
R0 = "round-0000/model"


def join(at: Desk, fold: Fold, *sites: str) -> str:
    return at.join(*sites, fold=fold, digest=at.study.digest_of_fold(fold))


def test_each_fold_has_its_rounds_its_deadlines_and_its_progress(desk: Make) -> None:
    at = desk("ab", folds=[0, 1], min_sites=1, rounds=2)
    runs = {fold: join(at, fold, "a", "b") for fold in (0, 1)}
    for fold, value in ((0, 1.0), (1, 5.0)):
        at.run = runs[fold]
        at.give("a", R0, value)
    at.coordinator.report("b", {"phase": "validating", "round": 2}, runs[0])
    at.coordinator.report("b", {"phase": "training", "round": 1, "loss": 0.5}, runs[1])
    status = at.coordinator.status()
    assert {run: (of["fold"], of["sites"]["b"]["progress"]) for run, of in status["trainings"].items()} == {
        runs[0]: (0, {"phase": "validating", "round": 2}),
        runs[1]: (1, {"phase": "training", "round": 1, "loss": 0.5}),
    }
    at.run = runs[0]
    assert at.coordinator.outlook(at.collective(R0)).missing == {"b": "b (validating)"}
    at.give("b", R0, 3.0)
    assert at.result(R0) == 2
    at.run = runs[1]
    assert at.collective(R0).status == "open"
    at.pass_deadline()
    assert at.result(R0) == 5
    assert [at.coordinator.newest(run, "model") for run in runs.values()] == [R0, R0]


def test_who_watches_sees_each_fold(desk: Make) -> None:
    at = desk("ab", folds=[0, 1])
    runs = {fold: join(at, fold, "a", "b") for fold in (0, 1)}
    at.give("a", R0, 1.0)
    at.coordinator.report("a", {"phase": "training", "round": 1}, runs[0])
    at.coordinator.report("a", {"phase": "exchanging", "round": 7}, runs[1])

    def shown() -> str:
        console = Console(width=150)
        with console.capture() as capture:
            console.print(status_table(at.coordinator.status()))
        return capture.get()

    assert re.search(r"a\W+fold 0\W+training\W+1/.*\n.*a\W+fold 1\W+exchanging\W+7/", shown())
    assert "fold 1: round-0000/model waits for b until" in shown()
    for site in "ab":
        at.coordinator.leave(runs[0], site, "finished")
    assert "fold 0" not in shown()


def test_the_record_tells_the_fold_of_each_run_and_an_attempt_covers_all(desk: Make) -> None:
    at = desk("ab", folds=[0, "all"])
    first = {fold: join(at, fold, "a") for fold in (0, "all")}
    assert [run["fold"] for run in at.coordinator.status(record=True)["runs"].values()] == [0, "all"]
    at.close()
    at.new_attempt()
    at.open()
    second = {fold: join(at, fold, "a") for fold in (0, "all")}
    assert len({*first.values(), *second.values()}) == 4
    at.run = first[0]
    with pytest.raises(RefusedError, match="Attempt 1 was given up"):
        at.give("a", R0, 1.0)


def test_a_fold_that_the_study_does_not_train(desk: Make) -> None:
    """A run that was under way when the fold was edited goes on."""
    at = desk("ab")
    run = join(at, 0, "a")
    with pytest.raises(RefusedError, match=r"^The study '.*' trains fold 0, and site 'b' fold 1\. Train one of the"):
        join(at, 1, "b")
    assert [training["fold"] for training in at.coordinator.status()["trainings"].values()] == [0]
    at.close()
    at.open(folds=[1, 2])
    assert join(at, 0, "b") == run
    assert join(at, 1, "b") != run
    with pytest.raises(RefusedError, match="trains fold 1, 2, and site 'b' fold 3"):
        join(at, 3, "b")


def test_no_fold_waits_for_room_that_another_one_takes(desk: Make) -> None:
    """Else two sites that begin with different folds would wait for each other until the deadline."""
    at = desk("ab", folds=[0, 1])
    at.close()
    at.open(spool_quota=4000)
    big = b"".join(encode({"w": np.zeros(200, np.float32)}))
    for fold in (0, 1):
        join(at, fold, "a", "b")
        assert at.upload("a", R0, big) == "stands"
        with pytest.raises(NoRoomError, match=r"its share of 1e-06 GB \(--spool-quota-gb, divided by the sites and"):
            at.upload("a", "round-0000/other", big)


def test_uploads_of_a_site_are_bounded_in_each_fold_and_in_all(desk: Make) -> None:
    at = desk("ab", folds=[0, 1])
    payload = b"".join(encode({"w": np.zeros(9, np.float32)}))
    runs = [join(at, fold, "a") for fold in (0, 1)]
    for number in range(2 * INTERRUPTED):
        for at.run in runs:
            assert at.upload("a", f"round-0000/n-{number}", payload, arrives=payload[:9]) is None
    assert len(at.spooled()) == 2 * INTERRUPTED
    for configuration in ("2d", "3d_lowres"):  # what it calls its runs gives it no more
        at.run = at.coordinator.join("a", "training", at.study.digest_of_fold(0), configuration, "T", fold=0)
        for number in range(2 * INTERRUPTED):
            at.upload("a", f"round-0000/n-{number}", payload, arrives=payload[:9])
    assert len(at.spooled()) == 2 * INTERRUPTED
    spool = at.coordinator._spool
    offers = []
    for at.run in runs:
        offers += [at.offer_of("a", f"round-0000/u-{number}", payload) for number in range(UPLOADS)]
    receiving = [spool.receive(offer.upload, 0) for offer in offers]
    for one in receiving:
        one.__enter__()
    with pytest.raises(NoRoomError, match=f"has {2 * UPLOADS} uploads under way"):
        at.upload("a", "round-0000/u-9", payload)
    for one in receiving:
        one.__exit__(None, None, None)
