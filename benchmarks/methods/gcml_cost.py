"""What a mutual step of GCML costs beside a plain one of nnU-Net, in both execution plans: time and peak memory.

A mutual step is two training steps; the notes (5.3) count 2.0 plain ones for ``simultaneous``, which keeps both graphs,
and 2.33 for ``two_pass``, which does not. Measured as benchmarks/methods/step_cost.py says.

    python benchmarks/methods/gcml_cost.py --steps 30
"""

from __future__ import annotations

import argparse
import copy
import statistics
from typing import Any

from rich.console import Console
from rich.table import Table
from step_cost import run

ARMS = {"plain": 1.0, "simultaneous": 2.0, "two_pass": 2.33}
"""The notes' compute of each (5.3)."""
SITES = ("site_a", "site_b")


def make_trainer(arm: str, plans: dict[str, Any], dataset: dict[str, Any], arguments: argparse.Namespace) -> Any:
    """A trainer in the middle of its training, with nnU-Net's data loaders; unless plain with an incoming model."""
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from nnunet_fed.gossip.schedule import Version
    from nnunet_fed.trainers.gossip.peer_model import PeerModel
    from nnunet_fed.trainers.nnUNetTrainerGCML import nnUNetTrainerGCML

    plans = {**copy.deepcopy(plans), "continue_training": False}
    plans["federation"]["study"].update(method={"name": "gcml", "ramp_steps": 0}, sites=SITES)
    trainer: Any = nnUNetTrainerGCML(
        plans, arguments.configuration, "all", dataset, torch.device(arguments.device)
    )  # fmt: skip
    torch.set_num_threads(arguments.threads)
    trainer.initialize()
    trainer.dataloader_train, _ = nnUNetTrainer.get_dataloaders(trainer)
    if arm != "plain":
        trainer._peer_model = PeerModel.beside(
            trainer, version=Version("site_b", {"site_b": 1}, 1), initial="", size=0, plan=arm, began=0, epochs_left=1,
            before=None,
        )  # fmt: skip
        trainer._peer_model.network.train()
    trainer.network.train()
    return trainer


def show(result: dict[str, Any], console: Console) -> None:
    """Print a row for each arm."""
    plain, memory = result["seconds"]["plain"], result["peak_memory"]
    title = (
        f"A training step, median of {len(plain)}; {result['parameters']['plain'] / 1e6:.2f} M parameters, "
        f"{result['device']}, load of the machine {result['load']:.1f}"
    )
    table = Table(title=title)
    for column in ("", "seconds", "over plain: of the medians", "of each step (least, most)", "notes", "peak memory"):
        table.add_column(column, justify="left" if not column else "right")
    for arm, seconds in result["seconds"].items():
        ratios = [mine / theirs for mine, theirs in zip(seconds, plain, strict=True)]
        of_medians = statistics.median(seconds) / statistics.median(plain)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"
        more = (memory[arm] - memory["plain"]) / 2**20
        table.add_row(
            arm, f"{statistics.median(seconds):.4f}", f"{of_medians:.2f}", spread, f"{ARMS[arm]:.2f}",
            f"{memory[arm] / 2**20:.0f} MiB ({more:+.0f})",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    run(ARMS, make_trainer, show, __doc__)
