"""FedGS against FedAvg and against its controls, on the phantom: does it find more small lesions, and why?

Every arm trains on the same sites, plans and initial weights with the same budget, for each seed and momentum, and its
global model predicts the same test set of all scanners. Finished arms are kept and skipped on a second call.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from nnunet_fed.federation import Federation
from nnunet_fed.phantom import write_phantom
from nnunet_fed.simulate import Simulation, simulate

VARIANTS = ("fedgs", "fedgs_norm", "fedavg_gain", "fedavg_server_lr")
ARMS: dict[str, dict[str, Any]] = {"fedavg": {"name": "fedavg"}} | {
    variant: {"name": "fedgs", "variant": variant, "classes": ["lesion"]} for variant in VARIANTS
}
RATES = {0.9: 0.05, 0.99: 0.005}
"""Learning rate of each momentum: the same length of a step in the long run."""


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


def main() -> None:
    """Run the arms that are missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("fedgs"))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--momentum", type=float, nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not (arguments.out / "data").is_dir():
        write_phantom(arguments.out / "data", sites=3, cases=16, test_cases=36)
    for seed in range(arguments.seeds):
        for momentum in arguments.momentum:
            for arm in ARMS:
                train(arguments, arm, momentum, seed)


if __name__ == "__main__":
    main()
