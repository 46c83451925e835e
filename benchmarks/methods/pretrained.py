"""A pretrained start beside a random one, by round: pretrained on all sites but one, started at the one left out.

The cases of one data set are parted by a column of its ``cases.csv``. For each seed the others train together (FedAvg),
and the site left out trains alone, once from their global model and once from the study's seed, with the same budget.
Dice is nnU-Net's pseudo Dice at each round's end and, after the last one, that of its validation. Finished trainings
are kept and skipped on a second call.

    python benchmarks/methods/pretrained.py --data hippocampus --column intensity_group --left-out C --out pretrained
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nnunet_fed.datasets.split import split_by_column
from nnunet_fed.prediction.checkpoint_files import GLOBAL_CHECKPOINT
from nnunet_fed.report.training_log import read_training_log
from nnunet_fed.simulation.simulate import Simulation, simulate
from nnunet_fed.study.federation import Federation
from nnunet_fed.trainers.parts.pretrained_weights import read_weights

STARTS = ("pretrained", "random")


def train(arguments: argparse.Namespace, name: str, rounds: int, seed: int, pretrained: Path | None = None) -> Path:
    """Simulate one training unless it is there, and its planning once; returns the folder of a site's fold."""
    together = name == "pretraining"
    out: Path = arguments.out / f"{name}-{seed}"
    everyone = {folder.name: folder for folder in sorted((arguments.out / "data").iterdir())}
    sites = {site: folder for site, folder in everyone.items() if (site != arguments.left_out) == together}
    study = Federation.model_validate(
        {
            "name": out.name, "sites": tuple(sites), "method": {"name": "fedavg"}, "planner": "nnUNetPlannerFedSmall",
            "configuration": "2d", "rounds": rounds, "iterations_per_epoch": arguments.iterations,
            "val_iterations_per_epoch": arguments.val_iterations, "initial_lr": 0.01, "momentum": 0.9, "seed": seed,
            "pretrained": None if pretrained is None else read_weights(pretrained).digest,
        }
    )  # fmt: skip
    if not (out / "summary.json").is_file():
        planned: Path = arguments.out / ("planned-others" if together else "planned")
        console = Console(stderr=True)
        if not (planned / "summary.json").is_file():
            shutil.rmtree(planned, ignore_errors=True)  # what was interrupted begins anew
            simulate(Simulation(sites, planned, study, until="plan", threads=1), console)
        shutil.rmtree(out, ignore_errors=True)
        until: Any = "train" if together else "validate"
        simulate(Simulation(sites, out, study, until=until, threads=1, planned=planned, pretrained=pretrained), console)
    return next(out.glob("sites/*/nnUNet_results/*/*/fold_0"))


def figures_of(fold: Path) -> dict[str, Any]:
    """Pseudo Dice by round, and the Dice of the validation."""
    logs = sorted(fold.glob("training_log_*.txt"))
    by_epoch = read_training_log(log.read_text(encoding="utf-8") for log in logs).dice
    summary = json.loads((fold / "validation" / "summary.json").read_text(encoding="utf-8"))
    return {
        "by_round": [by_epoch[epoch] for epoch in sorted(by_epoch)], "validation": summary["foreground_mean"]["Dice"]
    }  # fmt: skip


def show(found: dict[str, dict[str, dict[str, Any]]], console: Console) -> None:
    """A row for each round, then the validation: mean and range over the seeds, and in how many the first is ahead."""
    table = Table(title=f"Mean (lowest to highest) of {len(found)} seeds")
    for column in ("Round", *(f"{start} start" for start in STARTS), "pretrained ahead"):
        table.add_column(column, justify="right")
    rounds = len(next(iter(found.values()))["random"]["by_round"])
    for row in (*range(rounds), "validation"):
        values = {
            start: [of[start][row] if isinstance(row, str) else of[start]["by_round"][row] for of in found.values()]
            for start in STARTS
        }
        cells = [f"{statistics.mean(of):.3f} ({min(of):.3f} to {max(of):.3f})" for of in values.values()]
        ahead = sum(one > other for one, other in zip(*values.values(), strict=True))
        table.add_row(row if isinstance(row, str) else str(row + 1), *cells, f"{ahead} of {len(found)}")
    console.print(table)


def main() -> None:
    """Train what is missing, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a data set in nnU-Net's raw layout, with cases.csv")
    parser.add_argument("--column", default="intensity_group", help="of cases.csv: the case's site")
    parser.add_argument("--left-out", default="C", help="the site that starts from what the others have trained")
    parser.add_argument("--limit", type=int, default=30, help="cases of each site at most")
    parser.add_argument("--out", type=Path, default=Path("pretrained"))
    parser.add_argument("--pretraining-rounds", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--iterations", type=int, default=25, help="steps of a round")
    parser.add_argument("--val-iterations", type=int, default=25)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not (arguments.out / "data").is_dir():
        split_by_column(arguments.data, arguments.out / "data", arguments.column, arguments.limit)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for seed in range(arguments.seeds):
        pretrained = train(arguments, "pretraining", arguments.pretraining_rounds, seed) / GLOBAL_CHECKPOINT
        # another seed than that of the pretraining: otherwise its heads would begin as those of the pretraining did
        folds = {
            start: train(arguments, start, arguments.rounds, 100 + seed, pretrained if start == "pretrained" else None)
            for start in STARTS
        }
        found[str(seed)] = {start: figures_of(fold) for start, fold in folds.items()}
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    show(found, Console())


if __name__ == "__main__":
    main()
