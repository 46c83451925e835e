"""The state machine without a network: who takes part, what stands, when a collective closes, what a restart finds."""

from __future__ import annotations

import ast
import json
import threading
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from desk import Desk
from serving import make_study

from nnunet_fed.coordinator import round_closer
from nnunet_fed.coordinator.coordinator import Coordinator
from nnunet_fed.coordinator.store import Store
from nnunet_fed.errors import ConfigurationError, RefusedError
from nnunet_fed.exchange.payload import encode

Make = Callable[..., Desk]
R0, R1, R2 = (f"round-000{number}/model" for number in range(3))

# ------------------------------------------------------------------------------------------------------------- members


def test_a_run_is_named_by_study_configuration_trainer_fold_and_attempt(desk: Make) -> None:
    at = desk()
    digest = at.study.digest[:12]
    assert at.run == f"{digest}-3d_fullres-T-fold_0-1"
    assert at.join("a", configuration="2d") == f"{digest}-2d-T-fold_0-1"
    assert at.join("a", purpose="planning") == f"{digest}-planning-1" == at.coordinator.planning_run()
    at.close()
    at.new_attempt()
    at.open()
    assert at.coordinator.planning_run() is None
    assert at.join("a", fresh=True) == f"{digest}-3d_fullres-T-fold_0-2"
    assert at.events()[-1] == "attempt 2 opened"


@pytest.mark.parametrize(
    ("site", "more", "sentence"),
    [
        ("x", {}, "Site 'x' is not in the study 'study' .sites: a, b."),
        ("a", {"digest": "0" * 64}, "plans at site 'a' belong to another study"),
        ("a", {"configuration": "../2d"}, "cannot name a configuration"),
        ("a", {"trainer": ""}, "cannot name a configuration and a trainer"),
    ],
)
def test_who_may_not_join(desk: Make, site: str, more: dict[str, str], sentence: str) -> None:
    with pytest.raises(RefusedError, match=sentence):
        desk().join(site, **more)


def test_who_has_contributed_does_not_start_afresh(desk: Make) -> None:
    at = desk()
    at.join("a", fresh=True)
    at.give("a", "start/model", 1)
    with pytest.raises(RefusedError, match=r"'a' has already contributed.*attempt 1.*--c.*new-attempt"):
        at.join("a", fresh=True)
    at.join("a")
    at.join("b", fresh=True)
    assert at.events("a") == ["joined with --c", "joined", "joined with --c"]


def test_who_has_not_joined_is_refused_whatever_it_says(desk: Make) -> None:
    at = desk("ab")
    at.run = f"{at.run}-other"
    for say in (
        lambda: at.give("a", R0, 1),
        lambda: at.tell("a", R0, 0),
        lambda: at.coordinator.note(at.run, "a", "text"),
        lambda: at.coordinator.leave(at.run, "a", "reason"),
    ):
        with pytest.raises(RefusedError, match="Site 'a' has not joined the run"):
            say()
    assert at.spooled() == []


def test_who_leaves_is_not_waited_for(desk: Make) -> None:
    at = desk("abc", min_sites=1)
    at.give("a", R0, 1)
    at.coordinator.leave(at.run, "b", "maintenance")
    assert at.missing(R0) == ["c"]
    at.coordinator.leave(at.run, "c", "x" * 20_000)
    assert at.result(R0) == 1, "it closes at once"
    assert at.events("b")[-1] == "left: maintenance"
    assert len(at.events("c")[-1]) == 10_006


def test_what_a_site_says_of_itself(desk: Make) -> None:
    at = desk()
    at.coordinator.report("b", {"phase": "training", "round": 1})
    at.coordinator.report("x", {"phase": "spying"})
    at.give("a", R0, 1)
    assert at.coordinator.outlook(at.collective(R0)).missing == {"b": "b (training)"}
    told = at.coordinator.status()["sites"]
    assert told["b"]["progress"] == {"phase": "training", "round": 1}
    assert told.keys() == {"a", "b"}
    for odd in ({}, {"phase": 1}, []):
        with pytest.raises(RefusedError, match="names a phase"):
            at.coordinator.report("a", odd)  # type: ignore[arg-type]


