"""What a collective costs: every site uploads a network of stock size, the coordinator reduces, every site downloads.

Real processes on this machine: the coordinator by its command, each site a process of its own. The tensors have the
names and shapes of the stock 3d_fullres PlainConvUNet (31 million parameters, 108 tensors, 125 MB in float32) and
random values. A round's seconds run from the first site's start to the last site's end. Beside it, in the same run:
the same bytes over plain TCP, up at all sites and then down again, which is the limit for any transport that copies
them once, and over bare gRPC streams, which is the limit for ours (:mod:`bare_grpc`); the coordinator's reduction
alone; and other frameworks, if asked, with the Python that each is installed in (:mod:`other_frameworks`).

    python benchmarks/exchange/exchange.py --sites 2 4 8 --wire-dtypes float32 bfloat16 float16 \\
        --frameworks flower=PYTHON flower-legacy=PYTHON nvflare=PYTHON
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from nnunet_fed.exchange.precision import WireDtype

sys.path.append(str(Path(__file__).parents[1] / "frameworks"))  # what measures them measures us
from bare_grpc import grpc_copy
from certificates import certificates
from limits import reduction, tcp_copy
from measuring import Memory, random_tensors
from other_frameworks import FRAMEWORKS, Framework

SPAWN = multiprocessing.get_context("spawn")  # gRPC and fork do not mix


def network_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that sites share of the stock 3d_fullres network."""
    import torch
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    from nnunet_fed.methods.tensors import shared_tensors

    with torch.device("meta"):
        network = PlainConvUNet(
            input_channels=1, n_stages=6, features_per_stage=[32, 64, 128, 256, 320, 320], conv_op=torch.nn.Conv3d,
            kernel_sizes=3, strides=[1, 2, 2, 2, 2, 2], n_conv_per_stage=2, num_classes=2, n_conv_per_stage_decoder=2,
            conv_bias=True, norm_op=torch.nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=torch.nn.LeakyReLU, nonlin_kwargs={"inplace": True}, deep_supervision=True,
        )  # fmt: skip
    return {name: tuple(tensor.shape) for name, tensor in shared_tensors(network).items()}


@dataclass(frozen=True)
class Connection:
    """How coordinator and sites meet: options of the coordinator's command, and settings of each site."""

    options: list[str]
    settings: dict[str, dict[str, Any]]

    @classmethod
    def insecure(cls, names: Sequence[str]) -> Connection:
        """Plain text."""
        return cls(["--insecure"], {name: {"insecure": True} for name in names})

    @classmethod
    def mutual_tls(cls, names: Sequence[str], folder: Path) -> Connection:
        """Certificates of an authority that is made in ``folder``."""
        own, *files = certificates(["coordinator", *names], folder)
        options = ["--cert", own["certificate"], "--key", own["key"], "--ca", own["ca"]]
        return cls([str(option) for option in options], dict(zip(names, files, strict=True)))


def bare_grpc(sites: int, size: int, rounds: int, tls: bool) -> dict[str, Any]:
    """:func:`grpc_copy`, with certificates if it is to be encrypted."""
    if not tls:
        return grpc_copy(sites, size, rounds, None)
    with tempfile.TemporaryDirectory(prefix="nnunet_fed_exchange_") as folder:
        files = certificates(["coordinator", *(f"site_{number}" for number in range(sites))], Path(folder))
        keys = [(own["ca"].read_bytes(), own["key"].read_bytes(), own["certificate"].read_bytes()) for own in files]
    return grpc_copy(sites, size, rounds, keys)


def site_process(
    settings: dict[str, Any], study: dict[str, Any], shapes: dict[str, tuple[int, ...]], rounds: int, results: Any
) -> None:
    """Take part in all rounds; puts the name, a list of (start, end) and the bytes of a round into the queue."""
    from nnunet_fed.study.federation import Federation
    from nnunet_fed.study.site import Site
    from nnunet_fed.transport.site.client import GrpcCommunicator

    communicator, name = GrpcCommunicator(Site(connect_minutes=1, **settings)), settings["name"]
    communicator.join("training", Federation.model_validate(study).digest, "3d_fullres", "benchmark")
    tensors = random_tensors(shapes, seed=len(name) + ord(name[-1]))
    spans = []
    for number in range(rounds):
        communicator.gather(f"round-{number:04d}/barrier", name)
        before, start = communicator.bytes_sent + communicator.bytes_received, time.monotonic()
        communicator.mean(f"round-{number:04d}/model", tensors, 1.0)
        spans.append((start, time.monotonic()))
        moved = communicator.bytes_sent + communicator.bytes_received - before
    communicator.leave("done")
    communicator.close()
    results.put((name, spans, moved))


