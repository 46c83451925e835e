"""Planning by real processes: a site that is killed and comes back, one that joins later, and one that corrects."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import PATIENCE, PLANS, command, environment, until
from warm import EXTRACTION_TAKES, Forked

from nnunet_fed.study.federation import Federation
from nnunet_fed.study.site import Site
from nnunet_fed.study.toml import to_toml
from nnunet_fed.transport.site.client import GrpcCommunicator

pytestmark = pytest.mark.e2e

PLANNER = "nnUNetPlannerFedSmall"


class PlanningFederation:
    """A coordinator process, and sites that plan in processes of their own."""

    def __init__(self, folder: Path, data: dict[str, Path]):
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self._running: list[Forked] = []
        for name, raw in data.items():
            for part in ("raw", "preprocessed", "results"):
                (folder / name / part).mkdir(parents=True)
            (folder / name / "raw" / "Dataset001_Demo").symlink_to(raw)
            (folder / name / "site.toml").write_text(
                f'name = "{name}"\ncoordinator = "{self.address}"\ninsecure = true\n'
            )
        watcher = Site(name="watcher", coordinator=self.address, insecure=True, connect_minutes=1)
        self._watcher = GrpcCommunicator(watcher)

    def serve(self, *sites: str) -> Forked:
        settings = {"name": "e2e", "sites": sites, "method": {"name": "fedavg"}, "rounds": 1, "planner": PLANNER}
        study = Federation.model_validate(settings)
        (self.folder / "federation.toml").write_text(to_toml(study.model_dump(mode="json")))
        address = ["--listen", self.address, "--state", str(self.folder / "state"), "--insecure"]
        words = [sys.executable, "-m", "nnunet_fed", "coordinator", str(self.folder / "federation.toml"), *address]
        process = Forked(words, environment(), self.folder / "coordinator.log")
        self._running.append(process)
        until(lambda: tuple(self.status()["study"]["sites"]) == sites, "the coordinator answers")
        return process

    def plan(self, site: str, *options: str, **more: object) -> Forked:
        here = self.folder / site
        paths = {f"nnUNet_{part}": here / part for part in ("raw", "preprocessed", "results")}
        variables = environment(**paths, nnUNet_fed_site=here / "site.toml", COLUMNS=200, **more)
        words = [command("nnunet_fed"), "plan_and_preprocess", "-d", "1", "-np", "1", *options]
        process = Forked(words, variables, self.log(site))
        self._running.append(process)
        return process

    def finish(self, site: str, process: Forked) -> str:
        assert process.wait(PATIENCE) == 0, self.log(site).read_text()[-3000:]
        return self.log(site).read_text()

    def log(self, site: str) -> Path:
        return self.folder / site / "plan.log"

    def read(self, site: str, name: str) -> Any:
        return json.loads((self.folder / site / "preprocessed" / "Dataset001_Demo" / name).read_text())

    def sent(self, site: str) -> list[dict[str, Any]]:
        file = self.folder / site / "preprocessed" / "Dataset001_Demo" / "outgoing.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]

    def status(self) -> dict[str, Any]:
        return self._watcher.status(record=True)

    def kill(self, process: Forked, number: signal.Signals = signal.SIGKILL) -> None:
        os.killpg(process.pid, number)
        process.wait(PATIENCE)

    def stop(self) -> None:
        self._watcher.close()
        for process in self._running:
            if process.poll() is None:
                self.kill(process)


@pytest.fixture(scope="module")
def running(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlanningFederation]:
    data = {"site_a": phantom / "site_a", "site_b": phantom / "site_b", "site_c": phantom / "site_a"}
    running = PlanningFederation(tmp_path_factory.mktemp("planning"), data)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def planned_by_two(running: PlanningFederation) -> PlanningFederation:
    """The sites a and b have planned, though b was killed while it extracted its fingerprint."""
    coordinator = running.serve("site_a", "site_b")
    a, b = running.plan("site_a"), running.plan("site_b", **{EXTRACTION_TAKES: PATIENCE})
    until(lambda: phase(running, "site_b") == "extracting", "b extracts")
    running.kill(b)
    until(lambda: "waiting for site_b (extracting) in 'planning/" in running.log("site_a").read_text(), "a waits")
    assert a.poll() is None
    running.finish("site_b", running.plan("site_b"))
    running.finish("site_a", a)
    running.kill(coordinator, signal.SIGTERM)
    return running


def phase(running: PlanningFederation, site: str) -> str | None:
    progress = running.status()["sites"][site]["progress"]
    return progress and str(progress["phase"])


def test_a_site_that_dies_while_planning_comes_back(planned_by_two: PlanningFederation) -> None:
    plans = {site: planned_by_two.read(site, f"{PLANS}.json")["federation"] for site in ("site_a", "site_b")}
    assert plans["site_a"]["plans_digest"] == plans["site_b"]["plans_digest"]
    sent = planned_by_two.sent("site_b")
    assert [entry["what"] for entry in sent].count("join") == 2
    assert [entry["key"] for entry in sent if entry["what"] == "upload"].count("planning/dataset") == 1
    table = planned_by_two.log("site_a").read_text()
    assert "this site alone" in table
    assert "3d_fullres: patch size" in table


def test_a_site_joins_when_the_others_have_planned(planned_by_two: PlanningFederation) -> None:
    running = planned_by_two
    running.serve("site_a", "site_b", "site_c")
    dry = running.finish("site_c", running.plan("site_c", "--dry-run"))
    assert '"key": "planning/moments/sum"' in dry
    assert not list((running.folder / "site_c" / "preprocessed").iterdir())
    assert running.status()["sites"]["site_c"]["last_seen"] is None

    assert "as the federation published them" in running.finish("site_c", running.plan("site_c", "--join"))
    plans = running.read("site_c", f"{PLANS}.json")
    assert plans["federation"]["joined"]
    assert plans["federation"]["plans_digest"] == running.read("site_a", f"{PLANS}.json")["federation"]["plans_digest"]
    assert not [entry for entry in running.sent("site_c") if entry["what"] in ("offer", "upload")]
    texts = [event["text"] for event in running.status()["events"] if event["site"] == "site_c"]
    assert texts[-1] == "joined after planning, with 5 cases: the plans are those of site_a, site_b"


def test_a_site_corrects_what_it_told_and_all_processes_are_killed(
    phantom: Path, tmp_path: Path, planned_by_two: PlanningFederation
) -> None:
    """Site b lacks a case at first. The others go on by themselves, and plan as if it had told that right at once."""
    mistaken = tmp_path / "mistaken"
    shutil.copytree(phantom / "site_b", mistaken)
    description = json.loads((mistaken / "dataset.json").read_text())
    case = next((mistaken / "labelsTr").iterdir()).name.removesuffix(description["file_ending"])
    for file in (*mistaken.glob(f"imagesTr/{case}_*"), *mistaken.glob(f"labelsTr/{case}.*")):
        file.unlink()
    fewer = {**description, "numTraining": description["numTraining"] - 1}
    (mistaken / "dataset.json").write_text(json.dumps(fewer))
    running = PlanningFederation(tmp_path / "planning", {"site_a": phantom / "site_a", "site_b": mistaken})
    try:
        coordinator = running.serve("site_a", "site_b")
        a, b = running.plan("site_a"), running.plan("site_b", **{EXTRACTION_TAKES: PATIENCE})
        until(lambda: phase(running, "site_b") == "extracting", "b extracts")
        until(lambda: "waiting for site_b (extracting) in 'planning/" in running.log("site_a").read_text(), "a waits")
        running.kill(coordinator)
        running.kill(b)
        link = running.folder / "site_b" / "raw" / "Dataset001_Demo"
        link.unlink()
        link.symlink_to(phantom / "site_b")

        coordinator = running.serve("site_a", "site_b")
        b = running.plan("site_b")
        assert b.wait(PATIENCE) == 2
        assert "with --correct, and all sites plan anew" in running.log("site_b").read_text()
        b = running.plan("site_b", "--correct", **{EXTRACTION_TAKES: PATIENCE})
        until(lambda: bool(running.status()["undone"]), "b withdraws")
        running.kill(coordinator)
        running.kill(b)
        coordinator = running.serve("site_a", "site_b")
        b = running.plan("site_b", "--correct")
        running.finish("site_b", b)
        assert "Site 'site_b' has withdrawn what it told while planning" in running.finish("site_a", a)
        record = running.status()
    finally:
        running.stop()
    assert sum("withdrew" in event["text"] for event in record["events"]) == 1, "the same again withdraws nothing"
    assert record["failed"] == record["open"] == []
    as_ever = planned_by_two.read("site_a", f"{PLANS}.json")["federation"]
    for site in ("site_a", "site_b"):
        assert running.read(site, f"{PLANS}.json")["federation"]["plans_digest"] == as_ever["plans_digest"]
        assert running.read(site, "dataset_fingerprint.json") == planned_by_two.read(site, "dataset_fingerprint.json")
