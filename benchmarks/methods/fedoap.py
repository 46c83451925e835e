"""FedOAP beside training alone and FedAvg, on the phantom with another organ at every site.

Three sites train; a fourth takes the shared weights afterwards and fine-tunes alone. Every arm has the same sites,
plans, budget and fine-tuning: so FedAvg after fine-tuning is the control that FedOAP has to beat. The perturbed
boundary loss is switched off, and its constants are varied, in fine-tunings that begin at the same federated model.
What is finished is kept and skipped on a second call.

    python benchmarks/methods/fedoap.py --out fedoap --seeds 3 --sweep --json fedoap.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nnunet_fed.datasets.phantom import write_phantom
from nnunet_fed.simulation.reuse_plans import adopt
from nnunet_fed.simulation.simulate import Simulation, simulate, site_environment, training_command
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.toml import to_toml

ARMS = ("local", "fedavg", "fedoap")
OFF: dict[str, float] = {"perturbation_weight": 0.0}
SWEEP = ({"sigma": 3.0}, {"perturbation_weight": 0.5}, {"sigma": 3.0, "perturbation_weight": 0.5})
SITES = ("site_a", "site_b", "site_c")
UNSEEN = "site_d"
LABELS = {"lesion": ("lesion",)}
MAPPED = 2
Dice = dict[str, float | None]


def study_of(arguments: argparse.Namespace, arm: str, seed: int) -> Federation:
    """The study of an arm; all have the same budget."""
    return Federation.model_validate(
        {
            "name": f"{arm}-{seed}", "sites": SITES, "planner": "nnUNetPlannerFedSmall", "seed": seed,
            "method": {"name": arm, "finetune_epochs": arguments.finetune_epochs}, "rounds": arguments.rounds,
            "iterations_per_epoch": arguments.iterations, "val_iterations_per_epoch": 10, "initial_lr": 0.05,
            "momentum": 0.9, "plans_name": "nnUNetFedSmallPlans",
        }
    )  # fmt: skip


def train(arguments: argparse.Namespace, arm: str, seed: int) -> Path:
    """Simulate one arm unless it is there; returns its folder."""
    out: Path = arguments.out / f"{arm}-{seed}"
    planned = arguments.out / "planned"
    sites = {site: arguments.out / "data" / site for site in SITES}
    maps = dict.fromkeys(SITES, LABELS)
    console = Console(stderr=True)
    if not (planned / "summary.json").is_file():
        study = study_of(arguments, "fedoap", 0)
        simulate(Simulation(sites, planned, study, until="plan", labels=maps), console)
    if not (out / "summary.json").is_file():
        shutil.rmtree(out, ignore_errors=True)
        simulate(Simulation(sites, out, study_of(arguments, arm, seed), planned=planned, labels=maps), console)
    return out


def finetune_again(arguments: argparse.Namespace, run: Path, changes: Mapping[str, float]) -> Dice:
    """Dice by site after another fine-tuning of a run's federated models, with other constants."""
    name = "-".join(f"{option}_{value:g}" for option, value in changes.items())
    started, found = {}, {}
    for site in SITES:
        folder = run / "finetuned" / name / site
        if not list(folder.glob(f"nnUNet_results/*/*/fold_0/{SUMMARY}")):
            shutil.rmtree(folder, ignore_errors=True)
            started[site] = _continue_from_rounds(run, site, folder, changes)
    for site, process in started.items():
        if process.wait() != 0:
            raise SystemExit(f"the fine-tuning of {site} failed: {run / 'finetuned' / name / site / 'train.log'}")
    for site in SITES:
        found[site] = dice_of(next((run / "finetuned" / name / site).glob("nnUNet_results/*/*/fold_0")))
    return found


