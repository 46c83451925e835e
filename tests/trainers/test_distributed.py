"""Whole trainings of every method on two ranks of one site, as nnU-Net has them on two GPUs: here gloo, on the CPU."""

from __future__ import annotations

import pickle
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as module_of_nnunet  # noqa: N813
from postman import Postman, deliver
from serving import Served, make_study
from test_gcml_trainer import foreign
from tiny import DESCRIPTION, tiny_plans, write_preprocessed
from torch import distributed as dist
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

from nnunet_fed.methods.tensors import digest_of_tensors
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.site import SITE_FILE_VARIABLE
from nnunet_fed.trainers.gossip.mutual_learning import MutualTrainer
from nnunet_fed.trainers.nnUNetTrainerDitto import nnUNetTrainerDitto
from nnunet_fed.trainers.nnUNetTrainerFedAdam import nnUNetTrainerFedAdam
from nnunet_fed.trainers.nnUNetTrainerFedAvg import nnUNetTrainerFedAvg
from nnunet_fed.trainers.nnUNetTrainerFedAvgM import nnUNetTrainerFedAvgM
from nnunet_fed.trainers.nnUNetTrainerFedGS import nnUNetTrainerFedGS
from nnunet_fed.trainers.nnUNetTrainerFedOAP import nnUNetTrainerFedOAP
from nnunet_fed.trainers.nnUNetTrainerFedProx import nnUNetTrainerFedProx
from nnunet_fed.trainers.nnUNetTrainerFedSM import nnUNetTrainerFedSM
from nnunet_fed.trainers.nnUNetTrainerGCML import nnUNetTrainerGCML
from nnunet_fed.trainers.nnUNetTrainerLocal import nnUNetTrainerLocal
from nnunet_fed.trainers.parts.study_trainer import SKIP_VALIDATION_VARIABLE

ROUNDS = 2
TIMEOUT = timedelta(seconds=60)
"""After which a rank that waits for one that does not come gives up."""
TRAINERS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "fedavg": (nnUNetTrainerFedAvg, {}),
    "local": (nnUNetTrainerLocal, {}),
    "fedprox": (nnUNetTrainerFedProx, {}),
    "fedavgm": (nnUNetTrainerFedAvgM, {}),
    "fedadam": (nnUNetTrainerFedAdam, {}),
    "fedgs": (nnUNetTrainerFedGS, {"threshold": 9, "finetune_epochs": 1}),
    "ditto": (nnUNetTrainerDitto, {}),
    "fedsm": (nnUNetTrainerFedSM, {"selector_steps_per_round": 1}),
    "fedoap": (nnUNetTrainerFedOAP, {"finetune_epochs": 1}),
    "gcml": (nnUNetTrainerGCML, {"keep": "best", "topology": "ring"}),
    "ditto on nnUNetTrainer_warmup": (nnUNetTrainerDitto, {}),
}
"""Trainer and options of each method, and one on a base trainer."""


def study_of(method: str) -> Federation:
    """Of this site alone, or with one that never comes, for methods that are nothing without a second."""
    name, _, base = method.partition(" on ")
    return make_study(
        ("a", "b") if method in ("fedsm", "gcml") else ("a",), **({"trainer": base} if base else {}),
        method={"name": name, **TRAINERS[method][1]}, rounds=ROUNDS, min_sites=1, deadline_minutes=0.02,
        iterations_per_epoch=2, val_iterations_per_epoch=1, initial_lr=0.05,
    )  # fmt: skip


