"""Plans of a federation against nnU-Net's plans for the pooled data: every key, and what the network carried.

For each data set, stock nnU-Net extracts the fingerprint of the pool and plans from it; then the sites, each with its
part, plan together (as threads, through a communicator that counts). Names of data set, plans and planner, the file
reader, data identifiers and the study are left out; all other keys must be identical, bit for bit, except mean and
standard deviation of the intensities: nnU-Net's, summed in float32, to 1e-6, and float64's over the pool to 1e-12.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncL,
    nnUNetPlannerResEncM,
    nnUNetPlannerResEncXL,
)
from rich.console import Console
from rich.table import Table
from skimage import io

from nnunet_fed.agreement.fingerprint import LocalFingerprint
from nnunet_fed.agreement.plan_digest import comparable, differences
from nnunet_fed.datasets.split import split_at_random, split_by_column
from nnunet_fed.exchange.communicator import LocalCommunicator, LocalFederation
from nnunet_fed.planners import planning
from nnunet_fed.planners.extraction import extract
from nnunet_fed.study.federation import Federation

STOCK: dict[str, Any] = {
    "nnUNetPlannerFed": ExperimentPlanner,
    "nnUNetPlannerFedResEncM": nnUNetPlannerResEncM,
    "nnUNetPlannerFedResEncL": nnUNetPlannerResEncL,
    "nnUNetPlannerFedResEncXL": nnUNetPlannerResEncXL,
}
REAL = ("scgm_cc0", "hippocampus", "nuclei")
INTENSITIES = "foreground_intensity_properties_per_channel"
POOL = 1


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    data: str
    sites: int
    cases: int
    samples: int
    """Pooled foreground intensities of a channel."""
    planner: str
    geometry: str
    keys: int
    """Leaves of the plans that are compared."""
    different: list[str]
    """Where they differ, intensity mean and standard deviation aside."""
    to_stock: float
    """Largest relative difference of intensity mean and standard deviation from nnU-Net's."""
    to_float64: float
    """The same from float64's over the pooled samples."""
    collectives: int
    bytes_sent: int
    """By the site that sends most."""
    seconds: float
    """For all sites on this machine, without extraction."""

    @property
    def equal(self) -> bool:
        """Whether all of it is as promised."""
        return not self.different and self.to_stock <= 1e-6 and self.to_float64 <= 1e-12


class Counting(LocalCommunicator):
    """A communicator that counts what its site sends."""

    def __init__(self, federation: LocalFederation, site: str):
        super().__init__(federation, site)
        self.collectives = 0
        self.bytes_sent = 0

    def sum(self, key: str, array: Any) -> Any:
        """See :meth:`nnunet_fed.exchange.communicator.Collectives.sum`."""
        self.collectives += 1
        self.bytes_sent += np.asarray(array).nbytes
        return super().sum(key, array)

    def gather(self, key: str, value: Any) -> dict[str, Any]:
        """See :meth:`nnunet_fed.exchange.communicator.Collectives.gather`."""
        self.collectives += 1
        self.bytes_sent += len(json.dumps(value).encode())
        return super().gather(key, value)


# ----------------------------------------------------------------------------------------------------------------- data


