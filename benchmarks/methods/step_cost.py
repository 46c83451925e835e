"""What a training step costs: time and peak memory of several trainers on the same plans and batches.

The steps are the trainers' own, on the same batch, in turn, so that whatever else the machine does falls on all. Peak
memory is that of a process of its own for each (on the CPU its largest resident set, on a GPU what torch allocated).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from overhead import prepare, quiet
from rich.console import Console

Result = dict[str, Any]
MakeTrainer = Callable[[str, dict[str, Any], dict[str, Any], argparse.Namespace], Any]
"""A trainer of an arm, initialised, with nnU-Net's data loaders, out of plans, ``dataset.json`` and the arguments."""


def step(trainer: Any, batch: dict[str, Any]) -> float:
    """Seconds of one training step."""
    import torch

    started = time.perf_counter()
    trainer.train_step(batch)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_memory(folder: Path, arm: str) -> int:
    """Bytes at the peak of a few steps, in a process of its own."""
    command = [sys.executable, *sys.argv, "--only", arm, "--prepared", str(folder)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak_of_this_process(make_trainer: MakeTrainer, arguments: argparse.Namespace) -> int:
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


def measure(arms: Iterable[str], make_trainer: MakeTrainer, arguments: argparse.Namespace, folder: Path) -> Result:
    """Seconds of each step by arm, parameters, and peak memory."""
    with quiet():
        plans, dataset, _ = prepare(folder, arguments)
        (folder / "prepared.json").write_text(json.dumps([plans, dataset]))
        trainers = {arm: make_trainer(arm, plans, dataset, arguments) for arm in arms}
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        for number in range(arguments.warmup + arguments.steps):
            batch = next(next(iter(trainers.values())).dataloader_train)
            for arm, trainer in trainers.items():
                spent = step(trainer, copy.deepcopy(batch))
                if number >= arguments.warmup:
                    seconds[arm].append(spent)
    parameters = {arm: sum(p.numel() for p in trainer.network.parameters()) for arm, trainer in trainers.items()}
    memory = {arm: peak_memory(folder, arm) for arm in arms}
    return {
        "seconds": seconds, "parameters": parameters, "peak_memory": memory, "device": arguments.device,
        "load": os.getloadavg()[0],
    }  # fmt: skip


def run(
    arms: Iterable[str], make_trainer: MakeTrainer, show: Callable[[Result, Console], None], description: str | None
) -> None:
    """A benchmark's command: read the arguments, set nnU-Net up in a folder of its own, measure and print."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=2, help="steps before those that count")
    parser.add_argument("--cases", type=int, default=5, help="training cases")
    parser.add_argument("--planner", default="nnUNetPlannerFedSmall", help="nnUNetPlannerFed: a network of stock size")
    parser.add_argument("--configuration", default="3d_fullres")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--json", type=Path, help="write all that was measured to this file")
    parser.add_argument("--only", choices=list(arms), help=argparse.SUPPRESS)
    parser.add_argument("--prepared", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
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
            print(peak_of_this_process(make_trainer, arguments))
            return
        result = measure(arms, make_trainer, arguments, folder)
    show(result, Console())
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