def _rank(rank: int, folder: Path, addresses: dict[str, str]) -> None:
    """One process of the training command, for one method after the other."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", TIMEOUT, world_size=2, rank=rank)
    with pytest.MonkeyPatch.context() as patch:
        found = {}
        for method, address in addresses.items():
            found[method] = _train(rank, folder, method, address, patch)
    (folder / f"found{rank}").write_bytes(pickle.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _train(rank: int, folder: Path, method: str, address: str, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    site = folder / f"{method}_{rank}.toml"
    peers = 'listen = "127.0.0.1:2"\npeers = { a = "127.0.0.1:2", b = "127.0.0.1:3" }\n' if method == "gcml" else ""
    site.write_text(f'name = "a"\ncoordinator = "{address}"\ninsecure = true\n{peers}')
    variables = {
        "nnUNet_raw": folder, "nnUNet_preprocessed": folder / "preprocessed", "nnUNet_n_proc_DA": 0,
        "nnUNet_results": folder / method, SITE_FILE_VARIABLE: site, SKIP_VALIDATION_VARIABLE: 1,
    }  # fmt: skip
    for name, value in variables.items():
        patch.setenv(name, str(value))
    for name in ("plot_network_architecture", "print_plans"):
        patch.setattr(module_of_nnunet.nnUNetTrainer, name, lambda trainer: None)
    patch.setattr(LocalLogger, "plot_progress_png", lambda logger, folder: None)
    # nnU-Net distributes on GPUs only, one for each rank
    patch.setattr(module_of_nnunet, "DDP", lambda network, device_ids: DistributedDataParallel(network))
    patch.setattr(nnUNetTrainerGCML, "start_peer", _postman())
    # as if the first rank's GPU had room for both models and the second's had not
    patch.setattr(torch.cuda, "mem_get_info", lambda device: (1000 if rank == 0 else 10, 1000))

    plans = tiny_plans(study_of(method))
    plans["configurations"]["2d"]["batch_dice"] = True  # then the loss itself gathers over the ranks
    trainer = TRAINERS[method][0](plans, "2d", 0, DESCRIPTION, torch.device("cpu"))
    trainer.device, trainer.grad_scaler = torch.device("cpu"), None
    if isinstance(trainer, MutualTrainer):
        trainer._step_bytes = 100
    trainer.run_training()
    trainer.perform_actual_validation()
    losses = {name: trainer.logger.get_checkpoint()[name] for name in ("train_losses", "val_losses", "mean_fg_dice")}
    phases = trainer._standing.phases if isinstance(trainer, nnUNetTrainerGCML) else []
    models = {
        "own": digest_of_tensors(trainer.bare(trainer.network).state_dict()),
        "shared": digest_of_tensors(trainer.shared()),
    }
    return {"models": models, "losses": losses, "epoch": trainer.current_epoch, "phases": phases}


def _postman() -> Any:
    postman = Postman()
    weights = foreign()
    postman.bring = lambda mailbox, state: deliver(mailbox, state, weights, counter=1, epoch=1)
    return lambda trainer: postman(trainer)


def test_both_ranks_train_the_same_models(tmp_path: Path) -> None:
    """One test, since each pair of processes would import PyTorch again."""
    write_preprocessed(tmp_path / "preprocessed")
    with ExitStack() as stack:
        addresses = {
            method: "127.0.0.1:1" if method == "gcml"
            else Served(study_of(method), tmp_path / f"coordinator_{method}", stack).server.address
            for method in TRAINERS
        }  # fmt: skip
        multiprocessing.spawn(_rank, (tmp_path, addresses), nprocs=2)
    zero, one = (pickle.loads((tmp_path / f"found{rank}").read_bytes()) for rank in range(2))
    for method in TRAINERS:
        assert zero[method]["models"] == one[method]["models"], method
        assert zero[method]["epoch"] == one[method]["epoch"] >= ROUNDS, method
        assert np.isfinite(zero[method]["losses"]["train_losses"]).all(), method
        fold = next((tmp_path / method).glob("*/*/fold_0"))
        assert (fold / "checkpoint_final.pth").is_file(), method
    phases = [found["gcml"]["phases"] for found in (zero, one)]
    for phase in (phase for (phase,) in phases):
        assert (phase["from"], phase["plan"]) == ("b", "two_pass"), "one of the ranks has less memory"
        assert phase["scores"].keys() >= {"local", "incoming", "before"}
    assert phases[0][0]["scores"] == phases[1][0]["scores"], "by the patches of both"
