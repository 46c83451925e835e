"""Every method with base trainers of every kind: trained, killed and resumed, and predicted by nnU-Net's command."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import torch
from in_process import InProcess, Killed
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor, predict_entry_point
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from postman import Postman, deliver
from tiny import DATASET, PATCHES

from nnunet_fed.simulation.simulate import plugin_folder
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.methods import METHODS
from nnunet_fed.study.site import Site
from nnunet_fed.trainers.nnUNetTrainerGCML import nnUNetTrainerGCML

TINY_PRIMUS = "nnUNetTrainerTinyPrimus"
BASES = {
    "nnUNetTrainer": "2d", "nnUNetTrainerDA5": "2d", "nnUNetTrainerNoMirroring": "2d", "nnUNetTrainerCELoss": "2d",
    "nnUNetTrainerAdam": "2d", "nnUNetTrainerBN": "2d", "nnUNetTrainerNoDeepSupervision": "2d",
    TINY_PRIMUS: "3d_fullres",
}  # fmt: skip
"""Base trainers, and what each trains."""
OPTIONS: dict[str, dict[str, Any]] = {
    "fedgs": {"threshold": 1.5, "log_base": 2.0},
    "fedoap": {"finetune_epochs": 1},
    "gcml": {"topology": "ring", "ramp_steps": 2, "mutual_epochs": 2},
}
WITH_OPTIONS = [name for name in METHODS if name != "custom"]
PRIMUS = """
from dynamic_network_architectures.architectures.primus import Primus
from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import AbstractPrimus


class nnUNetTrainerTinyPrimus(AbstractPrimus):
    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.warmup_duration_whole_net = 1

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ):
        return Primus(
            num_input_channels, 24, (8, 8, 8), num_output_channels, 1, 2, configuration_manager.patch_size,
            drop_path_rate=0.1, scale_attn_inner=True, init_values=0.1,
        )
"""


@dataclass(frozen=True)
class Combination:
    """What came of a method with a base trainer; the sentence with which it was refused, if it was."""

    method: str
    base: str
    refused: str = ""

    @property
    def cell(self) -> str:
        """Of the table."""
        return "refused" if self.refused else "yes"


def own_trainers(folder: Path, monkeypatch: pytest.MonkeyPatch, **files: str) -> Path:
    """A folder of the user's in ``nnUNet_extTrainer``, with a tiny Primus and other files by their trainer's name."""
    own = folder / "own_trainers"
    own.mkdir(exist_ok=True)
    for name, text in {TINY_PRIMUS: PRIMUS, **files}.items():
        (own / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(plugin_folder()), str(own)]))
    return own


def study_of(method: str, base: str, /, **settings: Any) -> Federation:
    """Of two sites, and as many epochs as it takes to be killed in one that is not the first."""
    return Federation.model_validate({
        "name": "study", "sites": ("a", "b"), "rounds": 3 if method == "gcml" else 2, "iterations_per_epoch": 2,
        "val_iterations_per_epoch": 1, "trainer": base, "method": {"name": method, **OPTIONS.get(method, {})},
        **settings,
    })  # fmt: skip


def trainer_of(method: str) -> type[Any]:
    """As the command finds it."""
    found: type[Any] = recursive_find_trainer_class_by_name(METHODS[method].own_trainer())
    return found


def try_out(method: str, base: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Combination:
    """Train, then the same with a death in between, and predict; raises what goes wrong."""
    own_trainers(folder, monkeypatch)
    sites = InProcess(folder, monkeypatch, configuration=BASES[base])
    study, trainer = study_of(method, base), trainer_of(method)
    try:
        calm, resumed = trained_and_resumed(sites, trainer, study, monkeypatch)
    except SystemExit as refusal:  # with its sentence
        return Combination(method, base, str(refusal))
    for site, one in calm.items():
        odd = differences(final_of(one), final_of(resumed[site]))
        assert odd == [], odd
        assert type(one).__name__ == trainer.__name__
        assert final_of(one)["trainer_name"] == ("nnUNetTrainerFedOAP" if method == "fedoap" else base)
    monkeypatch.setenv("nnUNet_extTrainer", extra_trainers_to_predict(method, base, folder))
    predict(calm["a"], folder / "images", folder / "out")
    return Combination(method, base)


def extra_trainers_to_predict(method: str, base: str, folder: Path) -> str:
    """Folders of trainers that stock nnU-Net must be told to predict: none, but for a network that it does not have."""
    needed = {str(plugin_folder()): method == "fedoap", str(folder / "own_trainers"): base == TINY_PRIMUS}
    return os.pathsep.join(name for name, is_needed in needed.items() if is_needed) or str(folder / "none")


def trained_and_resumed(
    sites: InProcess, trainer: type[Any], study: Federation, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trainers after a calm training, and after one that was killed and continued."""
    if trainer is nnUNetTrainerGCML:
        peer(monkeypatch)
        here: tuple[str, ...] = ("a",)
    elif not study.method.EXCHANGES:
        here = tuple(sites.cases)
    else:
        return sites.train(trainer, study), sites.train_killed(trainer, study, "round-0001/model")
    runs = []
    for deadly in (False, True):
        trainers = {site: one for site, one in sites.make(trainer, study).items() if site in here}
        if deadly:
            for one in trainers.values():
                die_in(one, study.epochs - 1)
            with pytest.raises(Killed):
                sites.run(trainers)
            trainers = {site: continued(sites, trainer, study, site) for site in here}
        sites.run(trainers)
        runs.append(trainers)
    return runs[0], runs[1]