def _continue_from_rounds(run: Path, site: str, folder: Path, changes: Mapping[str, float]) -> subprocess.Popen[bytes]:
    source = run / "sites" / site
    folder.mkdir(parents=True)
    for name in ("nnUNet_raw", "site.toml"):
        (folder / name).symlink_to((source / name).resolve())
    dataset = next((source / "nnUNet_preprocessed").glob(f"Dataset{MAPPED:03d}_*"))
    target = folder / "nnUNet_preprocessed" / dataset.name
    target.mkdir(parents=True)
    for entry in dataset.iterdir():
        (target / entry.name).symlink_to(entry.resolve())
    plans_file = next(target.glob("*Plans.json"))
    plans = json.loads(plans_file.read_text())
    plans_file.unlink()
    plans["federation"]["study"]["method"].update(changes)
    plans_file.write_text(json.dumps(plans))
    study = Federation.model_validate(plans["federation"]["study"])
    results = next(source.glob("nnUNet_results/*/*/fold_0"))
    fold = folder / results.relative_to(source)
    fold.mkdir(parents=True)
    shutil.copy(results / "checkpoint_federated.pth", fold / "checkpoint_latest.pth")
    return _start(folder, [*training_command(study, 0, "cpu", MAPPED), "--c"], "train.log")


def unseen(arguments: argparse.Namespace, run: Path) -> Dice:
    """Dice of the site that did not take part: with the run's weights, and after its fine-tuning alone."""
    study = Federation.read(run / "federation.toml")
    folder = run / "unseen"
    if not list(folder.glob(f"nnUNet_results/*/*/fold_0/{SUMMARY}")):
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("nnUNet_raw", "nnUNet_results"):
            (folder / name).mkdir(parents=True)
        adopt(_plan_unseen(arguments), folder, study)
        with _coordinator(run, study) as address:
            (folder / "site.toml").write_text(to_toml({"name": UNSEEN, "coordinator": address, "insecure": True}))
            _finish(folder, training_command(study, 0, "cpu", MAPPED), "train.log")
    fold = next(folder.glob("nnUNet_results/*/*/fold_0"))
    before = fold / ("federated" if "FedOAP" in fold.parent.name else "global")
    return {"before": dice_of(before), "after": dice_of(fold)}


def _plan_unseen(arguments: argparse.Namespace) -> Path:
    """Let the unseen site take the plans of those that have planned, unless it has; returns its folder."""
    folder: Path = arguments.out / "unseen"
    if list(folder.glob("nnUNet_preprocessed/*/*Plans.json")):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (folder / name).mkdir(parents=True)
    (folder / "nnUNet_raw" / "Dataset001_unseen").symlink_to((arguments.out / "data" / UNSEEN).resolve())
    planned = arguments.out / "planned"
    with _coordinator(planned, Federation.read(planned / "federation.toml")) as address:
        settings = {"name": UNSEEN, "coordinator": address, "insecure": True, "mapped_dataset": MAPPED}
        (folder / "site.toml").write_text(to_toml({**settings, "labels": LABELS}))
        plan = [sys.executable, "-m", "nnunet_fed", "plan_and_preprocess", "-d", "1", "-np", "1", "--join"]
        _finish(folder, plan, "plan.log")
    return folder


@contextmanager
def _coordinator(run: Path, study: Federation) -> Iterator[str]:
    """Serve a finished run again, with the unseen site among its sites."""
    file = run / "with-unseen.toml"
    file.write_text(to_toml({**study.model_dump(mode="json"), "sites": [*SITES, UNSEEN]}))
    address = "127.0.0.1:7469"
    command = [sys.executable, "-m", "nnunet_fed", "coordinator", str(file), "--listen", address, "--insecure"]
    process = subprocess.Popen([*command, "--state", str(run / "coordinator")], stderr=subprocess.DEVNULL)
    try:
        yield address
    finally:
        process.terminate()
        process.wait()


def _finish(folder: Path, command: list[str], log: str) -> None:
    if _start(folder, command, log).wait() != 0:
        raise SystemExit(f"a command of the unseen site failed: {folder / log}")