def test_versions_are_told_to_all_and_bounded(desk: Make) -> None:
    at = desk()
    assert at.coordinator.introduce("a", {"torch": "2"}) == {"a": {"torch": "2"}}
    assert at.coordinator.introduce("b", {}) == {"a": {"torch": "2"}, "b": {}}
    for much in ({f"p{number}": "1" for number in range(21)}, {"torch": 101 * "1"}):
        with pytest.raises(RefusedError, match="versions is too long"):
            at.coordinator.introduce("a", much)
    with pytest.raises(RefusedError, match="'x' is not in the study"):
        at.coordinator.introduce("x", {})


# ------------------------------------------------------------------------------------------------- what is contributed


def test_the_result_does_not_depend_on_the_order_of_arrival(desk: Make) -> None:
    at = desk("abc")
    values = {"a": 1e8, "b": 1.0, "c": -1e8}
    results = set()
    for number, order in enumerate(permutations("abc")):
        for site in order:
            at.give(site, f"round-{number:04d}/model", values[site], weight=ord(site))
        results.add(at.result(f"round-{number:04d}/model").tobytes())
    assert len(results) == 1
    assert list(at.coordinator.outlook(at.collective(R0)).weights.items()) == [("a", 97), ("b", 98), ("c", 99)]


def test_a_contribution_stands_and_the_same_again_is_harmless(desk: Make) -> None:
    at = desk()
    assert at.give("a", R0, 1) == "stands"
    (file,) = at.spooled()
    assert at.give("a", R0, 1) == "stands"
    assert at.give("a", R0, 1, weight=2) == at.give("a", R0, 9) == at.tell("a", R0, 0) == "differs"
    assert at.spooled() == [file]
    assert at.give("b", R0, 3) == "stands"
    assert at.result(R0) == 2
    assert (at.give("a", R0, 1), at.give("a", R0, 9)) == ("stands", "differs"), "after it has closed, too"


def test_asking_contributes_nothing(desk: Make) -> None:
    at = desk("ab", min_sites=1)
    payload = b"".join(encode({"w": np.float32([1])}))
    for weight in (0.0, 1.0):
        assert at.coordinator.ask(at.offer_of("a", R0, payload, weight)) == "send"
    assert at.coordinator.wait(at.run, R0, 0) is None
    assert at.coordinator.offer(at.offer_of("a", R0, payload)) == "send"
    assert at.coordinator.wait(at.run, R0, 0) is None, "what has a weight has to be sent"


def test_weight_0_sends_nothing_and_has_contributed(desk: Make) -> None:
    at = desk("abc")
    assert at.tell("a", R0, 0) == at.tell("a", R0, 0) == "stands"
    assert at.spooled() == []
    assert at.give("a", R0, 1) == "differs"
    at.give("b", R0, 4)
    assert at.missing(R0) == ["c"]
    at.give("c", R0, 8, weight=3)
    assert at.result(R0) == 7
    assert at.coordinator.outlook(at.collective(R0)).weights == {"a": 0, "b": 1, "c": 3}


def test_a_mean_without_any_weight_is_empty(desk: Make) -> None:
    at = desk("ab")
    at.tell("a", "start/model", 0)
    at.tell("b", "start/model", 0)
    assert at.collective("start/model").status == "empty"
    assert at.coordinator.newest(at.run, "model") is None


def test_damaged_uploads_change_nothing(desk: Make) -> None:
    at = desk()
    payload = b"".join(encode({"w": np.float32([1, 2])}))
    for arrives in (bytes(len(payload)), payload + b"x"):
        assert at.upload("a", R0, payload, arrives=arrives) is None
        assert at.spooled() == []
    assert at.coordinator.wait(at.run, R0, 0) is None


