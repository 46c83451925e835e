"""TensorBoard's event files hold what was logged, read back here without TensorBoard."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.logging.nnunet_logger import LocalLogger, MetaLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from serving import Served, make_study, together
from tensorboardX.proto.event_pb2 import Event
from tiny import DESCRIPTION, tiny_plans, write_preprocessed

from nnunet_fed.coordinator.coordinator import Coordinator
from nnunet_fed.coordinator.store import Store
from nnunet_fed.coordinator.tracking import FederationTracker
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.study.site import SITE_FILE_VARIABLE, Site
from nnunet_fed.trainers.nnUNetTrainerFedGS import nnUNetTrainerFedGS
from nnunet_fed.trainers.parts.site_tracker import FOLDER, SiteTracker
from nnunet_fed.trainers.parts.study_trainer import SKIP_VALIDATION_VARIABLE
from nnunet_fed.transport.coordinator.server import CoordinatorServer
from nnunet_fed.transport.site.client import GrpcCommunicator


def events(folder: Path) -> Iterator[Any]:
    """Of all files, oldest first: each has its length, a checksum, itself, and a checksum."""
    for path in sorted(folder.glob("events.*")):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            yield Event.FromString(content[place + 12 : place + 12 + length])
            place += length + 16


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """By tag, then by step."""
    found: dict[str, dict[int, float]] = {}
    for event in events(folder):
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = pytest.approx(value.simple_value, rel=1e-6)
    return found


def test_nnunets_logger_hands_its_values_on(tmp_path: Path) -> None:
    logger = MetaLogger(tmp_path, False)
    tracker = SiteTracker(tmp_path, 0)
    logger.loggers.append(tracker)
    for epoch in range(2):
        logger.log("epoch_start_timestamps", 1e9, epoch)
        logger.log("train_losses", -0.5 - epoch, epoch)
        logger.log("mean_fg_dice", np.float32(0.5), epoch)
        logger.log("dice_per_class_or_region", [0.25, 0.75], epoch)
    logger.log_summary("final_val/foreground_dice", 0.875)
    logger.log_summary("final_val/foreground_dice", 0.125)  # of a model that is validated besides
    tracker.close()
    assert scalars(tmp_path / FOLDER) == {
        "nnunet/train_losses": {0: -0.5, 1: -1.5},
        "nnunet/mean_fg_dice": {0: 0.5, 1: 0.5},
        "nnunet/ema_fg_dice": {0: 0.5, 1: 0.5},
        "nnunet/dice_per_class_or_region/class_1": {0: 0.25, 1: 0.25},
        "nnunet/dice_per_class_or_region/class_2": {0: 0.75, 1: 0.75},
        "final_val/foreground_dice": {0: 0.875},
    }
    assert logger.get_value("train_losses", step=None) == [-0.5, -1.5], "nnU-Net's own log goes on"


def test_a_continued_training_hides_what_it_trains_again(tmp_path: Path) -> None:
    for epoch in (0, 7):
        tracker = SiteTracker(tmp_path, epoch)
        tracker.round_over(epoch + 1, {"rho": 0.5})
        tracker.close()
    starts = [event.step for event in events(tmp_path / FOLDER) if event.HasField("session_log")]
    assert starts[-1:] == [7]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Path]]:
    """A study of one site, whose coordinator runs, and the site's site.toml."""
    write_preprocessed(tmp_path / "preprocessed")
    settings = {"rounds": 2, "iterations_per_epoch": 1, "val_iterations_per_epoch": 1, "initial_lr": 0.01}
    study = make_study(("a",), method={"name": "fedgs"}, configuration="2d", **settings)
    with ExitStack() as stack:
        served = Served(study, tmp_path / "state", stack)
        file = tmp_path / "site.toml"
        file.write_text(f'name = "a"\ncoordinator = "{served.server.address}"\ninsecure = true\n')
        variables = {
            "nnUNet_raw": tmp_path, "nnUNet_preprocessed": tmp_path / "preprocessed",
            "nnUNet_results": tmp_path / "results", "nnUNet_n_proc_DA": 0, SITE_FILE_VARIABLE: file,
            SKIP_VALIDATION_VARIABLE: 1,
        }  # fmt: skip
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        for name in ("plot_network_architecture", "print_plans"):
            monkeypatch.setattr(nnUNetTrainer, name, lambda trainer: None)
        monkeypatch.setattr(LocalLogger, "plot_progress_png", lambda logger, folder: None)
        yield study, file