def _start(folder: Path, command: list[str], log: str) -> subprocess.Popen[bytes]:
    settings = {**site_environment(folder, 1), "nnUNet_n_proc_DA": "0"}
    if "plan_and_preprocess" in command:  # stock planning fails with 0
        del settings["nnUNet_n_proc_DA"]
    with (folder / log).open("wb") as file:
        return subprocess.Popen(command, env=settings, stdout=file, stderr=subprocess.STDOUT)


SUMMARY = "validation/summary.json"


def dice_of(fold: Path) -> float | None:
    """Mean foreground Dice of nnU-Net's validation."""
    value: float | None = json.loads((fold / SUMMARY).read_text())["foreground_mean"]["Dice"]
    return value


def measure(arguments: argparse.Namespace, seed: int) -> dict[str, dict[str, Any]]:
    """All figures of one seed: Dice by arm and site."""
    found: dict[str, dict[str, Any]] = {}
    for arm in ARMS:
        run = train(arguments, arm, seed)
        sites = json.loads((run / "summary.json").read_text())["sites"]
        rounds = "federated" if arm == "fedoap" else "global"
        # training alone has nothing to give to a new site: there it trains from the start, and once is enough
        newcomer = unseen(arguments, run) if arm != "local" or seed == 0 else {"before": None, "after": None}
        found[f"{arm}, rounds only"] = {site: sites[site]["dice"][rounds] for site in SITES}
        found[f"{arm}, fine-tuned"] = {site: sites[site]["dice"]["final"] for site in SITES}
        found[f"{arm}, rounds only"][UNSEEN] = newcomer["before"]
        found[f"{arm}, fine-tuned"][UNSEEN] = newcomer["after"]
    run = arguments.out / f"fedoap-{seed}"
    found["fedoap, fine-tuned, no perturbation"] = finetune_again(arguments, run, OFF)
    if arguments.sweep and seed == 0:
        for changes in SWEEP:
            name = ", ".join(f"{option} {value:g}" for option, value in changes.items())
            found[f"fedoap, fine-tuned, {name}"] = finetune_again(arguments, run, changes)
    return found


def show(figures: dict[str, dict[str, dict[str, Any]]], arguments: argparse.Namespace, console: Console) -> None:
    """Print mean and standard deviation over the seeds."""
    budget = f"{arguments.rounds} rounds of {arguments.iterations} steps, {arguments.finetune_epochs} epochs alone"
    table = Table(title=f"Validation Dice of the lesion, {budget}, {len(figures)} seeds")
    table.add_column("arm")
    for column in (*SITES, "mean", f"{UNSEEN} (unseen)"):
        table.add_column(column, justify="right")
    for arm in dict.fromkeys(arm for found in figures.values() for arm in found):
        runs = [found[arm] for found in figures.values() if arm in found]
        cells = [_spread([run.get(site) for run in runs]) for site in SITES]
        means = [statistics.mean(run[site] or 0.0 for site in SITES) for run in runs]
        table.add_row(arm, *cells, _spread(means), _spread([run.get(UNSEEN) for run in runs]))
    console.print(table)


def _spread(values: list[float | None]) -> str:
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    deviation = f" ± {statistics.stdev(there):.3f}" if len(there) > 1 else ""
    return f"{statistics.mean(there):.3f}{deviation}"


def main() -> None:
    """Run what is missing, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("fedoap"))
    parser.add_argument("--cases", type=int, default=20, help="of each site")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--finetune-epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sweep", action="store_true", help="vary sigma and lambda, with the first seed")
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    if not (arguments.out / "data").is_dir():
        write_phantom(arguments.out / "data", sites=len(SITES) + 1, cases=arguments.cases, organs=True)
    figures = {str(seed): measure(arguments, seed) for seed in range(arguments.seeds)}
    show(figures, arguments, Console())
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