def test_an_upload_goes_on_where_it_broke(desk: Make) -> None:
    at = desk()
    payload = b"".join(encode({"w": np.float32([1, 2])}))
    offer = at.offer_of("a", R0, payload)
    assert at.coordinator.position(offer) == 0
    assert at.upload("a", R0, payload, arrives=payload[:20]) is None
    assert at.coordinator.position(offer) == 20
    assert at.upload("a", R0, payload, arrives=payload[20:], position=20) == "stands"


@pytest.mark.parametrize(
    ("verb", "payload", "sentence"),
    [
        ("mean", b"no payload", None),
        ("mean", {"w": np.float32([np.nan, 1])}, "'w'"),
        ("mean", {"w": np.float32([1])}, "differ in names, shapes or dtypes"),
        ("mean", {"v": np.float32([1, 2])}, "differ in names, shapes or dtypes"),
        ("mean", {"w": np.int64([1])}, "floating-point"),
        ("mean", {"w": np.float32(range(9))}, "differ in names, shapes or dtypes"),
        ("sum", {"value": np.float32([1, 2])}, "is a mean at the other sites, not a sum"),
        ("gather", b"[1]", "is a mean at the other sites, not a gather"),
    ],
)
def test_what_is_refused_leaves_nothing(desk: Make, verb: str, payload: object, sentence: str | None) -> None:
    at = desk("ab")
    at.give("a", R0, {"w": np.float32([1, 2])})
    there = at.spooled()
    content = payload if isinstance(payload, bytes) else b"".join(encode(payload))  # type: ignore[arg-type]
    with pytest.raises(RefusedError, match=sentence):
        at.upload("b", R0, content, verb=verb)  # type: ignore[arg-type]
    assert at.spooled() == there
    assert at.missing(R0) == ["b"]
    at.give("b", R0, {"w": np.float32([3, 4])})
    assert at.result(R0).tolist() == [2, 3]


def test_a_first_payload_has_its_share_of_the_spool(desk: Make) -> None:
    at = desk("ab")
    at.close()
    at.open(spool_quota=400)
    at.give("a", R0, {"w": np.zeros(20, np.float32)})
    with pytest.raises(RefusedError, match="more than its share"):
        at.give("a", "round-0000/other", {"w": np.zeros(100, np.float32)})


def test_a_later_payload_has_the_size_of_the_first_that_closed(desk: Make) -> None:
    at = desk("ab")
    round_of_all(at, 0, 1)
    with pytest.raises(RefusedError, match="those of the first round: they have 100 bytes instead of"):
        at.give("a", R1, {"w": np.float32(range(9))})


def test_gathered_values_and_sums(desk: Make) -> None:
    at = desk("ab")
    for site in "ba":
        at.upload(site, "round-0000/names", json.dumps(site).encode(), verb="gather")
        at.give(site, "round-0000/counts", {"value": np.int64([1, ord(site)])}, verb="sum")
    gathered, _ = at.collective("round-0000/names"), at.collective("round-0000/counts")
    assert json.loads(at.coordinator.result_file(gathered).read_bytes()) == {"a": "a", "b": "b"}
    with pytest.raises(RefusedError, match="no JSON"):
        at.upload("a", "round-0001/names", b"NaN", verb="gather")
    with pytest.raises(RefusedError, match="A sum takes one array"):
        at.give("a", "round-0001/counts", {"x": np.int64([1])}, verb="sum")


# ------------------------------------------------------------------------------------------- deadlines, quorum, absence


def test_before_the_deadline_all_are_waited_for(desk: Make) -> None:
    at = desk("abc", min_sites=1, deadline_minutes=10)
    at.give("a", R0, 1)
    at.clock.now += 599
    assert at.missing(R0) == ["b", "c"]
    outlook = at.coordinator.outlook(at.collective(R0))
    assert outlook.closes_at == pytest.approx(at.collective(R0).opened + 600)
    at.clock.now += 2
    assert at.result(R0) == 1
    assert at.coordinator.outlook(at.collective(R0))[1:] == ({}, None)


