"""A federation from nothing to a Dice table: data, planning, training, validation, and the prediction of a test set.

Without ``--data`` the built-in phantom at three sites; with it a data set in nnU-Net's raw layout, split at random
over three sites (or, if the folder holds such data sets, its subfolders as sites). Every step is a command of
nnunet_fed or of nnU-Net, which is shown before it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nnunet_fed.simulation.simulate import plugin_folder

PLANS = "nnUNetFedSmallPlans"
TRAINER = "nnUNetTrainerFedAvg"


def run(*command: str | Path, **variables: str | Path) -> None:
    """Show a command, run it, and end with it if it fails."""
    words = [str(word) for word in command]
    Console().print(f"[bold]$ {shlex.join([Path(words[0]).name, *words[1:]])}[/bold]", highlight=False, soft_wrap=True)
    beside = Path(sys.executable).parent / words[0]
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    status = subprocess.run([str(beside), *words[1:]], env=environment, check=False).returncode
    if status:
        sys.exit(status)


def site_folders(data: Path | None, out: Path) -> list[Path]:
    """Raw data sets of the sites, made below ``out`` unless ``data`` holds them already."""
    if data is None:
        run("nnunet_fed", "phantom", out / "data", "--sites", "3")
        return sorted(folder for folder in (out / "data").iterdir() if folder.name != "test")
    if (data / "dataset.json").is_file():
        run("nnunet_fed", "split", data, out / "data", "--sites", "3", "--limit", "16")
        return sorted((out / "data").iterdir())
    return sorted(folder for folder in data.iterdir() if (folder / "dataset.json").is_file())


def predict(images: Path, references: Path, out: Path, site: Path) -> dict[str, float]:
    """Predict a test set with nnU-Net's commands and the model of one site; returns the Dice by label."""
    dataset = next((site / "nnUNet_preprocessed").iterdir())
    paths = {name: site / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    model = ("-d", "1", "-c", "3d_fullres", "-f", "0", "-tr", TRAINER, "-p", PLANS, "-device", "cpu")
    predictions = out / "predictions"
    run("nnUNetv2_predict", "-i", images, "-o", predictions, *model, "-npp", "1", "-nps", "1",
        nnUNet_extTrainer=plugin_folder(), **paths)  # fmt: skip
    if not references.is_dir():
        Console().print(f"The predictions are in {predictions}.")
        return {}
    run("nnUNetv2_evaluate_folder", references, predictions, "-djfile", predictions / "dataset.json",
        "-pfile", predictions / "plans.json", "-np", "1", **paths)  # fmt: skip
    labels = {str(value): name for name, value in json.loads((dataset / "dataset.json").read_text())["labels"].items()}
    means = json.loads((predictions / "summary.json").read_text())["mean"]
    return {labels.get(label, label): values["Dice"] for label, values in means.items()}


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a data set, or a folder of data sets, in nnU-Net's raw layout")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="made anew each time")
    parser.add_argument("--rounds", default="8")
    parser.add_argument("--iterations", default="30")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    if {path.name for path in arguments.out.glob("*")} - {"data", "run", "predictions"}:
        sys.exit(f"Error: {arguments.out} holds something else than a demonstration; choose another --out.")
    shutil.rmtree(arguments.out, ignore_errors=True)
    folders = site_folders(arguments.data, arguments.out)
    sites = [word for folder in folders for word in ("--site", f"{folder.name}={folder}")]
    result = arguments.out / "run"
    budget = ["--rounds", arguments.rounds, "--iterations", arguments.iterations, "--val-iterations", "4"]
    run("nnunet_fed", "simulate", *sites, *budget, "--lr", "0.05", "--momentum", "0.9", "--out", result)
    figures = {"summary": json.loads((result / "summary.json").read_text()), "test": {}}

    root = arguments.data if arguments.data is not None else arguments.out / "data" / "test"
    if (root / "imagesTs").is_dir():
        first = result / "sites" / folders[0].name
        figures["test"] = predict(root / "imagesTs", root / "labelsTs", arguments.out, first)
        table = Table("label", "Dice", title="Test set")
        for label, dice in figures["test"].items():
            table.add_row(label, f"{dice:.3f}")
        if figures["test"]:
            Console().print(f"\nPredicted at {folders[0].name} with its checkpoint_final.pth:")
            Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
