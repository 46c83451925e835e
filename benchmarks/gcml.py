"""GCML beside training alone and FedAvg at equal budgets: Dice of each site on its own data, and bytes.

``--data phantom``: five sites of very different size, 4 to 40 training cases, so that the gain of the small ones is
seen; every site has 8 validation cases beside them. ``--data hippocampus``: a pooled data set in nnU-Net's raw layout
(``--source``), split by a column of its ``cases.csv``; the validation cases are those of nnU-Net's fold 0.

A budget is the number of steps of a site's own model: a mutual step costs GCML two plain ones or more
(``gcml_cost.py``), which a site alone could have spent on training longer. Finished simulations are kept and skipped on
a second call.

    python benchmarks/gcml.py --data hippocampus --source hippocampus --out gcml --json gcml.json
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

from nnunet_fed.federation import Federation
from nnunet_fed.phantom import write_phantom
from nnunet_fed.simulate import Simulation, simulate
from nnunet_fed.split import split_by_column

ARMS: dict[str, dict[str, Any]] = {
    "local": {"name": "local"},
    "fedavg": {"name": "fedavg"},
    "gcml_v1": {"name": "gcml", "contrast": "region"},
    "gcml_v3": {"name": "gcml", "contrast": "correctness"},
}
SIZES = (4, 8, 12, 24, 40)
"""Training cases of the phantom's sites."""
HELD_OUT = 8
WAYS = ("sent", "received")


def write_unequal_phantom(out: Path) -> None:
    """Sites of :data:`SIZES` training cases and :data:`HELD_OUT` validation cases each."""
    whole = out.with_name("whole")
    shutil.rmtree(whole, ignore_errors=True)
    folders = write_phantom(whole, sites=len(SIZES), cases=max(SIZES) + HELD_OUT, test_cases=1)
    for folder, size in zip(folders.values(), SIZES, strict=True):
        names = sorted(path.name for path in (folder / "labelsTr").iterdir())
        for name in names[size + HELD_OUT :]:
            (folder / "labelsTr" / name).unlink()
            for image in (folder / "imagesTr").glob(name.replace(".nii.gz", "_*")):
                image.unlink()
        cases = [name.removesuffix(".nii.gz") for name in names]
        split = {"train": cases[:size], "val": cases[size : size + HELD_OUT]}
        (folder / "splits_final.json").write_text(json.dumps([split]))
        description = json.loads((folder / "dataset.json").read_text())
        (folder / "dataset.json").write_text(json.dumps({**description, "numTraining": size + HELD_OUT}))
    shutil.rmtree(whole / "test")
    whole.rename(out)


def make_data(arguments: argparse.Namespace) -> None:
    """Write the sites' data sets unless they are there."""
    data: Path = arguments.out / "data"
    if data.is_dir():
        return
    if arguments.data == "phantom":
        write_unequal_phantom(data)
    else:
        split_by_column(arguments.source, data, arguments.column, arguments.limit)


def train(arguments: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """Simulate one arm unless it is there; returns its summary."""
    out: Path = arguments.out / f"{arm}-{seed}"
    if not (out / "summary.json").is_file():
        shutil.rmtree(out, ignore_errors=True)  # an earlier call was stopped in the middle
        sites = {folder.name: folder for folder in sorted((arguments.out / "data").iterdir())}
        planned: Path = arguments.out / "planned"
        study = Federation.model_validate(
            {
                "name": out.name, "sites": tuple(sites), "method": ARMS[arm], "planner": "nnUNetPlannerFedSmall",
                "rounds": arguments.rounds, "iterations_per_epoch": arguments.iterations,
                "val_iterations_per_epoch": 2, "initial_lr": 0.05, "momentum": 0.9, "seed": seed,
            }
        )  # fmt: skip
        console = Console(stderr=True)
        if not (planned / "summary.json").is_file():
            shutil.rmtree(planned, ignore_errors=True)
            simulate(Simulation(sites, planned, study, until="plan"), console)
        simulate(Simulation(sites, out, study, planned=planned), console)
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    records = [json.loads(path.read_text()) for path in out.glob("sites/*/nnUNet_results/*/*/fold_*/federation.json")]
    phases = {record["site"]: len(record.get("mutual_phases", [])) for record in records}
    return {**summary, "mutual_phases": phases}


def show(figures: dict[str, dict[str, Any]], console: Console) -> None:
    """Print the Dice of each site by arm, mean and spread over the seeds, and the bytes."""
    runs = {arm: [found for name, found in figures.items() if name.rpartition("-")[0] == arm] for arm in ARMS}
    runs = {arm: of_arm for arm, of_arm in runs.items() if of_arm}
    first = next(iter(runs.values()))
    table = Table(title=f"Validation Dice, {first[0]['rounds']} rounds: mean over {len(first)} seeds, their deviation")
    for column in ("site", "training cases", *runs):
        table.add_column(column, justify="right")
    for site, facts in sorted(first[0]["sites"].items(), key=lambda item: item[1]["train_cases"]):
        cells = [_spread([run["sites"][site]["dice"]["final"] for run in of_arm]) for of_arm in runs.values()]
        table.add_row(site, str(facts["train_cases"]), *cells)
    means = [_spread([run["mean_dice"]["final"] for run in of_arm]) for of_arm in runs.values()]
    table.add_row("mean", "", *means)
    console.print(table)
    moved = Table(title="MB sent by a site and received, mutual phases of a site: mean over sites and seeds")
    for column in ("arm", "sent", "received", "phases"):
        moved.add_column(column, justify="right")
    for arm, of_arm in runs.items():
        sites = [site for run in of_arm for site in run["sites"].values()]
        cells = [f"{statistics.mean(site[f'bytes_{way}'] or 0 for site in sites) / 1e6:.1f}" for way in WAYS]
        phases = statistics.mean(number for run in of_arm for number in run["mutual_phases"].values())
        moved.add_row(arm, *cells, f"{phases:.1f}")
    console.print(moved)


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


def main() -> None:
    """Run the arms that are missing, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("hippocampus", "phantom"), default="phantom")
    parser.add_argument("--source", type=Path, help="hippocampus: folder of the pooled data set")
    parser.add_argument("--column", default="intensity_group", help="hippocampus: of cases.csv, that names the site")
    parser.add_argument("--limit", type=int, default=24, help="hippocampus: at most so many cases of a site")
    parser.add_argument("--out", type=Path, default=Path("gcml"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()
    if arguments.data == "hippocampus" and arguments.source is None:
        parser.error("--data hippocampus needs --source, the folder of the pooled data set")
    arguments.out = arguments.out / arguments.data
    arguments.out.mkdir(parents=True, exist_ok=True)
    make_data(arguments)
    figures = {}
    for seed in range(arguments.seeds):
        for arm in arguments.arms:
            figures[f"{arm}-{seed}"] = train(arguments, arm, seed)
            if arguments.json:
                arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    show(figures, Console())


if __name__ == "__main__":
    main()