def test_below_the_quorum_a_deadline_fails_and_the_next_try_goes_on(desk: Make) -> None:
    at = desk("abc", min_sites=2, deadline_minutes=1)
    at.give("a", R0, 1)
    at.pass_deadline()
    failed = at.collective(R0)
    assert failed.status == "failed"
    assert "without b, c; it needs 2 of 3 sites" in str(failed.error)
    assert str(failed.error).endswith("with --c.")
    assert at.give("a", R0, 1) == "stands", "what was given stands"
    again = at.collective(R0)
    assert (again.status, again.error) == ("open", None)
    assert again.opened > failed.opened + 60, "with the whole time"
    at.give("b", R0, 3)
    at.pass_deadline()
    assert at.result(R0) == 2


def test_a_planning_closes_over_all_sites_only(desk: Make) -> None:
    at = desk("abc", "planning", min_sites=1, planning_deadline_minutes=1)
    for site in "ab":
        at.upload(site, "planning/dataset", b"1", verb="gather")
    at.pass_deadline()
    error = str(at.collective("planning/dataset").error)
    assert "without c; it needs 3 of 3 sites" in error
    assert error.endswith("(the same command).")
    at.upload("c", "planning/dataset", b"1", verb="gather")
    assert at.collective("planning/dataset").status == "closed"


def test_who_is_absent_is_not_waited_for_until_it_is_heard_of(desk: Make) -> None:
    at = desk("abc", min_sites=2)
    for site in "ab":
        at.give(site, R0, 1)
    at.pass_deadline()
    assert at.result(R0) == 1
    assert at.coordinator.status()["sites"]["c"]["standing"] == "absent"
    for site in "ab":
        at.give(site, R1, 2)
    assert at.result(R1) == 2, "at once"
    assert at.give("c", R0, 1) == at.give("c", R1, 1) == "closed"
    at.give("a", R2, 3)
    assert at.missing(R2) == ["b", "c"]
    assert at.events("c")[1:] == [f"absent from {R0}", "came back"]


def test_all_collectives_of_a_scope_are_over_the_same_sites(desk: Make) -> None:
    at = desk("abc", min_sites=2)
    for site in "ab":
        at.upload(site, "round-0000/x", b"1", verb="gather")
    at.pass_deadline()
    assert at.collective("round-0000/x").status == "closed"
    assert at.give("c", R0, 1) == "closed", "also of one that nobody has contributed to"
    assert at.coordinator.wait(at.run, R0, 0) is None
    at.give("a", R0, 1)
    assert at.missing(R0) == ["b"]


def test_a_site_that_comes_into_the_study_is_in_no_scope_that_is_under_way(desk: Make) -> None:
    at = desk("ab")
    for site in "ab":
        at.upload(site, "round-0000/x", b"1", verb="gather")
    at.close()
    at.open(sites="abc")
    at.join("c")
    at.give("a", R0, 1)
    assert at.missing(R0) == ["b"]
    at.give("b", R0, 1)
    at.give("a", R1, 1)
    assert at.missing(R1) == ["b", "c"]


def test_who_waits_is_answered_when_the_coordinator_drains(desk: Make) -> None:
    at = desk()
    at.give("a", R0, 1)
    at.coordinator.drain()
    collective = at.coordinator.wait(at.run, R0, 3600)
    assert collective is not None
    assert collective.status == "open"


# ----------------------------------------------------------------------------------------------------------- quarantine


def test_an_update_that_is_too_large_is_quarantined(desk: Make) -> None:
    at = desk("abc", min_sites=2, max_update_norm=2.0)
    for number, value in enumerate((0, 1, 2)):
        for site in "abc":
            at.give(site, f"round-000{number}/model", value)
    for site in "ab":
        at.give(site, "round-0003/model", 3)
    with pytest.raises(RefusedError, match=r"'c' for 'round-0003/model' is quarantined: its norm 8 is above 2 times 1"):
        at.give("c", "round-0003/model", 10)
    assert at.result("round-0003/model") == 3, "nobody waits for it"
    assert at.coordinator.status()["sites"]["c"]["standing"] == "absent"
    assert "is quarantined" in at.events("c")[-1]
    for site in "cab":
        at.give(site, "round-0004/model", 4)
    assert at.result("round-0004/model") == 4
    assert at.events("c")[-1] == "came back"
    (run,) = at.coordinator.status(record=True)["runs"].values()
    assert [given["norm"] for given in run["collectives"][-1]["sites"].values()] == [1, 1, 1]
    at.close()
    assert at.spooled() == []