def continued(sites: InProcess, trainer: type[Any], study: Federation, site: str) -> Any:
    """A trainer that goes on from where another one was killed."""
    one = sites.trainer(trainer, study, site)
    one.load_checkpoint(str(Path(one.output_folder) / "checkpoint_latest.pth"))
    return one


def die_in(trainer: Any, epoch: int) -> None:
    """Let a trainer be killed in the first step of an epoch."""
    step = trainer.train_step

    def dying(batch: Any) -> Any:
        if trainer.current_epoch == epoch:
            raise Killed
        return step(batch)

    trainer.train_step = dying


def peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another site of GCML, which sends half of the weights from which this one has started."""
    postman, sent = Postman(), dict[str, Any]()

    def start(trainer: Any) -> Postman:
        if not sent:
            sent.update({name: array * array.dtype.type(0.5) for name, array in trainer.shared_arrays().items()})
        postman.bring = lambda mailbox, state: deliver(mailbox, state, sent, 1, 1)
        return postman(trainer)

    monkeypatch.setattr(nnUNetTrainerGCML, "start_peer", start)
    peers = {"a": "127.0.0.1:2", "b": "127.0.0.1:3"}
    site = Site(name="a", coordinator="127.0.0.1:1", insecure=True, listen="127.0.0.1:2", peers=peers)
    monkeypatch.setattr(Site, "from_environment", lambda: site)


def final_of(trainer: Any) -> dict[str, Any]:
    """What a site deploys, and from which it could go on."""
    path = Path(trainer.output_folder) / "checkpoint_final.pth"
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
    return content


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What two final checkpoints do not have in common, bit for bit, of all that was computed."""
    compared = [
        {
            "weights": content["network_weights"], "optimizer": content["optimizer_state"],
            "method": content["federation"]["method"],
            "log": {name: content["logging"][name] for name in ("train_losses", "val_losses", "mean_fg_dice", "lrs")},
        }
        for content in (one, other)
    ]  # fmt: skip
    return list(_differing("", *compared))


def _differing(place: str, one: Any, other: Any) -> list[str]:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if one.keys() != other.keys():
            return [f"{place}: {sorted(map(str, one.keys() ^ other.keys()))}"]
        return [odd for key in one for odd in _differing(f"{place}/{key}", one[key], other[key])]
    if isinstance(one, list | tuple) and len(one) == len(other):
        return [odd for i, pair in enumerate(zip(one, other, strict=True)) for odd in _differing(f"{place}/{i}", *pair)]
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [place]
    if isinstance(one, float | np.ndarray | np.generic):
        return [] if np.array_equal(one, other, equal_nan=True) else [f"{place}: {one} {other}"]
    return [] if one == other else [f"{place}: {one} {other}"]


def predict(trainer: Any, images: Path, out: Path) -> None:
    """Predict a case with the stock command, and see that it says what the trainer's own network says."""
    images.mkdir(exist_ok=True)
    raw = np.random.default_rng(3).normal(1, 1, (2, *PATCHES[trainer.configuration_name])[-3:]).astype(np.float32)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(raw), str(images / "case_0000.nii.gz"))
    words = ["nnUNetv2_predict", "-i", str(images), "-o", str(out), "-d", DATASET, "-c", trainer.configuration_name]
    words += ["-f", "0", "-tr", type(trainer).__name__, "-p", "nnUNetFedPlans", "-device", "cpu", "-npp", "0"]
    words += ["-nps", "0", "--disable_progress_bar"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_results", str(Path(trainer.output_folder).parents[2]))
        patch.setattr(sys, "argv", words)
        patch.setattr(torch, "set_num_threads", lambda threads: None)  # it takes all cores, of which others want some
        predict_entry_point()
    predictor = nnUNetPredictor(perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False)
    trainer.set_deep_supervision_enabled(False)
    predictor.manual_initialization(
        trainer.network, trainer.plans_manager, trainer.configuration_manager, [trainer.network.state_dict()],
        trainer.dataset_json, type(trainer).__name__, trainer.inference_allowed_mirroring_axes,
    )  # fmt: skip
    (own,) = predictor.predict_from_files_sequential([[str(images / "case_0000.nii.gz")]], None, False, True)
    told = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(out / "case.nii.gz")))
    assert told.shape == raw.shape
    assert np.array_equal(told, own), "the command predicts something else than the network that was trained"
