"""What the end of a round costs at real size, the exchange left out: checkpoints, the log and its plot.

Each trainer has a network of stock nnU-Net's size (31 million parameters) and a momentum for each weight; nothing is
trained. In turn, round by round, each does what comes after the last step of a round: the checkpoint before the
exchange, then nnU-Net's ``on_epoch_end`` with the checkpoint of a new best model and the latest one. Beside them stands
``nnUNetTrainer``, which saves its latest checkpoint as often.

    python benchmarks/methods/round_end.py --rounds 7

To compare with another commit, run the same file there: ``python THIS_FILE`` with its environment.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from overhead import prepare, quiet
from rich.console import Console
from rich.table import Table

TRAINERS = {
    "nnUNetTrainerFedAvg": "fedavg", "nnUNetTrainerFedProx": "fedprox", "nnUNetTrainerFedGS": "fedgs",
    "nnUNetTrainerFedAdam": "fedadam", "nnUNetTrainerDitto": "ditto", "nnUNetTrainerFedSM": "fedsm",
    "nnUNetTrainerGCML": "gcml",
}  # fmt: skip
"""Method of each trainer that is measured."""
STAGES = 6
FEATURES = [32, 64, 128, 256, 320, 320]
PLAIN = "nnUNetTrainer"


def at_real_size(plans: dict[str, Any]) -> dict[str, Any]:
    """The plans with the network that nnU-Net plans for large 3D images."""
    for content in plans["configurations"].values():
        arguments = content.get("architecture", {}).get("arch_kwargs", {})
        if "Conv3d" in arguments.get("conv_op", ""):
            strides = [[1, 1, 1]] + [[2, 2, 2]] * (STAGES - 1)
            arguments.update(
                n_stages=STAGES, features_per_stage=FEATURES, kernel_sizes=[[3, 3, 3]] * STAGES, strides=strides,
                n_conv_per_stage=[2] * STAGES, n_conv_per_stage_decoder=[2] * (STAGES - 1),
            )  # fmt: skip
    return plans


def made(name: str, plans: dict[str, Any], dataset: dict[str, Any], configuration: str) -> Any:
    """A trainer that is initialised, as after the steps of an epoch."""
    import torch

    where = "nnunetv2.training.nnUNetTrainer" if name == PLAIN else "nnunet_fed.trainers"
    kind = getattr(importlib.import_module(f"{where}.{name}"), name)
    if name != PLAIN:
        table = {**plans["federation"]["study"], "method": {"name": TRAINERS[name]}, "sites": ["site_a", "site_b"]}
        plans = {**plans, "federation": {**plans["federation"], "study": table}}
    plans = {**plans, "continue_training": False}
    trainer = kind(plans, configuration, "all", dataset, torch.device("cpu"))
    trainer.initialize()
    trainer.save_every = 1
    models = [trainer, getattr(trainer, "_global", None)]
    for model in filter(None, models):
        for parameter in model.network.parameters():
            model.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    if name == "nnUNetTrainerGCML":
        from nnunet_fed.gossip.schedule import Version
        from nnunet_fed.trainers.gossip.gossip_session import Standing

        trainer._standing = Standing(Version("site_a", {}, 0), "")
    Path(trainer.output_folder).mkdir(parents=True, exist_ok=True)
    return trainer


def end_of_round(trainer: Any) -> float:
    """Seconds of what comes after a round's last step."""
    figures = {
        "train_losses": -0.5, "val_losses": -0.5, "mean_fg_dice": 0.5, "dice_per_class_or_region": [0.5], "lrs": 0.01,
        "epoch_start_timestamps": time.time(),
    }  # fmt: skip
    for name, value in figures.items():
        trainer.logger.log(name, value, trainer.current_epoch)
    trainer._best_ema = None  # so that this epoch is the best one
    started = time.perf_counter()
    if hasattr(trainer, "_save_pending"):
        trainer._save_pending([])
        trainer._pending = None
    trainer.on_epoch_end()
    return time.perf_counter() - started


def main() -> None:
    """Read the arguments, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainers", nargs="+", choices=sorted(TRAINERS), default=list(TRAINERS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write all that was measured to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nnunet_fed_round_end_") as name:
        folder = Path(name)
        # nnU-Net and torch read these when they are imported
        for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            (folder / variable).mkdir()
            os.environ[variable] = str(folder / variable)
        os.environ.update(nnUNet_n_proc_DA="0", nnUNet_compile="0")
        planned = argparse.Namespace(
            trainer="nnUNetTrainerFedAvg", planner="nnUNetPlannerFedSmall", configuration="3d_fullres", warmup=0,
            epochs=arguments.rounds + 2, iterations=1, val_iterations=1, cases=2,
        )  # fmt: skip
        with quiet():
            plans, dataset, configuration = prepare(folder, planned)
            plans = at_real_size(plans)
            trainers = {one: made(one, plans, dataset, configuration) for one in (PLAIN, *arguments.trainers)}
            parameters = sum(tensor.numel() for tensor in trainers[PLAIN].network.parameters())
            spent: dict[str, list[float]] = {one: [] for one in trainers}
            for number in range(arguments.rounds + 1):
                for one, trainer in trainers.items():
                    seconds = end_of_round(trainer)
                    if number:
                        spent[one].append(seconds)
    table = Table(title=f"Seconds at the end of a round, median of {arguments.rounds}; {parameters / 1e6:.1f} M")
    for column in ("trainer", "seconds", "least", "most", f"/ {PLAIN}"):
        table.add_column(column, justify="left" if column == "trainer" else "right")
    plain = statistics.median(spent[PLAIN])
    for one, seconds in spent.items():
        median = statistics.median(seconds)
        table.add_row(one, f"{median:.2f}", f"{min(seconds):.2f}", f"{max(seconds):.2f}", f"{median / plain:.2f}")
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"parameters": parameters, "seconds": spent}, indent=2) + "\n")


if __name__ == "__main__":
    main()
