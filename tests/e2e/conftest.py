from __future__ import annotations

import sys
from pathlib import Path

import pytest
from filelock import FileLock
from harness import Planned, RunningFederation, Trained, environment, federation, run, train_all, trained_once

from nnunet_fed.datasets.phantom import write_phantom
from nnunet_fed.study.federation import Federation

LONGEST_FIRST = (
    "campaign", "faults", "training", "readme", "fedoap_training", "gcml_training", "fedsm_training", "folds",
    "fedgs_training", "selftest", "tutorial", "compare", "version_0_1", "cascade", "planning_processes",
    "simulation", "refusals",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two processes take file by file: the longest first, so that neither waits long for the other at the end."""

    def place(item: pytest.Item) -> int:
        name = item.path.stem.removeprefix("test_")
        return LONGEST_FIRST.index(name) if name in LONGEST_FIRST else -1

    items.sort(key=place)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all of pytest's processes have."""
    own = tmp_path_factory.getbasetemp()
    return own if worker_id == "master" else own.parent


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw data of two sites and a test set, in few voxels."""
    folder = tmp_path_factory.mktemp("data") / "phantom"
    write_phantom(folder, sites=2, cases=5, test_cases=2, coarse=2.0)
    return folder


@pytest.fixture(scope="session")
def planned(phantom: Path, shared: Path) -> Planned:
    """The two sites, planned and preprocessed together by the real commands."""
    out = shared / "planned"
    sites = [argument for site in ("site_a", "site_b") for argument in ("--site", f"{site}={phantom / site}")]
    with FileLock(shared / "planned.lock"):
        if not (out / "summary.json").is_file():
            run(
                [sys.executable, "-m", "nnunet_fed", "simulate", *sites, "--out", out, "--until", "plan",
                 "--rounds", "3", "--iterations", "4", "--val-iterations", "1", "--lr", "0.05", "--momentum", "0.9"],
                environment(), shared / "planned.log",
            )  # fmt: skip
    return Planned(out, Federation.read(out / "federation.toml"))


def averaged(planned: Planned, folder: Path, *sites: str) -> RunningFederation:
    """Three rounds of federated averaging in which nothing happens."""
    with federation(planned, folder, {site: site for site in sites}) as running:
        train_all(running)
    return running


@pytest.fixture(scope="session")
def undisturbed(planned: Planned, shared: Path) -> Trained:
    """Two sites, three rounds of federated averaging, nothing happens."""
    return trained_once(shared / "undisturbed", lambda folder: averaged(planned, folder, "site_a", "site_b"))


@pytest.fixture(scope="session")
def alone(planned: Planned, shared: Path) -> Trained:
    """The same with one site."""
    return trained_once(shared / "alone", lambda folder: averaged(planned, folder, "site_a"))