def write_random(
    folder: Path, seed: int, spacings: Sequence[Sequence[float]], cases: int, channels: Sequence[str] = ("MRI",)
) -> None:
    """Random images of boxes, 2D or 3D as the spacings (x, y, z) are; the first case has no foreground."""
    rng = np.random.default_rng(seed)
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for case in range(cases):
        spacing = [float(step) for step in spacings[rng.integers(len(spacings))]]
        size = np.maximum(16, rng.uniform(40, 80, len(spacing)) / spacing).astype(int)[::-1]
        labels = np.zeros(size, np.uint8)
        if case:
            labels[tuple(slice(length // 4, length // 2) for length in size)] = 1 + case % 2
        arrays = {f"labelsTr/case_{case:03d}": labels}
        for channel in range(len(channels)):
            image = rng.normal(100 * channel + 40 * labels, 20).astype(np.float32)
            image[:3] = 0  # something to crop
            arrays[f"imagesTr/case_{case:03d}_{channel:04d}"] = image
        for name, array in arrays.items():
            volume = sitk.GetImageFromArray(array)
            volume.SetSpacing(spacing)
            sitk.WriteImage(volume, str(folder / f"{name}.nii.gz"))
    content = {
        "channel_names": {str(number): name for number, name in enumerate(channels)},
        "labels": {"background": 0, "organ": 1, "lesion": 2},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content), encoding="utf-8")


def write_colours(folder: Path, seed: int, cases: int) -> None:
    """Random pictures of boxes as nnU-Net documents colours: one PNG a case, and three channels."""
    rng = np.random.default_rng(seed)
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for case in range(cases):
        size = rng.integers(64, 200, 2)
        labels = np.zeros(size, np.uint8)
        labels[tuple(slice(length // 4, length // 2) for length in size)] = 1
        picture = rng.normal([60, 90, 120] + 60 * labels[..., None], 10).clip(0, 255).astype(np.uint8)
        io.imsave(folder / "imagesTr" / f"case_{case:03d}_0000.png", picture, check_contrast=False)
        io.imsave(folder / "labelsTr" / f"case_{case:03d}.png", labels, check_contrast=False)
    content = {
        "channel_names": {"0": "R", "1": "G", "2": "B"},
        "labels": {"background": 0, "nucleus": 1},
        "numTraining": cases,
        "file_ending": ".png",
    }
    (folder / "dataset.json").write_text(json.dumps(content), encoding="utf-8")


def pool_of(sites: Sequence[Path], pool: Path) -> dict[str, list[str]]:
    """Link the cases of several data sets into one; returns the sites' cases."""
    for name in ("imagesTr", "labelsTr"):
        (pool / name).mkdir(parents=True)
        for site in sites:
            for file in (site / name).iterdir():
                (pool / name / file.name).symlink_to(file)
    content = json.loads((sites[0] / "dataset.json").read_text(encoding="utf-8"))
    ending = content["file_ending"]
    cases = {site.name: [file.name.removesuffix(ending) for file in (site / "labelsTr").iterdir()] for site in sites}
    content["numTraining"] = sum(map(len, cases.values()))
    (pool / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    return cases


def pooled_and_split(name: str, data: Path, folder: Path) -> dict[str, list[str]]:
    """Put the pool of a data set and its sites' parts into ``folder``; returns the sites' cases."""
    pool, parts = folder / "pool", folder / "parts"
    if name == "hippocampus":
        pool.symlink_to((data / name).resolve())
        return split_by_column(pool, parts, "intensity_group")
    if name == "nuclei":
        pool.symlink_to((data / name).resolve())
        return split_by_column(pool, parts, "group")
    if name == "RGB phantom":
        write_colours(pool, 3, cases=9)
        return split_at_random(pool, parts, sites=3)
    if name == "scgm_cc0":
        parts.symlink_to((data / name).resolve())
        return pool_of(sorted(file.parent for file in parts.glob("*/dataset.json")), pool)
    if name == "2D phantom":
        write_random(pool, 1, [(1.0, 0.8), (1.0, 1.3), (0.5, 0.5)], cases=10)
        return split_at_random(pool, parts, sites=3)
    if name == "CT and MRI phantom":
        write_random(pool, 2, [(1.0, 1.0, 1.2), (0.8, 0.8, 1.2), (1.1, 1.1, 1.1)], 9, channels=("CT", "MRI"))
        return split_at_random(pool, parts, sites=3)
    seed = int(name.removeprefix("random "))
    rng = np.random.default_rng(seed)
    thickness = rng.choice([1.0, 5.0])
    spacings = rng.uniform([0.5, 0.5, 0.8 * thickness], [1.5, 1.5, 1.5 * thickness], (4, 3))
    sites = int(rng.integers(2, 6))
    write_random(pool, seed, spacings.tolist(), cases=int(rng.integers(sites + 2, 15)))
    return split_at_random(pool, parts, sites, alpha=0.5, seed=seed)


# ----------------------------------------------------------------------------------------------------------- comparison


def number_of_leaves(value: Any) -> int:
    """Values in nested tables; a list is one."""
    return sum(map(number_of_leaves, value.values())) if isinstance(value, dict) and value else 1


def moments_apart(intensities: dict[str, Any], expected: dict[str, Any]) -> float:
    """Largest relative difference of means and standard deviations; removes them from both."""
    apart = [0.0]
    for channel, properties in expected.items():
        for key in ("mean", "std"):
            right = properties.pop(key)
            apart.append(abs(intensities[channel].pop(key) - right) / max(abs(right), sys.float_info.min))
    return max(apart)


def moments_of(sites: Sequence[LocalFingerprint]) -> dict[str, Any]:
    """Float64 mean and standard deviation of the pooled samples."""
    channels = zip(*(site.intensities for site in sites), strict=True)
    pooled = (np.concatenate(channel) for channel in channels)
    return {
        str(number): {"mean": float(values.mean(dtype=np.float64)), "std": float(values.std(dtype=np.float64))}
        for number, values in enumerate(pooled)
    }


def compare(name: str, data: Path, planners: Sequence[str], show: Callable[[Row], None]) -> None:
    """Plan one data set with every planner and both geometries; ``show`` is called with each line."""
    with tempfile.TemporaryDirectory(prefix="nnunet_fed_plans_") as temporary, redirect_stdout(StringIO()):
        folder = Path(temporary)
        for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            (folder / variable).mkdir()
            os.environ[variable] = str(folder / variable)
        parts = pooled_and_split(name, data, folder)
        ids = {site: number for number, site in enumerate(parts, start=POOL + 1)}
        (folder / "nnUNet_raw" / f"Dataset{POOL:03d}_Pool").symlink_to(folder / "pool")
        for site, number in ids.items():
            (folder / "nnUNet_raw" / f"Dataset{number:03d}_{site}").symlink_to(folder / "parts" / site)
        cases = sum(map(len, parts.values()))

        DatasetFingerprintExtractor(POOL, 2).run(overwrite_existing=True)
        local = {number: extract(number, cases, 2) for number in ids.values()}
        float64 = moments_of(list(local.values()))
        planning.extract = lambda number, total_cases, processes: local[number]
        samples = sum(len(site.intensities[0]) for site in local.values())
        for planner in planners:
            stock = comparable(STOCK[planner](POOL).plan_experiment())
            for geometry in ("private", "lists"):
                show(_row(name, ids, cases, samples, planner, geometry, json.dumps(stock), json.dumps(float64)))


def _row(
    name: str, ids: dict[str, int], cases: int, samples: int, planner: str, geometry: str, stock: str, float64: str
) -> Row:
    settings = {"name": "equality", "sites": list(ids), "method": {"name": "fedavg"}, "rounds": 1}
    study = Federation.model_validate({**settings, "planner": planner, "geometry": geometry})
    federation = LocalFederation(list(ids), deadline=3600)

    def site(communicator: LocalCommunicator) -> tuple[str, Counting]:
        counting = Counting(federation, communicator.site)
        return json.dumps(comparable(planning.agree(counting, study, ids[counting.site], 1).plans)), counting

    began = time.perf_counter()
    answers = federation.run(site)
    seconds = time.perf_counter() - began
    (text,) = {plans for plans, _ in answers.values()}
    plans, expected, exact = json.loads(text), json.loads(stock), json.loads(float64)
    to_float64 = moments_apart(json.loads(text)[INTENSITIES], exact)
    to_stock = moments_apart(plans[INTENSITIES], expected[INTENSITIES])
    counted = [communicator for _, communicator in answers.values()]
    return Row(
        name,
        len(ids),
        cases,
        samples,
        planner,
        geometry,
        number_of_leaves(expected),
        differences({"stock": expected, "federation": plans}),
        to_stock,
        to_float64,
        max(communicator.collectives for communicator in counted),
        max(communicator.bytes_sent for communicator in counted),
        seconds,
    )


# --------------------------------------------------------------------------------------------------------------- output


def table_of(rows: Sequence[Row]) -> Table:
    """All lines."""
    table = Table(title="The sites' plans against nnU-Net's plans for the pooled data")
    for column in ("data", "sites", "cases", "samples", "planner", "geometry"):
        table.add_column(column, justify="right" if column in ("sites", "cases", "samples") else "left")
    for column in ("equal keys", "mean, std\nto stock", "mean, std\nto float64", "rounds", "kB sent\nby a site", "s"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.data,
            str(row.sites),
            str(row.cases),
            f"{row.samples:.0e}",
            row.planner.removeprefix("nnUNetPlanner"),
            row.geometry,
            f"{row.keys - len(row.different)}/{row.keys}",
            f"{row.to_stock:.1e}",
            f"{row.to_float64:.1e}",
            str(row.collectives),
            f"{row.bytes_sent / 1000:.1f}",
            f"{row.seconds:.1f}",
            style=None if row.equal else "red",
        )
    return table


def main() -> None:
    """Read the arguments, compare and print; exit status 1 if a plan differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument(
        "--data", type=Path, default=beside, help=f"folder of {' and '.join(REAL)}; absent ones are skipped"
    )
    parser.add_argument("--only", nargs="+", help="data sets, for example hippocampus, '2D phantom' or 'random 0'")
    parser.add_argument("--random", type=int, default=3, help="number of random federations")
    parser.add_argument("--planners", nargs="+", choices=sorted(STOCK), default=list(STOCK))
    parser.add_argument(
        "--samples", type=float, default=10e7, help="foreground voxels a channel; nnU-Net's number: 1e8"
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    original = DatasetFingerprintExtractor.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.num_foreground_voxels_for_intensitystats = arguments.samples

    DatasetFingerprintExtractor.__init__ = init
    console = Console(width=None if sys.stdout.isatty() else 140)
    rows: list[Row] = []
    names = [
        *REAL,
        "2D phantom",
        "RGB phantom",
        "CT and MRI phantom",
        *(f"random {seed}" for seed in range(arguments.random)),
    ]
    for name in arguments.only or names:
        if name in REAL and not (arguments.data / name / "cases.csv").is_file():
            console.print(f"{name} is skipped: there is no {arguments.data / name / 'cases.csv'} (see --data).")
            continue

        def show(row: Row) -> None:
            rows.append(row)
            verdict = "equal" if row.equal else "DIFFERENT"
            Console(stderr=True).print(f"{row.data}, {row.planner}, {row.geometry}: {verdict}, {row.seconds:.1f} s")

        compare(name, arguments.data, arguments.planners, show)
    console.print(table_of(rows))
    for row in rows:
        for line in row.different:
            console.print(f"{row.data}, {row.planner}, {row.geometry}: {line}", style="red")
    if arguments.json:
        figures = [{**asdict(row), "equal": row.equal} for row in rows]
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    sys.exit(not all(row.equal for row in rows))


if __name__ == "__main__":
    main()