# ------------------------------------------------------------------------------------------------------------- restarts


def test_a_restart_goes_on(desk: Make) -> None:
    at = desk()
    at.give("a", R0, 1)
    before = at.coordinator.status(record=True)
    at.close()
    at.open()
    after = at.coordinator.status(record=True)
    assert [after[what] for what in ("runs", "events", "attempt")] == [
        before[what] for what in ("runs", "events", "attempt")
    ]
    assert at.give("a", R0, 1) == "stands"
    at.give("b", R0, 3)
    assert at.result(R0) == 2


def test_another_study_is_refused_and_changes_nothing(desk: Make, tmp_path: Path) -> None:
    at = desk()
    at.close()
    store = Store(at.folder)
    with pytest.raises(ConfigurationError, match=r"belongs to another study.*\(rounds\)"):
        Coordinator(make_study(rounds=3), store)
    store.close()
    at.open(deadline_minutes=7)  # operational
    assert at.coordinator.status()["study"]["deadline_minutes"] == 7
    assert at.coordinator.attempt == 1


@pytest.mark.parametrize("damage", [b"", b"a part", None], ids=["empty", "partial", "missing"])
def test_a_result_that_was_lost_is_made_again(
    desk: Make, monkeypatch: pytest.MonkeyPatch, damage: bytes | None
) -> None:
    at = desk()
    monkeypatch.setattr(at.coordinator._round_closer, "_settle", lambda collective, save: None)
    at.give("a", R0, 1)
    at.give("b", R0, 4, weight=2)
    file = at.coordinator.result_file(at.collective(R0))
    whole = file.read_bytes()
    at.close()
    hurt(file, damage)
    at.open()
    assert file.read_bytes() == whole
    assert at.result(R0) == 3
    assert at.spooled() == []


@pytest.mark.parametrize("damage", [b"", b"a part", None], ids=["empty", "partial", "missing"])
@pytest.mark.parametrize("has_closed", [False, True])
def test_a_contribution_that_was_lost_is_withdrawn(
    desk: Make, monkeypatch: pytest.MonkeyPatch, damage: bytes | None, has_closed: bool
) -> None:
    at = desk()
    monkeypatch.setattr(at.coordinator._round_closer, "_settle", lambda collective, save: None)
    at.give("a", R0, 1)
    (lost,) = at.spooled()
    if has_closed:
        at.give("b", R0, 4)
        hurt(at.coordinator.result_file(at.collective(R0)), damage)
    at.close()
    hurt(lost, damage)
    at.open()
    again = at.collective(R0)
    assert (again.status, again.digest, again.closed) == ("open", None, None)
    assert "a" in at.missing(R0)
    assert "was lost when the coordinator's machine stopped" in at.events("a")[-1]
    for site, value in (("a", 7), ("b", 4)):
        assert at.give(site, R0, value) == "stands", "lost bytes need not come again: others may"
    assert at.result(R0) == 5.5


def hurt(file: Path, damage: bytes | None) -> None:
    file.unlink() if damage is None else file.write_bytes(damage)


# ----------------------------------------------------------------------------------------------------------- the facade


def test_whoever_serves_a_coordinator_calls_its_methods_only() -> None:
    known = {name for name, value in vars(Coordinator).items() if callable(value) and not name.startswith("_")}
    for path in (Path(__file__).parents[2] / "transport" / "coordinator").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                holder = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
                if holder in ("coordinator", "_coordinator"):
                    assert node.attr in known | {"study", "attempt"}, f"{path.name}: {ast.unparse(node)}"


# ------------------------------------------------------------------------------- clocks that are set, names that change


