"""FedSM's selector alone: how well it tells sites apart whose data a simulation has planned and preprocessed.

Every fifth case of each site is kept for validation; the sites are threads and exchange gradients only.

    nnunet_fed simulate --site A=sites/A --site B=sites/B --until plan --out planned
    python benchmarks/methods/selector.py planned
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from rich.console import Console
from rich.table import Table

from nnunet_fed.exchange.communicator import LocalCommunicator, LocalFederation
from nnunet_fed.methods.selector import (
    SelectorCase,
    SelectorConfiguration,
    case_log_probabilities,
    draw_patches,
    header_features,
)
from nnunet_fed.methods.selector_training import SelectorTraining
from nnunet_fed.methods.selector_validation import SelectorValidation, validate_selector


def cases_of(site: Path, sites: int, headers: bool) -> tuple[SelectorConfiguration, list[SelectorCase]]:
    """The cases of one site of a simulation, as the selector sees them."""
    plans_file = next((site / "nnUNet_preprocessed").glob("*/*Plans.json"))
    plans = json.loads(plans_file.read_text())
    dataset = json.loads((plans_file.parent / "dataset.json").read_text())
    chosen = plans["configurations"][plans["federation"]["study"]["configuration"]]
    folder = plans_file.parent / chosen["data_identifier"]
    configuration = SelectorConfiguration(
        len(dataset["channel_names"]), sites, tuple(chosen["patch_size"]), header_features=headers
    )
    stored = infer_dataset_class(str(folder))(str(folder), None)
    raw = next((site / "nnUNet_raw").iterdir())
    files = get_filenames_of_train_images_and_targets(str(raw), dataset)
    cases = []
    for name in sorted(stored.identifiers):
        patches = draw_patches(torch.from_numpy(stored.load_case(name)[0][:]), configuration)
        header = None
        if headers:
            images = files[name]["images"]
            reader = determine_reader_writer_from_dataset_json(dataset, images[0], verbose=False)()
            image, properties = reader.read_images(images)
            header = header_features(image, properties["spacing"])
        cases.append(SelectorCase(patches, header))
    return configuration, cases


def measure(planned: Path, headers: bool, steps: int, seed: int) -> tuple[SelectorValidation, float]:
    """Train and validate one selector; returns what the federation finds, and the seconds of the training."""
    folders = {folder.name: folder for folder in sorted((planned / "sites").iterdir())}
    loaded = {name: cases_of(folder, len(folders), headers) for name, folder in folders.items()}
    started = time.perf_counter()

    def run(communicator: LocalCommunicator) -> SelectorValidation:
        configuration, cases = loaded[communicator.site]
        training = SelectorTraining(configuration, seed)
        kept = [case for number, case in enumerate(cases) if number % 5]
        training.train(communicator, "round-0000", kept, 1.0, steps)
        return validate_selector(communicator, "end", case_log_probabilities(training.network, cases[::5]), gamma=0.9)

    found = next(iter(LocalFederation(list(folders), deadline=3600).run(run).values()))
    return found, time.perf_counter() - started


def main() -> None:
    """Train the selectors and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("planned", type=Path, help="folder of a simulation")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title=f"Validation of the selector after {arguments.steps} steps")
    for column in ("header features", "seed", "accuracy by site", "worst", "confusion", "not above gamma", "seconds"):
        table.add_column(column, justify="right", overflow="fold")
    figures: list[dict[str, Any]] = []
    for headers in (False, True):
        for seed in range(arguments.seeds):
            found, seconds = measure(arguments.planned, headers, arguments.steps, seed)
            by_site = {site: float(np.round(value or 0.0, 4)) for site, value in found.accuracy_by_site.items()}
            figures.append({"headers": headers, "seed": seed, "accuracy": by_site, "confusion": found.confusion})
            listed = ", ".join(f"{site} {value:.3f}" for site, value in by_site.items())
            table.add_row(
                "yes" if headers else "no", str(seed), listed, f"{min(by_site.values()):.3f}", str(found.confusion),
                f"{found.share_routed_to_global:.3f}", f"{seconds:.0f}",
            )  # fmt: skip
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
