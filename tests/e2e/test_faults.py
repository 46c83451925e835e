"""Processes that are killed and links that break: every exchange ends with the bits of the undisturbed one."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import REPETITIONS, Exchange, Link, exchange, small_disks_can_be_mounted
from harness import until

from nnunet_fed.exchange.uploads import Upload
from nnunet_fed.study.site import Site
from nnunet_fed.transport.site.client import GrpcCommunicator

pytestmark = pytest.mark.e2e

LARGE = 4_000_000
"""Parameters: 16 MB, long enough for an upload to be interrupted."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[str]]:
    """What sites a and b print if nothing happens, by the number of parameters."""
    printed = {}
    for size in (100_000, LARGE):
        with exchange(tmp_path_factory.mktemp("undisturbed") / "run", size=size) as running:
            running.start("a")
            running.start("b")
            results = running.finish()
            assert results["a"] == results["b"]
            assert len(results["a"]) == 3
            printed[size] = results["a"]
    return printed


def spooled(running: Exchange) -> int:
    return sum(path.stat().st_size for path in (running.folder / "state" / "spool").glob("*"))


def uploading(running: Exchange, least: int = 1 << 20, site: str = "") -> bool:
    of_site = f"*.{Upload('', '', site, '', 0).contribution.split('.')[2]}.*.part" if site else "*.part"
    return any(path.stat().st_size > least for path in (running.folder / "state" / "spool").glob(of_site))


@pytest.mark.parametrize("repetition", range(REPETITIONS))
def test_a_coordinator_killed_at_random_instants(
    undisturbed: dict[int, list[str]], tmp_path: Path, repetition: int
) -> None:
    chance = random.Random(repetition)
    with exchange(tmp_path / "run", size=LARGE) as running:
        running.start("a")
        running.start("b")
        until(lambda: spooled(running) > 0, "the first upload has begun")
        for _ in range(4):
            time.sleep(chance.uniform(0.0, 0.6))
            running.kill(running.coordinator)
            running.serve()
        results = running.finish()
    assert results == {"a": undisturbed[LARGE], "b": undisturbed[LARGE]}


def test_a_coordinator_killed_at_chosen_instants(undisturbed: dict[int, list[str]], tmp_path: Path) -> None:
    with exchange(tmp_path / "run", size=LARGE) as running:
        state = running.folder / "state"

        def kill_once(happened: Callable[[], bool]) -> None:
            end = time.monotonic() + 60
            while not happened() and time.monotonic() < end:
                time.sleep(0.001)
            running.kill(running.coordinator)
            running.serve()

        running.start("a")
        kill_once(lambda: spooled(running) > 0)  # accepted, and not reduced: b is not there yet
        assert running.uploads("a") != []
        running.start("b")
        kill_once(lambda: uploading(running))
        kill_once(lambda: any((state / "results").glob("*.part")))  # reducing
        kill_once(lambda: any(path.stat().st_size > LARGE for path in (state / "results").glob("*model*")))  # closed
        results = running.finish()
        assert not list((state / "results").glob("*.part"))
    assert results == {"a": undisturbed[LARGE], "b": undisturbed[LARGE]}


def test_an_upload_survives_the_coordinator_and_is_not_begun_again(
    undisturbed: dict[int, list[str]], tmp_path: Path
) -> None:
    with exchange(tmp_path / "run", size=LARGE) as running:
        link = Link(running.address, delay=0.02)
        running.start("a", link.address)
        running.start("b")
        until(lambda: uploading(running, 4 << 20, "a"), "a part has arrived")
        running.kill(running.coordinator)
        running.serve()
        results = running.finish()
        link.stop()
        resumed = [entry["from_byte"] for entry in running.uploads("a") if "from_byte" in entry]
    assert results == {"a": undisturbed[LARGE], "b": undisturbed[LARGE]}
    assert resumed
    assert max(resumed) >= 4 << 20


@pytest.mark.parametrize("repetition", range(REPETITIONS))
def test_a_site_killed_in_its_upload(undisturbed: dict[int, list[str]], tmp_path: Path, repetition: int) -> None:
    with exchange(tmp_path / "run", size=LARGE) as running:
        link = Link(running.address, seed=repetition, delay=0.01)
        running.start("a", link.address)
        running.start("b")
        until(lambda: uploading(running), "an upload is under way")
        time.sleep(random.Random(repetition).uniform(0, 0.5))
        running.kill(running.sites["a"])
        running.start("a")
        results = running.finish()
        link.stop()
    assert results == {"a": undisturbed[LARGE], "b": undisturbed[LARGE]}


@pytest.mark.parametrize("repetition", range(REPETITIONS))
def test_connections_cut_at_random_bytes(undisturbed: dict[int, list[str]], tmp_path: Path, repetition: int) -> None:
    with exchange(tmp_path / "run", size=LARGE) as running:
        links = [Link(running.address, seed=2 * repetition + n, cut_after=8 << 20, delay=0.001) for n in range(2)]
        for name, link in zip("ab", links, strict=True):
            running.start(name, link.address)
        results = running.finish()
        for link in links:
            link.stop()
    assert results == {"a": undisturbed[LARGE], "b": undisturbed[LARGE]}
    assert sum(link.cuts for link in links) > 2
    needed = 2 * 3 * 4 * LARGE
    assert all(link.passed < 2 * needed for link in links), "what has arrived is not sent again"