def round_of_all(at: Desk, number: int, value: float, sites: str = "ab") -> None:
    for site in sites:
        at.give(site, f"round-{number:04d}/model", value)


def test_a_clock_that_steps_back_changes_no_order(desk: Make) -> None:
    at = desk("ab", keep_rounds=2)
    for number in range(3):
        round_of_all(at, number, number)
    at.clock.stamp = -3600
    for number in range(3, 7):
        round_of_all(at, number, number)
        assert at.coordinator.newest(at.run, "model") == f"round-{number:04d}/model"
        assert at.result(f"round-{number:04d}/model") == number, "it is kept"
    at.close()
    at.open()
    assert at.coordinator.newest(at.run, "model") == "round-0006/model"
    (run,) = at.coordinator.status(record=True)["runs"].values()
    assert [c["key"] for c in run["collectives"]] == [f"round-{number:04d}/model" for number in range(7)]
    assert [c["status"] for c in run["collectives"]][-2:] == ["closed", "closed"]


def test_a_clock_that_is_set_forward_makes_nobody_absent(desk: Make) -> None:
    at = desk("ab", min_sites=1, deadline_minutes=10)
    at.give("a", R0, 1)
    at.clock.stamp = 24 * 3600
    assert at.missing(R0) == ["b"]
    outlook = at.coordinator.outlook(at.collective(R0))
    assert outlook.closes_at == pytest.approx(at.clock.time() + 600, abs=1), "as people's clocks have it now"
    at.give("b", R0, 3)
    assert at.result(R0) == 2


@pytest.mark.parametrize("stop", ["in order", "killed"])
def test_restarts_neither_renew_a_deadline_nor_use_it_up(desk: Make, stop: str) -> None:
    at = desk("ab", min_sites=1, deadline_minutes=10)
    at.give("a", R0, 1)
    for _ in range(5):
        at.clock.now += 100
        if stop == "killed":
            at.coordinator._round_closer._deadlines.note([at.collective(R0)])  # as it does every few seconds
            at.coordinator._round_closer._deadlines.note = lambda *_, **__: None  # type: ignore[method-assign]
        at.close()
        at.clock.now += 3600  # nobody could be heard
        at.open()
    assert at.missing(R0) == ["b"]
    at.clock.now += 99
    assert at.missing(R0) == ["b"]
    at.clock.now += 2
    assert at.result(R0) == 1


def test_a_process_that_was_stopped_counts_for_seconds_only() -> None:
    from nnunet_fed.coordinator.deadlines import RunningClock

    clock = RunningClock()
    clock._last -= 3600  # since when nothing of this process has run
    assert 0 < clock() <= RunningClock.LONGEST + 1


def test_a_name_that_is_added_makes_nobody_wait(desk: Make) -> None:
    """docs/operations.md: a site comes later. Until the first round has begun, all of the study are expected."""
    at = desk("ab")
    round_of_all(at, 0, 0)
    at.close()
    at.open(sites="abc")
    round_of_all(at, 1, 1)
    assert at.result("round-0001/model") == 1, "c has not joined"
    at.join("c")
    for site in "ab":
        at.give(site, R2, 2)
    assert at.missing(R2) == ["c"]
    at.give("c", R2, 5)
    assert at.result(R2) == 3


def test_before_the_first_round_all_names_are_waited_for(desk: Make) -> None:
    at = desk("ab")
    for site in "ab":
        at.give(site, "start/model", 1)
    at.close()
    at.open(sites="abc")
    round_of_all(at, 0, 0)
    assert at.missing(R0) == ["c"]


def test_a_name_that_is_removed_is_in_no_mean(desk: Make) -> None:
    """This is how consent is withdrawn: what is open is taken back, what has closed stands."""
    at = desk("abc")
    round_of_all(at, 0, 1, "abc")
    at.give("c", R1, 100)
    at.give("a", R1, 1)
    at.close()
    assert len(at.spooled()) == 2
    at.open(sites="ab")
    assert len(at.spooled()) == 1
    assert at.events("c")[-1] == "is not in the study any more: what it gave to round-0001/model is withdrawn"
    with pytest.raises(RefusedError, match="'c' is not in the study"):
        at.give("c", R1, 100)
    assert at.missing(R1) == ["b"]
    at.give("b", R1, 3)
    assert at.result(R1) == 2
    (run,) = at.coordinator.status(record=True)["runs"].values()
    assert set(run["collectives"][0]["sites"]) == {"a", "b", "c"}, "what has closed is told as it was"


