"""FedGS against FedAvg and against its controls, on the phantom: does it find more small lesions, and why?

Every arm trains on the same sites, plans and initial weights with the same budget, for each seed and momentum, and its
global model predicts the same test set of all scanners. Finished arms are kept and skipped on a second call.

    python benchmarks/methods/fedgs.py --out fedgs --json fedgs.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from rich.console import Console
from rich.progress import track
from rich.table import Table

from nnunet_fed.datasets.phantom import write_phantom
from nnunet_fed.evaluation.lesions import aggregate, evaluate
from nnunet_fed.simulation.simulate import Simulation, simulate
from nnunet_fed.study.federation import Federation

VARIANTS = ("fedgs", "fedgs_norm", "fedavg_gain", "fedavg_server_lr")
ARMS: dict[str, dict[str, Any]] = {"fedavg": {"name": "fedavg"}} | {
    variant: {"name": "fedgs", "variant": variant, "classes": ["lesion"]} for variant in VARIANTS
}
RATES = {0.9: 0.05, 0.99: 0.005}
"""Learning rate of each momentum: the same length of a step in the long run."""
METRICS = ("dice", "dice_small", "dice_large", "lesion_recall_small", "lesion_recall_large", "false_positives")
DIAGNOSTICS = ("mean_factor", "scaled_share", "best_scalar", "residual")


def train(arguments: argparse.Namespace, arm: str, momentum: float, seed: int) -> Path:
    """Simulate one arm unless it is there; returns its folder."""
    out: Path = arguments.out / f"{arm}-{momentum:g}-{seed}"
    if (out / "summary.json").is_file():
        return out
    sites = {folder.name: folder for folder in sorted((arguments.out / "data").glob("site_*"))}
    planned: Path = arguments.out / "planned"
    study = Federation.model_validate(
        {
            "name": out.name, "sites": tuple(sites), "method": ARMS[arm], "planner": "nnUNetPlannerFedSmall",
            "rounds": arguments.rounds, "iterations_per_epoch": arguments.iterations, "val_iterations_per_epoch": 2,
            "initial_lr": RATES[momentum], "momentum": momentum, "seed": seed,
        }
    )  # fmt: skip
    console = Console(stderr=True)
    if not (planned / "summary.json").is_file():
        simulate(Simulation(sites, planned, study, until="plan"), console)
    simulate(Simulation(sites, out, study, until="train", planned=planned), console)
    return out


def evaluate_arm(arguments: argparse.Namespace, run: Path) -> dict[str, Any]:
    """Predict the test set with the global model; means over its cases and lesions, and the sites' diagnostics."""
    results = next((run / "sites" / "site_a" / "nnUNet_results").glob("*/*"))
    plans = json.loads((results / "plans.json").read_text())
    # plans that were adopted carry what the planning simulation agreed on
    thresholds = plans["federation"]["small_lesions"]
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(results), (0,), "checkpoint_global.pth")
    reader = predictor.plans_manager.image_reader_writer_class()
    labels, test = predictor.dataset_json["labels"], arguments.out / "data" / "test"
    cases, dice = [], []
    for image in track(sorted((test / "imagesTs").iterdir()), description=run.name):
        data, properties = reader.read_images([str(image)])
        reference, _ = reader.read_seg(str(test / "labelsTs" / image.name.replace("_0000", "")))
        predicted = predictor.predict_single_npy_array(data, properties, None, None, False)
        cases.append(evaluate(reference[0], predicted, properties["spacing"], labels, thresholds))
        masks = [array == labels["lesion"] for array in (predicted, reference[0])]
        dice.append(2 * float((masks[0] & masks[1]).sum()) / float(masks[0].sum() + masks[1].sum()))
    found = aggregate(cases)
    figures = {metric: found[metric]["lesion"] for metric in METRICS if metric in found}
    records = [
        json.loads(path.read_text()) for path in sorted(run.glob("sites/*/nnUNet_results/*/*/fold_*/federation.json"))
    ]
    rounds = {record["site"]: [entry["diagnostics"] for entry in record["rounds"]] for record in records}
    return {
        **figures,
        "dice": statistics.mean(dice),
        "false_positives": found["lesions"]["lesion"]["false_positives"],
        "lesions": found["lesions"]["lesion"],
        "diagnostics": rounds,
    }


def show(figures: dict[str, dict[str, Any]], console: Console) -> None:
    """Print a table of the arms, mean and spread over the seeds, and one of the diagnostics."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name, of_run in figures.items():
        arm, momentum, _ = name.rsplit("-", 2)
        groups.setdefault((momentum, arm), []).append(of_run)
    table = Table(title="Lesions of the test set: mean over the seeds, and their standard deviation")
    for column in ("momentum", "arm", "seeds", *METRICS):
        table.add_column(column, justify="right", overflow="fold")
    inside = Table(title="Diagnostics of each site: mean over rounds and seeds")
    for column in ("momentum", "arm", "site", *DIAGNOSTICS):
        inside.add_column(column, justify="right", overflow="fold")
    for (momentum, arm), runs in groups.items():
        cells = [_spread([run[metric] for run in runs], 1 if metric == "false_positives" else 3) for metric in METRICS]
        table.add_row(momentum, arm, str(len(runs)), *cells)
        for site in runs[0]["diagnostics"]:
            entries = [entry for run in runs for entry in run["diagnostics"][site] if entry]
            if entries:
                means = [statistics.mean(entry[name] for entry in entries) for name in DIAGNOSTICS]
                inside.add_row(momentum, arm, site, *(f"{mean:.3f}" for mean in means))
    console.print(table)
    console.print(inside)


def _spread(values: list[float], digits: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def main() -> None:
    """Run the arms that are missing, evaluate all, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("fedgs"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--momentum", type=float, nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()
    if not (arguments.out / "data").is_dir():
        write_phantom(arguments.out / "data", sites=3, cases=16, test_cases=36)
    figures = {}
    for seed in range(arguments.seeds):
        for momentum in arguments.momentum:
            for arm in ARMS:
                run = train(arguments, arm, momentum, seed)
                kept = run / "test.json"
                if not kept.is_file():
                    kept.write_text(json.dumps(evaluate_arm(arguments, run)))
                figures[run.name] = json.loads(kept.read_text())
    show(figures, Console())
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
