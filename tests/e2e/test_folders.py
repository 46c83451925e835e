"""Disks that fill while a site plans and trains, and folders of another user: a sentence, and the same command goes on.

The disks are small ones of a mount namespace, in which one shell goes through a whole story.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import small_disks_can_be_mounted
from harness import PLANS, command, environment, until
from other_users import bound_to_permissions
from planning_sites import write_dataset
from warm import Forked

from nnunet_fed.simulation.simulate import free_ports, plugin_folder
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.site import Site
from nnunet_fed.study.toml import to_toml
from nnunet_fed.transport.site.client import GrpcCommunicator

pytestmark = pytest.mark.e2e

STORY = """
mount -t tmpfs -o size=8m tmpfs preprocessed && mount -t tmpfs -o size=24m tmpfs results || exit 1
fill() { head -c $2 /dev/zero > $1/ballast; }
fill preprocessed 7900000
"$NNUNET_FED" plan_and_preprocess -d 1 -np 1 > plan_full.log 2>&1; echo $? > plan_full
ls preprocessed/Dataset001_Test > planned_half
rm preprocessed/ballast
"$NNUNET_FED" plan_and_preprocess -d 1 -np 1 > plan.log 2>&1; echo $? > plan
fill results 24700000
$TRAIN > train_full.log 2>&1; echo $? > train_full
find results -name "*.pth*" > trained_half
rm results/ballast
$TRAIN --c > train.log 2>&1; echo $? > train
find results -name "*.pth" > trained
"""


class OneSite:
    """A coordinator, and a site alone."""

    def __init__(self, folder: Path):
        self.folder = folder
        write_dataset(folder / "raw", 1, range(5), channels=("MRI",), shape=(24, 32, 32))
        for name in ("preprocessed", "results"):
            (folder / name).mkdir()
        (port,) = free_ports(1)
        address = f"127.0.0.1:{port}"
        settings = {
            "name": "e2e", "sites": ["a"], "method": {"name": "fedavg"}, "rounds": 2, "iterations_per_epoch": 2,
            "val_iterations_per_epoch": 1, "planner": "nnUNetPlannerFedSmall",
        }  # fmt: skip
        (folder / "federation.toml").write_text(to_toml(Federation.model_validate(settings).model_dump(mode="json")))
        (folder / "site.toml").write_text(f'name = "a"\ncoordinator = "{address}"\ninsecure = true\n')
        words = [sys.executable, "-m", "nnunet_fed", "coordinator", str(folder / "federation.toml")]
        words += ["--listen", address, "--state", str(folder / "state"), "--insecure"]
        self.coordinator = Forked(words, environment(), folder / "coordinator.log")
        watcher = GrpcCommunicator(Site(name="watcher", coordinator=address, insecure=True, connect_minutes=1))
        until(lambda: bool(watcher.status()), "the coordinator answers")
        watcher.close()
        self.train = [command("nnUNetv2_train"), "1", "3d_fullres", "0", "-tr", "nnUNetTrainerFedAvg", "-p", PLANS]
        self.train += ["-device", "cpu"]
        paths = {f"nnUNet_{name}": folder / name for name in ("raw", "preprocessed", "results")}
        self.environment = environment(
            **paths, nnUNet_fed_site=folder / "site.toml", nnUNet_extTrainer=plugin_folder(), COLUMNS=200,
            nnUNet_fed_skip_validation=1, NNUNET_FED=command("nnunet_fed"), TRAIN=" ".join(self.train),
        )  # fmt: skip

    def run(self, *words: str) -> tuple[int, str]:
        """Exit status, and all that a command says whom permissions bind."""
        done = subprocess.run(bound_to_permissions(*words), env=self.environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def read(self, name: str) -> str:
        return (self.folder / name).read_text()


@pytest.fixture
def one(tmp_path: Path) -> Iterator[OneSite]:
    site = OneSite(tmp_path / "one")
    yield site
    site.coordinator.kill()
    site.coordinator.wait()


def sentence_of(log: str) -> str:
    assert "Traceback" not in log, log[-3000:]
    return log.rstrip().splitlines()[-1]


def test_disks_that_fill(one: OneSite, tmp_path: Path) -> None:
    if not small_disks_can_be_mounted(tmp_path / "probe"):
        pytest.skip("this machine does not let its users mount a small disk (unshare --map-root-user --mount)")
    story = ["unshare", "--map-root-user", "--mount", "sh", "-c", STORY]
    subprocess.run(story, cwd=one.folder, env=one.environment, check=True)

    assert one.read("plan_full").strip() == "75", one.read("plan_full.log")
    assert "Error: There is no room for" in sentence_of(one.read("plan_full.log"))
    assert "nnUNetFed_3d_fullres" not in one.read("planned_half"), "half of the cases would look whole"
    assert one.read("plan").strip() == "0", one.read("plan.log")[-3000:]

    assert one.read("train_full").strip() == "1", one.read("train_full.log")
    assert "Error: There is no room for" in sentence_of(one.read("train_full.log"))
    assert one.read("trained_half") == "", "no half of a checkpoint is left"
    assert one.read("train").strip() == "0", one.read("train.log")[-3000:]
    assert "fold_0/checkpoint_final.pth" in one.read("trained")


def test_folders_of_another_user(one: OneSite) -> None:
    plan = [command("nnunet_fed"), "plan_and_preprocess", "-d", "1", "-np", "1"]
    image = one.folder / "raw" / "Dataset001_Test" / "imagesTr" / "case_002_0000.nii.gz"
    image.chmod(0)
    status, said = one.run(*plan)
    assert (status, "case_002" in said, "Traceback" in said) == (2, True, False), said
    image.chmod(0o644)
    preprocessed = one.folder / "preprocessed" / "Dataset001_Test"
    for file in preprocessed.iterdir():
        file.chmod(0o444)
    preprocessed.chmod(0o500)
    status, said = one.run(*plan)
    assert status == 2
    assert str(preprocessed) in sentence_of(said)
    assert "another user's" in sentence_of(said)
    preprocessed.chmod(0o700)
    for file in preprocessed.iterdir():
        file.chmod(0o644)
    status, said = one.run(*plan)
    assert status == 0, said
    (one.folder / "results").chmod(0o500)
    status, said = one.run(*one.train)
    assert status == 1
    assert "Permission denied. The file or folder is another user's" in sentence_of(said)
    (one.folder / "results").chmod(0o700)
    status, said = one.run(*one.train)
    assert status == 0, said
    assert (one.folder / "results" / "Dataset001_Test").is_dir()