def test_a_link_that_swallows_everything_is_given_up(undisturbed: dict[int, list[str]], tmp_path: Path) -> None:
    with exchange(tmp_path / "run", size=LARGE) as running:
        link = Link(running.address, delay=0.005)
        running.start("a", link.address, keepalive=5)
        running.start("b")
        until(lambda: uploading(running), "an upload is under way")
        link.blackhole()
        started = time.monotonic()
        results = running.finish(seconds=60)
        link.stop()
    assert results == {"a": undisturbed[LARGE], "b": undisturbed[LARGE]}
    assert time.monotonic() - started < 55


def test_a_site_gone_for_good(tmp_path: Path) -> None:
    with exchange(tmp_path / "run", "abc", min_sites=2, deadline_minutes=0.2) as running:
        for name in "ab":
            running.start(name)
        running.start("c", stop_after=0)
        results = running.finish()
        watcher = GrpcCommunicator(Site(name="watcher", coordinator=running.address, insecure=True))
        status = watcher.status(record=True)
        watcher.close()
    assert results["a"] == results["b"]
    assert len(results["a"]) == 3
    assert results["c"] == results["a"][:1]
    assert [event["text"] for event in status["events"] if event["site"] == "c"] == [
        "joined with --c",
        "absent from round-0001/before",
    ]
    (run,) = status["runs"].values()
    took_part = {c["key"]: list(c["sites"]) for c in run["collectives"]}
    assert took_part["round-0000/model"] == ["a", "b", "c"]
    assert took_part["round-0001/model"] == took_part["round-0002/model"] == ["a", "b"]


def test_a_spool_without_room_stops_nobody_for_good(undisturbed: dict[int, list[str]], tmp_path: Path) -> None:
    options = ("--spool-quota-gb", "0.05")
    with exchange(tmp_path / "run", size=LARGE, options=options) as running:
        spool = running.folder / "state" / "spool"
        until(spool.exists, "the coordinator runs")
        until((running.folder / "state" / "journal.sqlite").exists, "the coordinator has a journal")
        time.sleep(1)  # what lies there at its start is swept
        (spool / "ballast").write_bytes(bytes(45_000_000))
        running.start("a")
        running.start("b")
        told = "it would pass its quota of 0.05 GB (--spool-quota-gb)"
        for name in "ab":
            log = running.folder / f"{name}.log"
            until(lambda log=log: told in log.read_text(), f"{name} is told")  # type: ignore[misc]
        assert told in (running.folder / "coordinator.log").read_text()
        (spool / "ballast").unlink()
        results = running.finish()
    assert results == {"a": undisturbed[LARGE], "b": undisturbed[LARGE]}


@pytest.mark.parametrize("lacking", ["journal", "upload", "result"])
def test_a_full_disk_stops_nobody_for_good(undisturbed: dict[int, list[str]], tmp_path: Path, lacking: str) -> None:
    if not small_disks_can_be_mounted(tmp_path / "probe"):
        pytest.skip("this machine does not let its users mount a small disk (unshare --map-root-user --mount)")
    room = {"journal": 0, "upload": 10_000_000, "result": 40_000_000}[lacking]
    with exchange(tmp_path / "run", size=LARGE, disk_mb=200) as running:
        until(lambda: os.path.ismount(running.state) and (running.state / "spool").exists(), "the coordinator runs")
        until(lambda: "listening" in (running.folder / "coordinator.log").read_text(), "the coordinator listens")
        free = os.statvfs(running.state)
        (running.state / "ballast").write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - room)))
        running.start("a")
        running.start("b")
        told = "The coordinator's disk is full"
        until(
            lambda: any(told in (running.folder / f"{name}.log").read_text() for name in "ab"), "a site is told of it"
        )
        assert running.coordinator is not None
        assert running.coordinator.poll() is None
        log = (running.folder / "coordinator.log").read_text()
        assert re.search(f"refused.*: {told}", log)
        assert "Traceback" not in log
        (running.state / "ballast").unlink()
        results = running.finish()
    assert results == {"a": undisturbed[LARGE], "b": undisturbed[LARGE]}


def test_a_coordinator_drains_on_sigterm(undisturbed: dict[int, list[str]], tmp_path: Path) -> None:
    with exchange(tmp_path / "run") as running:
        running.start("a")
        until(lambda: running.uploads("a") != [], "a waits for b")
        time.sleep(0.5)
        assert running.coordinator is not None
        running.coordinator.send_signal(signal.SIGTERM)
        assert running.coordinator.wait(15) == 0
        log = (running.folder / "coordinator.log").read_text()
        assert "Traceback" not in log
        running.serve()
        running.start("b")
        results = running.finish()
    assert results == {"a": undisturbed[100_000], "b": undisturbed[100_000]}


def test_sites_do_not_say_more_than_they_must(tmp_path: Path) -> None:
    """A contribution that stands is not sent again by a site that starts from the first round once more."""
    with exchange(tmp_path / "run") as running:
        for name in "ab":
            running.start(name)
        first = running.finish()
        before = len(running.uploads("a"))
        running.start("a")
        assert running.finish("a")["a"] == first["a"]
        assert len(running.uploads("a")) == before == 6
        assert json.loads(running.outgoing("a").read_text().splitlines()[-1])["what"] == "leave"
