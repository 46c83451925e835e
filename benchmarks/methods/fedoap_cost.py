"""What a training step of FedOAP costs beside one of FedAvg on the same plans: time and peak memory.

Measured as benchmarks/methods/step_cost.py says.

    python benchmarks/methods/fedoap_cost.py --steps 30
"""

from __future__ import annotations

import argparse
import copy
import importlib
import statistics
from typing import Any

from rich.console import Console
from rich.table import Table
from step_cost import run

ARMS = ("fedavg", "fedoap, rounds", "fedoap, fine-tuning")
TRAINERS = {"fedavg": "nnUNetTrainerFedAvg", "fedoap": "nnUNetTrainerFedOAP"}


def make_trainer(arm: str, plans: dict[str, Any], dataset: dict[str, Any], arguments: argparse.Namespace) -> Any:
    """A trainer of the arm, initialised, with nnU-Net's data loaders and without a federation."""
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    method = arm.partition(",")[0]
    plans = {**copy.deepcopy(plans), "continue_training": False}
    plans["federation"]["study"]["method"] = {"name": method}
    kind = getattr(importlib.import_module(f"nnunet_fed.trainers.{TRAINERS[method]}"), TRAINERS[method])
    trainer = kind(plans, arguments.configuration, "all", dataset, torch.device(arguments.device))
    torch.set_num_threads(arguments.threads)
    trainer.initialize()
    trainer.dataloader_train, _ = nnUNetTrainer.get_dataloaders(trainer)
    if method == "fedoap":
        trainer._boundary_loss.weight = trainer.options.perturbation_weight if "fine-tuning" in arm else 0.0
    trainer.network.train()
    return trainer


def show(result: dict[str, Any], console: Console) -> None:
    """Print a row for each arm."""
    table = Table(title=f"A training step, median of {len(result['seconds']['fedavg'])}")
    for column in ("", "parameters", "seconds", "over FedAvg (median, least, most)", "peak memory"):
        table.add_column(column, justify="left" if not column else "right")
    plain = result["seconds"]["fedavg"]
    for arm, seconds in result["seconds"].items():
        ratios = [mine / theirs for mine, theirs in zip(seconds, plain, strict=True)]
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}, {max(ratios):.3f})"
        parameters, memory = f"{result['parameters'][arm] / 1e6:.2f} M", f"{result['peak_memory'][arm] / 2**20:.0f} MiB"
        table.add_row(arm, parameters, f"{statistics.median(seconds):.4f}", spread, memory)
    console.print(table)


if __name__ == "__main__":
    run(ARMS, make_trainer, show, __doc__)
