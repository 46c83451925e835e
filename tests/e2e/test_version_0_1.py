"""Version 0.1 and this one: a study of the one goes on with the other, and both take part in one study."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import PATIENCE, PLANS, command, environment, run, until
from version_0_1 import CONFIGURATION, SITES, STUDIES, LeftBehind, old_python_environment
from warm import Forked

from nnunet_fed.simulation.simulate import free_ports, plugin_folder
from nnunet_fed.study.site import Site
from nnunet_fed.transport.site.client import GrpcCommunicator

pytestmark = pytest.mark.e2e

STUDY = """
name = "two versions"
sites = ["site_a", "site_b"]
planner = "nnUNetPlannerFedSmall"
rounds = 2
iterations_per_epoch = 2
val_iterations_per_epoch = 1
initial_lr = 0.05
momentum = 0.9
[method]
name = "fedavg"
"""
WHICH = """
import nnunet_fed, nnunet_fed.trainers
print(nnunet_fed.__file__, nnunet_fed.trainers.__file__)
"""


@contextmanager
def coordinator(study: Path, state: Path, variables: dict[str, str]) -> Iterator[tuple[str, GrpcCommunicator]]:
    """A coordinator process of the version that ``variables`` name: its address, and somebody who watches it."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    words = [sys.executable, "-m", "nnunet_fed", "coordinator", study, "--state", state, "--listen", address]
    log = study.with_name("coordinator.log")
    with log.open("ab") as file:
        process = subprocess.Popen(
            [*map(str, words), "--insecure"], env=variables, cwd=study.parent, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    watcher = GrpcCommunicator(Site(name="watcher", coordinator=address, insecure=True, connect_minutes=1))
    try:
        until(lambda: bool(watcher.status()), "the coordinator answers")
        yield address, watcher
    finally:
        watcher.close()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def site_file(folder: Path, site: str, address: str) -> Path:
    file = folder / "site.toml"
    file.write_text(f'name = "{site}"\ncoordinator = "{address}"\ninsecure = true\n')
    return file


def together(commands: dict[str, list[str]], variables: dict[str, dict[str, str]], folder: Path, log: str) -> None:
    """A command at each site, to their ends."""
    logs = {site: folder / f"{site}_{log}.log" for site in commands}
    processes = {site: Forked(commands[site], variables[site], str(logs[site])) for site in commands}
    for site, process in processes.items():
        assert process.wait(PATIENCE) == 0, logs[site].read_text()[-3000:]


def training(method: str, *options: str) -> list[str]:
    facts = STUDIES[method]
    words = [command("nnUNetv2_train"), "1", CONFIGURATION, str(facts["fold"]), "-tr", facts["trainer"], "-p", PLANS]
    return [*words, "-device", "cpu", *options]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.rglob("checkpoint_final.pth")
    loaded: dict[str, torch.Tensor] = torch.load(file, map_location="cpu", weights_only=False)["network_weights"]
    return loaded


def assert_same_model(folders: list[Path]) -> None:
    one, other = (weights(folder) for folder in folders)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_study_goes_on_by_the_commands(tmp_path: Path) -> None:
    left = LeftBehind("fedavg", tmp_path / "study")
    with coordinator(left.study_file, left.state, environment()) as (address, watcher):
        variables = {
            site: environment(
                **left.paths(site), nnUNet_fed_site=site_file(left.site(site), site, address),
                nnUNet_extTrainer=plugin_folder(), nnUNet_fed_skip_validation=1,
            )
            for site in SITES
        }  # fmt: skip
        together(dict.fromkeys(SITES, training("fedavg", "--c")), variables, tmp_path, "train")
        record = watcher.status(record=True)
    assert list(record["runs"]) == STUDIES["fedavg"]["runs"]
    assert_same_model([left.site(site) for site in SITES])

    stock = {name: value for name, value in variables["site_a"].items() if not name.startswith("nnUNet_ext")}
    words = [command("nnUNetv2_predict"), "-i", left.images, "-o", tmp_path / "out", "-d", "1", "-c", CONFIGURATION]
    words += ["-f", "0", "-tr", STUDIES["fedavg"]["trainer"], "-p", PLANS, "-device", "cpu", "--disable_tta"]
    run(words, stock, tmp_path / "predict.log")
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")]


@pytest.mark.parametrize("old_coordinator", [True, False], ids=["old_coordinator", "new_coordinator"])
def test_both_versions_in_one_study(phantom: Path, tmp_path: Path, old_coordinator: bool) -> None:
    """One site of each, from planning on."""
    installed = tmp_path / "installed"
    settings = old_python_environment(installed, environment()) if old_coordinator else environment()
    (tmp_path / "federation.toml").write_text(STUDY)
    with coordinator(tmp_path / "federation.toml", tmp_path / "state", settings) as (address, watcher):
        variables = {site: _at(site, phantom, tmp_path, address) for site in SITES}
        variables["site_a"] = old_python_environment(installed, variables["site_a"])
        which(tmp_path, variables, installed)
        # not the installed command, which is this version's
        (tmp_path / "main.py").write_text('import runpy\nrunpy.run_module("nnunet_fed", run_name="__main__")\n')
        plan = [str(tmp_path / "main.py"), "plan_and_preprocess", "-d", "1", "-np", "1"]
        together(dict.fromkeys(SITES, plan), variables, tmp_path, "plan")
        together(dict.fromkeys(SITES, training("fedavg")), variables, tmp_path, "train")
        record = watcher.status(record=True)
    assert_same_model([tmp_path / site for site in SITES])
    (trained,) = (run for run in record["runs"].values() if run["purpose"] == "training")
    models = [c for c in trained["collectives"] if c["key"].startswith("round-")]
    assert [c["key"] for c in models] == ["round-0000/model", "round-0001/model"]
    assert all(c["sites"].keys() == set(SITES) and c["status"] != "open" for c in models)


CORRECTING = """
import sys
from pathlib import Path
from nnunet_fed.errors import FederationError
_, address, site, value, *corrects = sys.argv
settings = {"name": site, "coordinator": address, "insecure": True}
try:
    from nnunet_fed.federation import Site
    from nnunet_fed.transport.client import GrpcCommunicator
except ImportError:
    from nnunet_fed.study.site import Site
    from nnunet_fed.transport.site.client import GrpcCommunicator
seat = GrpcCommunicator(Site.model_validate(settings), **({"corrects": True} if corrects else {}))
seat.join("planning")
try:
    print(seat.gather("planning/dataset", value))
except FederationError as error:
    print(type(error).__name__, error)
"""
"""What a site tells while planning, by the communicator of its version."""


@pytest.mark.parametrize("old_coordinator", [True, False], ids=["old_coordinator", "new_coordinator"])
def test_a_site_corrects_what_it_told_among_both_versions(tmp_path: Path, old_coordinator: bool) -> None:
    """The first site has version 0.1: it is told to plan again, since it cannot do so by itself."""
    installed, script = tmp_path / "installed", tmp_path / "tell.py"
    old, new = old_python_environment(installed, environment()), environment()
    script.write_text(CORRECTING)
    (tmp_path / "federation.toml").write_text(STUDY)
    with coordinator(tmp_path / "federation.toml", tmp_path / "state", old if old_coordinator else new) as (
        at,
        watcher,
    ):

        def start(site: str, *words: str) -> tuple[subprocess.Popen[bytes], Path]:
            log = tmp_path / f"{site}-{'-'.join(words)}.log"
            with log.open("wb") as file:
                process = subprocess.Popen(
                    [sys.executable, script, at, site, *words], env=old if site == "site_a" else new, cwd=tmp_path,
                    stdout=file, stderr=subprocess.STDOUT,
                )  # fmt: skip
            return process, log

        def missing() -> list[str]:
            return next((c["missing"] for c in watcher.status()["open"]), [])

        def told(process: subprocess.Popen[bytes], log: Path) -> str:
            process.wait(PATIENCE)
            return log.read_text()

        wrong = start("site_b", "wrong")
        until(lambda: missing() == ["site_a"], "b has told")
        wrong[0].kill()
        wrong[0].wait()
        if old_coordinator:
            text = told(*start("site_b", "right", "--correct"))
            assert "open a new attempt (nnunet_fed new-attempt STATE)" in text
            assert "does not know --correct" in text
            return
        assert "with --correct" in told(*start("site_b", "right"))
        a = start("site_a", "right")
        assert "'site_b': 'wrong'" in told(*a)
        b = start("site_b", "right", "--correct")
        assert "WithdrawnError Site 'site_b' has withdrawn" in told(*b)
        a, b = (
            start(
                "site_a",
                "right",
            ),
            start("site_b", "right", "--correct"),
        )
        assert told(*a) == told(*b) == "{'site_a': 'right', 'site_b': 'right'}\n"


def _at(site: str, phantom: Path, folder: Path, address: str) -> dict[str, str]:
    here = folder / site
    paths: dict[str, Any] = {f"nnUNet_{what}": here / what for what in ("raw", "preprocessed", "results")}
    for path in paths.values():
        path.mkdir(parents=True)
    (here / "raw" / "Dataset001_Demo").symlink_to(phantom / site)
    extra = {"nnUNet_fed_site": site_file(here, site, address), "nnUNet_extTrainer": plugin_folder()}
    return environment(**paths, **extra, nnUNet_fed_skip_validation=1, COLUMNS=200)


def which(folder: Path, variables: dict[str, dict[str, str]], installed: Path) -> None:
    """See that the first site has version 0.1, and the second this one."""
    script = folder / "which.py"
    script.write_text(WHICH)
    together({site: [str(script)] for site in SITES}, variables, folder, "which")
    old, new = ((folder / f"{site}_which.log").read_text().split() for site in SITES)
    assert all(path.startswith(str(installed)) for path in old)
    assert not any(path.startswith(str(installed)) for path in new)