@contextmanager
def coordinator(study: dict[str, Any], folder: Path, options: Sequence[str]) -> Iterator[tuple[str, int]]:
    """The coordinator's command; gives its address and process id."""
    from nnunet_fed.study.toml import to_toml

    file = folder / "federation.toml"
    file.write_text(to_toml(study))
    with (folder / "coordinator.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "nnunet_fed", "coordinator", str(file), "--listen", "127.0.0.1:0",
             "--state", str(folder / "state"), *options],
            stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip().rpartition(" ")[2], process.pid
    finally:
        process.terminate()
        process.wait()


def exchange(
    sites: int, wire_dtype: WireDtype, shapes: dict[str, tuple[int, ...]], rounds: int, tls: bool
) -> dict[str, Any]:
    """Measure rounds of one federation; the first one is not counted."""
    from nnunet_fed.study.federation import Federation

    names = [f"site_{number}" for number in range(sites)]
    study = Federation.model_validate(
        {
            "name": "exchange", "sites": names, "method": {"name": "fedavg"}, "rounds": rounds + 1,
            "wire_dtype": wire_dtype, "keep_rounds": 2,
        }
    ).model_dump(mode="json")  # fmt: skip
    results = SPAWN.Queue()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nnunet_fed_exchange_")))
        connection = Connection.mutual_tls(names, folder) if tls else Connection.insecure(names)
        address, pid = stack.enter_context(coordinator(study, folder, connection.options))
        settings = [{"name": name, "coordinator": address, **connection.settings[name]} for name in names]
        memory = Memory(lambda: [pid])
        memory.start()
        processes = [
            SPAWN.Process(target=site_process, args=(site, study, shapes, rounds + 1, results)) for site in settings
        ]
        for process in processes:
            process.start()
        told = [results.get(timeout=600) for _ in processes]
        for process in processes:
            process.join()
        taken = memory.stop()
    spans = zip(*(spans for _, spans, _ in told), strict=True)
    seconds = [max(end for _, end in span) - min(start for start, _ in span) for span in spans][1:]
    return {
        "transport": "nnunet_fed, mutual TLS" if tls else "nnunet_fed", "sites": sites, "wire_dtype": wire_dtype,
        "seconds": seconds, "bytes": sum(moved for _, _, moved in told), **taken,
    }  # fmt: skip


def show(results: Sequence[dict[str, Any]], console: Console) -> None:
    """One line a measurement."""
    table = Table(title="Seconds a round (median; least and most), and what it moves and takes")
    for column in ("sites", "transport", "on the wire", "seconds", "least", "most", "GB", "RssAnon MB", "RSS MB"):
        table.add_column(column, justify="left" if column in ("transport", "on the wire") else "right")
    for result in results:
        seconds = result["seconds"]
        table.add_row(
            str(result["sites"]), result["transport"], result.get("wire_dtype", ""),
            *(f"{value:.3f}" for value in (statistics.median(seconds), min(seconds), max(seconds))),
            f"{result['bytes'] / 1e9:.3f}" if "bytes" in result else "",
            *(f"{result[key]:.0f}" if key in result else "" for key in ("rss_anon_mb", "rss_mb")),
        )  # fmt: skip
    console.print(table)


def main() -> None:
    """Read the arguments, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--wire-dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    parser.add_argument("--tls", nargs="+", choices=["no", "yes"], default=["no", "yes"])
    parser.add_argument(
        "--frameworks", nargs="+", default=[], type=Framework.parse, metavar="NAME=PYTHON",
        help=f"other frameworks, of {', '.join(FRAMEWORKS)}, and the Python of each (without: this one)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write all that was measured to this file")
    arguments = parser.parse_args()
    shapes = network_shapes()
    size = 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    results: list[dict[str, Any]] = []

    def measured(function: Callable[..., Any], *arguments: Any) -> None:
        result = function(*arguments)
        if result is not None:
            results.append(result)
            show(results[-1:], Console(stderr=True))

    for sites in arguments.sites:
        measured(tcp_copy, sites, size, arguments.rounds)
        for tls in arguments.tls:
            measured(bare_grpc, sites, size, arguments.rounds, tls == "yes")
        for wire_dtype in arguments.wire_dtypes:
            for tls in arguments.tls:
                measured(exchange, sites, wire_dtype, shapes, arguments.rounds, tls == "yes")
            measured(reduction, sites, wire_dtype, shapes, arguments.rounds)
        for framework in arguments.frameworks:
            for tls in arguments.tls:
                measured(framework.exchange, sites, shapes, arguments.rounds, tls == "yes")
    show(results, Console())
    if arguments.json:
        arguments.json.write_text(json.dumps({"tensors": len(shapes), "bytes": size, "results": results}, indent=2))


if __name__ == "__main__":
    main()
