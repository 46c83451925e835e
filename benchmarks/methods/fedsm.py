"""FedSM beside local training and FedAvg, on given sites; and who serves a site that nobody trained on.

Federations with equal budgets: ``pulled`` has the defaults, ``local`` no pull (``softpull_self_weight = 1``), so that
its personalized models are those of training alone, ``constant`` the constant pull. The global model of all of them is
that of FedAvg, bit for bit. ``--plot`` draws how far the personalized models are apart; ``--unseen`` routes the images
of a folder with the selector. Finished federations are kept and skipped on a second call.

    python benchmarks/methods/fedsm.py --site A=sites/A --site B=sites/B --out fedsm --json fedsm.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nnunet_fed.cli.option_values import named_folders
from nnunet_fed.simulation.simulate import Simulation, simulate
from nnunet_fed.study.federation import Federation

PULLS: dict[str, dict[str, Any]] = {
    "pulled": {},
    "local": {"softpull_self_weight": 1.0},
    "constant": {"softpull_schedule": "constant"},
}


def train(arguments: argparse.Namespace, pull: str) -> Path:
    """Simulate one federation unless it is there; returns its folder."""
    out: Path = arguments.out / pull
    if (out / "summary.json").is_file():
        return out
    sites, planned = named_folders(arguments.site), arguments.out / "planned"
    method = {
        "name": "fedsm", "selector_steps_per_round": arguments.selector_steps,
        "selector_header_features": arguments.header_features, **PULLS[pull],
    }  # fmt: skip
    study = Federation.model_validate(
        {
            "name": out.name, "sites": tuple(sites), "method": method, "planner": "nnUNetPlannerFedSmall",
            "rounds": arguments.rounds, "iterations_per_epoch": arguments.iterations, "val_iterations_per_epoch": 2,
            "initial_lr": 0.05, "momentum": 0.9,
        }
    )  # fmt: skip
    console = Console(stderr=True)
    if not (planned / "summary.json").is_file():
        simulate(Simulation(sites, planned, study, until="plan"), console)
    until = "train" if pull == "constant" else "validate"
    simulate(Simulation(sites, out, study, until=until, planned=planned), console)
    return out


def records_of(run: Path) -> dict[str, Any]:
    """Each site's record of a federation."""
    paths = sorted(run.glob("sites/*/nnUNet_results/*/*/fold_*/federation.json"))
    return {record["site"]: record for record in (json.loads(path.read_text()) for path in paths)}


def routes(model: Path, images: Path) -> dict[str, Any]:
    """What the selector does with images, without predicting them; seconds are for a case, reading left out."""
    from nnunet_fed.methods.selector import header_features
    from nnunet_fed.prediction.predictor import SuperModelPredictor

    predictor = SuperModelPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model))
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    reasons: Counter[str] = Counter()
    certainties, distances, seconds = [], [], []
    for image in sorted(images.iterdir()):
        data, _, _ = preprocessor.run_case(
            [str(image)], None, predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
        )
        header = None
        if predictor.router.needs_header:
            raw, properties = predictor.plans_manager.image_reader_writer_class().read_images([str(image)])
            header = header_features(raw, properties["spacing"])
        started = time.perf_counter()
        taken, probabilities = predictor.router.choose(torch.from_numpy(data), header)
        seconds.append(time.perf_counter() - started)
        reasons[f"{taken.choice} ({taken.reason})"] += 1
        certainties.append(max((probabilities or {"": 0.0}).values()))
        distances.append(taken.unfamiliarity or 0.0)
    return {
        "routes": dict(reasons), "certainty": statistics.mean(certainties),
        "unfamiliarity": [min(distances), statistics.median(distances), max(distances)],
        "seconds": statistics.median(seconds),
    }  # fmt: skip


def show(figures: dict[str, Any], console: Console) -> None:
    """Print the tables."""
    pulled = figures["pulled"]["summary"]
    local = figures["local"]["summary"] if "local" in figures else None
    table = Table(title=f"Validation Dice, {pulled['rounds']} rounds, one seed")
    columns = ("site", "cases", "local only", "FedAvg = global", "personal", "super")
    for column in columns:
        table.add_column(column, justify="right")
    rows = [*pulled["sites"].items(), ("mean", None)]
    for name, site in rows:
        dice = site["dice"] if site else pulled["mean_dice"]
        alone = None
        if local is not None:
            alone = (local["sites"][name]["dice"] if site else local["mean_dice"])["final"]
        values = (alone, dice["global"], dice["final"], dice["super"])
        cells = ["-" if value is None else f"{value:.4f}" for value in values]
        table.add_row(name, str(site["train_cases"] if site else ""), *cells)
    console.print(table)
    selector = pulled["selector"]
    console.print(
        f"Selector on the sites' validation cases: accuracy by site {selector['accuracy_by_site']}, confusion "
        f"{selector['confusion']}, share not above gamma {selector['share_routed_to_global']:.3f}, temperature "
        f"{selector['temperature']:.3g}"
    )
    for pull, found in figures.items():
        if pull in PULLS:
            curve = ", ".join(f"{value:.2e}" for value in found["deviation"])
            console.print(f"Deviation of the personalized models after each round, {pull}: {curve}")
    if "unseen" in figures:
        console.print(f"Images of a site that nobody trained on: {figures['unseen']}")


def plot(figures: dict[str, Any], path: Path) -> None:
    """Draw the deviation by round, for each schedule."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.4), layout="constrained")
    styles = {"pulled": ("lr_coupled", "-o"), "constant": ("constant", "--s")}
    for pull, (label, style) in styles.items():
        if pull not in figures:
            continue
        deviation = figures[pull]["deviation"]
        axes.semilogy(range(1, len(deviation) + 1), deviation, style, label=f"softpull_schedule = {label}")
    axes.set(xlabel="round", ylabel="deviation of the personalized models")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    """Run what is missing, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path, default=Path("fedsm"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--selector-steps", type=int, default=10, help="steps of the selector a round")
    parser.add_argument("--header-features", action="store_true")
    parser.add_argument("--federations", nargs="+", choices=list(PULLS), default=["pulled", "local"])
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot the deviation of the personalized models there")
    parser.add_argument("--unseen", type=Path, help="folder of images of another site")
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {}
    for pull in dict.fromkeys(["pulled", *arguments.federations]):
        run = train(arguments, pull)
        first = next(iter(records_of(run).values()))
        figures[pull] = {
            "summary": json.loads((run / "summary.json").read_text()),
            "deviation": [entry["diagnostics"]["deviation"] for entry in first["rounds"]],
            "bytes_sent_by_round": [entry["bytes_sent"] for entry in first["rounds"]],
        }
    if arguments.unseen:
        model = next((arguments.out / "pulled").glob("sites/*/nnUNet_results/*/nnUNetTrainerFedSM__*"))
        figures["unseen"] = routes(model, arguments.unseen)
    if arguments.plot:
        plot(figures, arguments.plot)
    show(figures, Console())
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