def train(study: Any) -> Any:
    trainer = nnUNetTrainerFedGS(tiny_plans(study), "2d", 0, DESCRIPTION, torch.device("cpu"))
    trainer.run_training()
    trainer.perform_actual_validation()
    return trainer


def test_a_training_with_tensorboard(site: tuple[Any, Path]) -> None:
    study, file = site
    file.write_text(file.read_text() + "tensorboard = true\n")
    trainer = train(study)
    found = scalars(Path(trainer.output_folder) / FOLDER)
    assert found["nnunet/train_losses"] == dict(enumerate(trainer.logger.get_value("train_losses", step=None)))
    assert set(found["federation/mean_factor"]) == {1, 2}
    assert found["federation/mean_factor"][2] == trainer.diagnostics["mean_factor"]


def test_a_training_without_leaves_nothing(site: tuple[Any, Path]) -> None:
    trainer = train(site[0])
    assert not (Path(trainer.output_folder) / FOLDER).exists()


def test_the_coordinator_tells_rounds_and_sites(tmp_path: Path) -> None:
    study = make_study(("a", "b"), max_update_norm=100.0)
    store, tracker = Store(tmp_path / "state"), FederationTracker(tmp_path / "scalars")
    coordinator = Coordinator(study, store, tracker=tracker)
    server = CoordinatorServer(coordinator, "127.0.0.1:0", insecure=True)
    server.start()
    seats = []
    for name in study.sites:
        settings = {"name": name, "coordinator": server.address, "insecure": True, "connect_minutes": 0.05}
        seat = GrpcCommunicator(Site.model_validate(settings))
        seat.join("training", study.digest, "3d_fullres", "T")
        seats.append(seat)
    for scope, value in (("start", 0.0), ("round-0000", 3.0), ("round-0001", 3.0)):
        tensors = {"w": np.full(4, value, np.float32)}
        together(*(partial(seat.mean, f"{scope}/model", tensors, 2.0) for seat in seats))
    together(*(partial(seat.sum, "round-0001/other", np.ones(3)) for seat in seats))
    for epoch, loss in ((1, -0.25), (1, -0.25), (2, -0.5)):
        coordinator.report("a", {"phase": "training", "epoch": epoch, "loss": loss, "dice": 0.75})
    for odd in ({"epoch": 10**30}, {"epoch": "3"}, {"epoch": 3, "loss": float("nan"), "dice": None}, {"epoch": -1}):
        coordinator.report("b", {"phase": "training", "loss": 0.5, **odd})
    for seat in seats:
        seat.close()
    server.stop(0)
    coordinator.close()
    found = scalars(tmp_path / "scalars")
    seconds = found.pop("round/seconds")
    assert set(seconds) == {1, 2}
    size = found.pop("round/bytes_received")
    assert set(size) == {1, 2}
    assert found == {
        "round/participants": {1: 2.0, 2: 2.0},
        "weight/a": {1: 2.0, 2: 2.0},
        "weight/b": {1: 2.0, 2: 2.0},
        "update_norm/a": {1: 6.0, 2: 0.0},
        "update_norm/b": {1: 6.0, 2: 0.0},
        "site_loss/a": {1: -0.25, 2: -0.5},
        "site_dice/a": {1: 0.75, 2: 0.75},
    }


def test_without_tensorboardx_it_is_said_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigurationError, match=r"pip install nnunet_fed\[tensorboard\]"):
        FederationTracker(tmp_path)