def test_a_name_that_is_removed_in_the_middle_of_a_round(desk: Make) -> None:
    """Each collective of a scope in which it is frozen closes over the others."""
    at = desk("abc")
    for site in "abc":
        at.upload(site, "round-0000/before", b"1", verb="gather")
    assert at.collective("round-0000/before").status == "closed"
    at.give("a", R0, 1)
    at.close()
    at.open(sites="ab")
    assert at.missing(R0) == ["b"]
    at.give("b", R0, 3)
    assert at.result(R0) == 2


def test_nobody_waits_for_a_site_that_was_sent_away_in_the_middle_of_a_round(desk: Make) -> None:
    at = desk("abc", min_sites=2)
    for site in "abc":
        at.upload(site, "round-0000/before", b"1", verb="gather")
    at.coordinator._members.send_away(at.run, "c", "quarantined")
    at.give("a", R0, 1)
    assert at.missing(R0) == ["b"]
    at.give("b", R0, 3)
    assert at.result(R0) == 2


def test_what_has_closed_is_not_remembered(desk: Make) -> None:
    at = desk("ab")
    for number in range(3):
        round_of_all(at, number, number)
    closer = at.coordinator._round_closer
    closer._deadlines.note(closer._store.open_collectives())
    assert closer._deadlines._since == {}


def test_a_site_that_is_renamed_counts_once(desk: Make) -> None:
    at = desk("ab")
    round_of_all(at, 0, 0)
    at.give("b", R1, 7)
    at.close()
    at.open(sites="az")
    at.join("z")
    at.give("z", R1, 7)
    at.give("a", R1, 1)
    assert at.result(R1) == 4


# ------------------------------------------------------------------------------------------------ weights and numbers


@pytest.mark.parametrize("weight", [1e308, 1.7e308, 1e10, 1e-10, -1.0, float("inf"), float("nan")])
def test_weights_are_bounded(desk: Make, weight: float) -> None:
    at = desk("ab")
    with pytest.raises(RefusedError, match="weight of a site must be 0, or a number from 1e-09 to 1e"):
        at.give("a", R0, 1, weight)
    round_of_all(at, 0, 3)
    assert at.result(R0) == 3


def test_numbers_whose_mean_is_not_finite_close_nothing(desk: Make) -> None:
    at = desk("ab")
    for site in "ab":
        at.give(site, R0, {"w": np.array([1.7e308])}, 1e9)
    failed = at.collective(R0)
    assert failed.status == "failed"
    assert "'round-0000/model' cannot be closed. The mean of the sites' tensors is not finite" in str(failed.error)
    assert not list((at.folder / "results").iterdir())


def test_what_comes_while_a_mean_is_computed_is_told_that_it_is_late(
    desk: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = desk("ab", min_sites=1, deadline_minutes=1)
    at.give("a", R0, 1)
    computing, late = threading.Event(), threading.Event()
    reduce = round_closer.write_result

    def slow(*arguments: Any) -> Any:
        computing.set()
        late.wait(5)
        return reduce(*arguments)

    monkeypatch.setattr(round_closer, "write_result", slow)
    at.clock.now += 61
    closing = threading.Thread(target=lambda: at.collective(R0))
    closing.start()
    assert computing.wait(5)
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(at.give("b", R0, 100)))
    asking.start()
    late.set()
    closing.join(10)
    asking.join(10)
    assert answers == ["closed"]
    assert at.result(R0) == 1
    assert at.coordinator.outlook(at.collective(R0)).weights == {"a": 1.0}, "who is told to be in it is in it"
