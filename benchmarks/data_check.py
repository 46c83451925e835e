"""How long one look at all data takes: against reading the files only, and against nnU-Net's own check.

All read the same files with nnU-Net's reader in as many processes, one after the other in turns, since a machine that
others use gives no seconds to rely on: what counts are the ratios within a run. A second look is timed too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nnunet_fed.datasets.description import NAME, read_description
from nnunet_fed.datasets.listing import list_cases
from nnunet_fed.inspection.look import look_at
from nnunet_fed.inspection.reading import choose_reader, reader_class


def read_only(file: str, reader: str) -> int:
    """Read a file as nnU-Net does, and nothing else."""
    array, _ = reader_class(reader)().read_images((file,))
    return int(array.size)


def reading(folder: Path, processes: int) -> Callable[[], object]:
    """Reading all files of a data set, in processes that are started for it."""
    content, _ = read_description(folder / NAME)
    assert content is not None
    cases = list_cases(folder, content).cases
    files = [file for case in cases.values() for file in (*case["images"], case["label"])]
    reader = choose_reader(content, files[:1])

    def read() -> None:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            list(pool.map(read_only, files, [reader] * len(files)))

    return read


def main() -> None:
    """Read the arguments, measure and print; exit status 1 if a look takes more than 1.5 times the reading."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).resolve().parents[2] / "shared" / "data" / "hippocampus"
    parser.add_argument("--data", type=Path, default=beside, help="a raw data set")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    # within, since each process that is started imports what stands above: PyTorch, too, with this
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    from nnunet_fed.inspection import workers

    workers.default_num_processes = arguments.processes
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w", encoding="utf-8") as nowhere:  # noqa: PTH123
        kept = Path(folder) / "kept.json"
        look_at(arguments.data, "data").write(kept)  # also warms the system's cache
        what: dict[str, Callable[[], object]] = {
            "reading the files": reading(arguments.data, arguments.processes),
            "the look": lambda: look_at(arguments.data, "data"),
            "nnU-Net's check": lambda: verify_dataset_integrity(str(arguments.data), arguments.processes),
            "the second look": lambda: look_at(arguments.data, "data", kept),
        }
        for _ in range(arguments.repeats):
            for name, run in what.items():
                began = time.perf_counter()
                with redirect_stdout(nowhere), redirect_stderr(nowhere):
                    run()
                seconds.setdefault(name, []).append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {name: value / medians["reading the files"] for name, value in medians.items()}
    table = Table(title=f"{arguments.data.name}, {arguments.processes} processes, median of {arguments.repeats}")
    for column in ("", "seconds", "times the reading"):
        table.add_column(column)
    for name, value in medians.items():
        table.add_row(name, f"{value:.2f}", f"{ratios[name]:.2f}")
    Console().print(table)
    if arguments.json:
        figures = {"seconds": seconds, "ratios": ratios, "processes": arguments.processes}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    raise SystemExit(ratios["the look"] > 1.5)


if __name__ == "__main__":
    main()
