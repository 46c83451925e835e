"""What a mutual step of GCML costs beside a plain one of nnU-Net, in both execution plans: time and peak memory.

The steps are the trainer's own, on the same batch, in turn, so that whatever else the machine does falls on all. A
mutual step is two training steps; the notes (5.3) count 2.0 plain ones for ``simultaneous``, which keeps both graphs,
and 2.33 for ``two_pass``, which does not. Peak memory is that of a process of its own for each (on the CPU its largest
resident set, on a GPU what torch allocated).

    python benchmarks/gcml_cost.py --steps 30
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fedoap_cost import step
from overhead import prepare, quiet
from rich.console import Console
from rich.table import Table

ARMS = {"plain": 1.0, "simultaneous": 2.0, "two_pass": 2.33}
"""The notes' compute of each (5.3)."""
SITES = ("site_a", "site_b")


def make_trainer(arm: str, plans: dict[str, Any], dataset: dict[str, Any], arguments: argparse.Namespace) -> Any:
    """A trainer in the middle of its training, with nnU-Net's data loaders; unless plain with an incoming model."""
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from nnunet_fed.methods.gossip import Version
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
        trainer._incoming = trainer._make_incoming(
            version=Version("site_b", {"site_b": 1}, 1), initial="", size=0, plan=arm, began=0, epochs_left=1,
            before=None,
        )  # fmt: skip
        trainer._incoming.network.train()
    trainer.network.train()
    return trainer


def peak_memory(folder: Path, arm: str) -> int:
    """Bytes at the peak of a few steps, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", arm, "--prepared", str(folder)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak_of_this_process(arguments: argparse.Namespace) -> int:
    """Run a few steps of one arm; returns the peak of this process in bytes."""
    import torch

    plans, dataset = json.loads((arguments.prepared / "prepared.json").read_text())
    with quiet():
        trainer = make_trainer(arguments.only, plans, dataset, arguments)
        for _ in range(3):
            step(trainer, next(trainer.dataloader_train))
    if trainer.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    # not getrusage, which counts what the parent held when it forked
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of each step by arm, parameters, and peak memory."""
    with quiet():
        plans, dataset, _ = prepare(folder, arguments)
        (folder / "prepared.json").write_text(json.dumps([plans, dataset]))
        trainers = {arm: make_trainer(arm, plans, dataset, arguments) for arm in ARMS}
        seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for number in range(arguments.warmup + arguments.steps):
            batch = next(trainers["plain"].dataloader_train)
            for arm, trainer in trainers.items():
                spent = step(trainer, copy.deepcopy(batch))
                if number >= arguments.warmup:
                    seconds[arm].append(spent)
    parameters = sum(p.numel() for p in trainers["plain"].network.parameters())
    memory = {arm: peak_memory(folder, arm) for arm in ARMS}
    return {
        "seconds": seconds, "parameters": parameters, "peak_memory": memory, "device": arguments.device,
        "load": os.getloadavg()[0],
    }  # fmt: skip


def show(result: dict[str, Any], console: Console) -> None:
    """Print a row for each arm."""
    plain, memory = result["seconds"]["plain"], result["peak_memory"]
    title = (
        f"A training step, median of {len(plain)}; {result['parameters'] / 1e6:.2f} M parameters, {result['device']}, "
        f"load of the machine {result['load']:.1f}"
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


def main() -> None:
    """Read the arguments, set nnU-Net up in a folder of its own, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=2, help="steps before those that count")
    parser.add_argument("--cases", type=int, default=5, help="training cases")
    parser.add_argument("--planner", default="nnUNetPlannerFedSmall", help="nnUNetPlannerFed: a network of stock size")
    parser.add_argument("--configuration", default="3d_fullres")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--json", type=Path, help="write all that was measured to this file; what is there is shown")
    parser.add_argument("--only", choices=list(ARMS), help=argparse.SUPPRESS)
    parser.add_argument("--prepared", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.json and arguments.json.is_file() and not arguments.only:
        show(json.loads(arguments.json.read_text()), Console())
        return
    # what overhead.prepare asks for
    arguments.trainer, arguments.epochs, arguments.iterations, arguments.val_iterations = "nnUNetTrainerFedAvg", 1, 1, 1
    with tempfile.TemporaryDirectory(prefix="nnunet_fed_cost_") as name:
        folder = arguments.prepared or Path(name)
        # nnU-Net and torch read these when they are imported
        for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            (folder / variable).mkdir(exist_ok=True)
            os.environ[variable] = str(folder / variable)
        os.environ.update(nnUNet_n_proc_DA="0", nnUNet_compile="0", nnUNet_fed_threads=str(arguments.threads))
        os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(arguments.threads)))
        if arguments.only:
            print(peak_of_this_process(arguments))
            return
        result = measure(arguments, folder)
    show(result, Console())
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
