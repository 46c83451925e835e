"""What a federated trainer costs beside nnU-Net's own, the exchange with the other sites left out.

Both trainers train the same plans on the same phantom site in one process, epoch by epoch in turn, so that whatever
else the machine does falls on both; on a busy machine, the ratio of CPU time is the one to look at. An epoch is what
nnU-Net's ``run_training`` does in it: training, online validation, log, plot and checkpoints. Of a federated epoch,
what belongs to the exchange is measured and subtracted: the exchange itself, and the checkpoint that is written before
it. A round is an epoch, which is the most expensive choice.

    python benchmarks/methods/overhead.py --epochs 10 --iterations 20
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

DATASET = "Dataset001_Phantom"
SITE = "site_a"
ALONE = {"sites": (SITE,)}
BESIDE_ANOTHER = {"sites": (SITE, "site_b"), "min_sites": 1, "deadline_minutes": 0.005}
"""For a method that needs two sites: the other one is absent, and no round waits for it."""
METHODS: dict[str, tuple[dict[str, Any], float, dict[str, Any]]] = {
    "nnUNetTrainerFedAvg": ({"name": "fedavg"}, 1.03, ALONE),
    # every foreground counts as a small lesion: there is work to do in nearly every step
    "nnUNetTrainerFedGS": ({"name": "fedgs", "threshold": 1, "log_base": 10, "truncation_guard": False}, 1.05, ALONE),
    # two steps where nnU-Net makes one
    "nnUNetTrainerFedSM": ({"name": "fedsm"}, 2.1, BESIDE_ANOTHER),
}
"""Of each trainer that can be measured, a module in nnunet_fed.trainers: method table, target, and sites."""
HOOKS = {"nnUNetTrainerFedAvg": 0.01, "nnUNetTrainerFedGS": 0.03}
"""Target of a trainer: CPU seconds inside our hooks of the training steps, as a share of those of nnU-Net's own."""


@dataclass
class Clock:
    """Seconds spent inside the functions that it watches, by the name given to them: on the wall, or of the CPU."""

    now: Callable[[], float] = time.perf_counter
    spent: dict[str, float] = field(default_factory=dict)
    _within: bool = False

    def watch(self, owner: Any, function: str, name: str, outer: bool = True) -> None:
        """Replace ``owner.function`` by one that is timed; with ``outer``, what it calls counts as part of it only."""
        setattr(owner, function, self.timed(getattr(owner, function), name, outer))

    def timed(self, original: Callable[..., Any], name: str, outer: bool = True) -> Callable[..., Any]:
        """The function that :meth:`watch` has in the place of another."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._within:
                return original(*args, **kwargs)
            self._within, started = outer, self.now()
            try:
                return original(*args, **kwargs)
            finally:
                self._within = False
                self.spent[name] = self.spent.get(name, 0.0) + self.now() - started

        return timed

    def take(self) -> dict[str, float]:
        """What was spent since the last call."""
        spent, self.spent = self.spent, {}
        return spent


class HooksOfSteps:
    """CPU seconds that our code takes within the training steps, and those of nnU-Net's own steps.

    Ours are what a federated trainer's step takes beyond the steps of nnU-Net's within it, and the hooks that the
    optimizers call within those. Only the thread that trains counts.
    """

    def __init__(self, federated: Any):
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

        self._whole, self._nnunet, self._optimizer = (Clock(time.thread_time) for _ in range(3))
        self._nnunet.watch(nnUNetTrainer, "train_step", "seconds")
        self._whole.watch(federated, "train_step", "seconds")
        for optimizer in federated.optimizers:
            for hooks in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks):
                hooks.update({key: self._optimizer.timed(hook, "seconds") for key, hook in hooks.items()})

    def take(self) -> dict[str, float]:
        """What was spent since the last call."""
        clocks = (self._whole, self._nnunet, self._optimizer)
        whole, nnunet, optimizer = (clock.take().get("seconds", 0.0) for clock in clocks)
        return {"hooks": whole - nnunet + optimizer, "nnU-Net": nnunet - optimizer}


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what nnU-Net prints to itself, and show it if it fails."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    except BaseException:
        sys.stderr.write(printed.getvalue())
        raise


def prepare(folder: Path, arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Make a phantom site and plan it as a federation of one; returns plans, ``dataset.json`` and the configuration."""
    from nnunet_fed.datasets.phantom import write_phantom
    from nnunet_fed.exchange.communicator import LocalFederation
    from nnunet_fed.planners.planning import plan_and_preprocess
    from nnunet_fed.study.federation import Federation

    study = Federation.model_validate(
        {
            "name": "overhead", "method": METHODS[arguments.trainer][0], "fold": "all",
            **METHODS[arguments.trainer][2],
            "planner": arguments.planner, "configuration": arguments.configuration,
            "rounds": arguments.warmup + arguments.epochs + 1, "iterations_per_epoch": arguments.iterations,
            "val_iterations_per_epoch": arguments.val_iterations,
        }
    )  # fmt: skip
    sites = write_phantom(folder / "phantom", sites=1, cases=arguments.cases, test_cases=1)
    (folder / "nnUNet_raw" / DATASET).symlink_to(next(iter(sites.values())), target_is_directory=True)
    federation = LocalFederation([SITE])
    result = plan_and_preprocess(federation.communicator(SITE), study, 1, processes=1)
    preprocessed = folder / "nnUNet_preprocessed" / DATASET
    plans = json.loads((preprocessed / f"{result.plans_name}.json").read_text())
    return plans, json.loads((preprocessed / "dataset.json").read_text()), study.configuration


def serve(folder: Path, plans: dict[str, Any], stack: ExitStack) -> None:
    """Start a coordinator on loopback in this process, and point the site at it."""
    from nnunet_fed.coordinator.coordinator import Coordinator
    from nnunet_fed.coordinator.store import Store
    from nnunet_fed.study.federation import PLANS_KEY, Federation
    from nnunet_fed.study.site import SITE_FILE_VARIABLE
    from nnunet_fed.transport.coordinator.server import CoordinatorServer

    store = Store(folder / "coordinator")
    stack.callback(store.close)
    coordinator = Coordinator(Federation.model_validate(plans[PLANS_KEY]["study"]), store)
    server = CoordinatorServer(coordinator, "127.0.0.1:0", insecure=True)
    server.start()
    stack.callback(server.stop, 0)
    file = folder / "site.toml"
    file.write_text(f'name = "{SITE}"\ncoordinator = "{server.address}"\ninsecure = true\n')
    os.environ[SITE_FILE_VARIABLE] = str(file)


def trainers(
    arguments: argparse.Namespace, plans: dict[str, Any], dataset: dict[str, Any], configuration: str
) -> tuple[Any, Any]:
    """The plain and the federated trainer with equal settings, ready for their first epoch."""
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    federated_class = getattr(importlib.import_module(f"nnunet_fed.trainers.{arguments.trainer}"), arguments.trainer)
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    made = [
        # nnUNetv2_train puts this key in, and the trainer takes it out again
        kind({**copy.deepcopy(plans), "continue_training": False}, configuration, "all", dataset, device)
        for kind in (nnUNetTrainer, federated_class)
    ]
    plain, federated = made
    for setting in ("initial_lr", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "num_epochs"):
        setattr(plain, setting, getattr(federated, setting))
    if not arguments.stock_checkpoints:
        plain.save_every = federated.save_every
    for trainer in made:
        torch.set_num_threads(arguments.threads)
        trainer.on_train_start()
    # the speed of a CPU depends on the numbers: denormal ones are slow
    plain.network.load_state_dict(federated.network.state_dict())
    return plain, federated


def run_epoch(trainer: Any) -> tuple[float, float]:
    """One epoch as in nnU-Net's ``run_training``; returns the seconds that it took, on the wall and of the CPU."""
    import torch

    started, cpu_started = time.perf_counter(), time.process_time()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    outputs = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(trainer.num_iterations_per_epoch)]
    trainer.on_train_epoch_end(outputs)
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        outputs = [
            trainer.validation_step(next(trainer.dataloader_val)) for _ in range(trainer.num_val_iterations_per_epoch)
        ]
        trainer.on_validation_epoch_end(outputs)
    trainer.on_epoch_end()
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - cpu_started


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the epochs in turn; returns all that was measured, in seconds."""
    with ExitStack() as stack:
        with quiet():
            plans, dataset, configuration = prepare(folder, arguments)
            serve(folder, plans, stack)
            plain, federated = trainers(arguments, plans, dataset, configuration)
        hooks = HooksOfSteps(federated)
        # the exchange, and what else an epoch does; nothing counts twice
        exchange, cpu, inside = Clock(), Clock(time.process_time), {"plain": Clock(), "federated": Clock()}
        for clock in (exchange, cpu):
            clock.watch(federated, "_exchange_round", "exchange")
            clock.watch(federated, "_save_pending", "checkpoint before the exchange")
        for name, trainer in (("plain", plain), ("federated", federated)):
            inside[name].watch(trainer, "train_step", "training steps")
            inside[name].watch(trainer, "validation_step", "validation steps")
            inside[name].watch(trainer, "save_checkpoint", "checkpoints of nnU-Net's own schedule")
            inside[name].watch(trainer.logger, "plot_progress_png", "plot")
        inside["federated"].watch(federated, "_save_pending", "checkpoint before the exchange")
        inside["federated"].watch(federated, "_report", "reports")
        pairs = []
        with quiet():
            for number in range(arguments.warmup + arguments.epochs):
                order = [("plain", plain), ("federated", federated)]
                pair: dict[str, Any] = {}
                for name, trainer in order if number % 2 else reversed(order):
                    hooks.take()
                    seconds, cpu_seconds = run_epoch(trainer)
                    spent, cpu_spent = (exchange.take(), cpu.take()) if name == "federated" else ({}, {})
                    pair[name] = {
                        "epoch": seconds - sum(spent.values()), "cpu": cpu_seconds - sum(cpu_spent.values()),
                        "excluded": spent, "parts": inside[name].take(), "steps": hooks.take(),
                    }  # fmt: skip
                if number >= arguments.warmup:
                    pairs.append(pair)
            federated._session.communicator.leave("measured")
            federated._session.communicator.close()
    about = {
        "arguments": {k: str(v) for k, v in vars(arguments).items()},
        "parameters": sum(tensor.numel() for tensor in federated.network.parameters()),
        "diagnostics": federated.diagnostics,
        "load": os.getloadavg()[0],
    }
    return {**about, "pairs": pairs, **summary(pairs)}


def summary(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios and medians over the pairs of epochs."""

    def part(pair: dict[str, Any], name: str, what: str) -> float:
        return float(pair[name]["parts"].get(what, 0.0))

    written, steps = "checkpoints of nnU-Net's own schedule", ("training steps", "validation steps")
    ratios = [pair["federated"]["epoch"] / pair["plain"]["epoch"] for pair in pairs]
    without = [
        (pair["federated"]["epoch"] - part(pair, "federated", written))
        / (pair["plain"]["epoch"] - part(pair, "plain", written))
        for pair in pairs
    ]
    in_steps = [
        sum(part(pair, "federated", what) for what in steps) / sum(part(pair, "plain", what) for what in steps)
        for pair in pairs
    ]
    medians: dict[str, dict[str, float]] = {}
    for name in ("plain", "federated"):
        whats = sorted({what for pair in pairs for what in pair[name]["parts"]} - {"checkpoint before the exchange"})
        medians[name] = {what: statistics.median(part(pair, name, what) for pair in pairs) for what in whats}
        medians[name]["epoch"] = statistics.median(pair[name]["epoch"] for pair in pairs)
    excluded = {
        what: statistics.median(pair["federated"]["excluded"].get(what, 0.0) for pair in pairs)
        for what in ("exchange", "checkpoint before the exchange")
    }
    return {
        "ratio": spread(ratios),
        "ratio of CPU time": spread([pair["federated"]["cpu"] / pair["plain"]["cpu"] for pair in pairs]),
        "ratio without checkpoints": spread(without),
        "ratio of steps": spread(in_steps),
        "hooks of steps": spread(
            [p["federated"]["steps"]["hooks"] / p["federated"]["steps"]["nnU-Net"] for p in pairs]
        ),
        "ratio of all epochs": sum(p["federated"]["epoch"] for p in pairs) / sum(p["plain"]["epoch"] for p in pairs),
        "medians": medians,
        "excluded": excluded,
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show(result: dict[str, Any], trainer: str, console: Console) -> None:
    """Print tables of the medians and of the ratios."""
    table = Table(title=f"An epoch's seconds, median of {len(result['pairs'])}")
    for column in ("", "nnUNetTrainer", trainer, "difference / plain epoch"):
        table.add_column(column, justify="left" if not column else "right")
    plain, federated = result["medians"]["plain"], result["medians"]["federated"]
    for what in [*(what for what in federated if what != "epoch"), "epoch"]:
        mine, theirs = federated[what], plain.get(what, 0.0)
        label = "epoch, exchange excluded" if what == "epoch" else what
        table.add_row(label, f"{theirs:.4f}", f"{mine:.4f}", f"{(mine - theirs) / plain['epoch']:+.2%}")
    for what, seconds in result["excluded"].items():
        table.add_row(f"excluded: {what}", "", f"{seconds:.4f}", f"{seconds / plain['epoch']:+.2%}")
    console.print(table)
    figures = "".join(f", {name} {value:.4g}" for name, value in result["diagnostics"].items())
    console.print(
        f"{result['parameters'] / 1e6:.2f} million parameters; the method in the last round{figures or ': -'}"
    )
    ratios = Table(title="Federated / plain, exchange excluded")
    for column in ("", "median of pairs", "least", "most"):
        ratios.add_column(column, justify="left" if not column else "right")
    for what in ("ratio", "ratio of CPU time", "ratio without checkpoints", "ratio of steps"):
        ratios.add_row(what, *(f"{result[what][key]:.4f}" for key in ("median", "min", "max")))
    ratios.add_row("ratio of all epochs", f"{result['ratio of all epochs']:.4f}", "", "")
    console.print(ratios)
    for what in ("ratio", "ratio of CPU time"):
        target = METHODS[trainer][1]
        met = result[what]["median"] <= target
        console.print(f"Target: {what}, median of at most {target}: {'met' if met else 'missed'}.")
    shares = result["hooks of steps"]
    console.print(
        f"CPU time of our hooks within the training steps, beside that of nnU-Net's own in them: "
        f"{shares['median']:.3%} ({shares['min']:.3%} to {shares['max']:.3%}), at a load of {result['load']:.1f}"
    )
    if trainer in HOOKS:
        met = shares["median"] <= HOOKS[trainer]
        console.print(f"Target: median of at most {HOOKS[trainer]:.0%}: {'met' if met else 'missed'}.")


def main() -> None:
    """Read the arguments, set nnU-Net up in a folder of its own, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", choices=sorted(METHODS), default="nnUNetTrainerFedAvg")
    parser.add_argument("--epochs", type=int, default=10, help="pairs of epochs that count")
    parser.add_argument("--warmup", type=int, default=1, help="pairs of epochs before them")
    parser.add_argument("--iterations", type=int, default=20, help="steps of an epoch; nnU-Net's own epochs have 250")
    parser.add_argument("--val-iterations", type=int, default=4, help="validation steps of an epoch")
    parser.add_argument("--cases", type=int, default=5, help="training cases")
    parser.add_argument("--planner", default="nnUNetPlannerFedSmall", help="nnUNetPlannerFed: a network of stock size")
    parser.add_argument("--configuration", default="3d_fullres")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument(
        "--stock-checkpoints",
        action="store_true",
        help="the plain trainer writes checkpoint_latest every 50 epochs, as nnU-Net does, and not as often as ours",
    )
    parser.add_argument("--json", type=Path, help="write all that was measured to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nnunet_fed_overhead_") as name:
        folder = Path(name)
        # nnU-Net and torch read these when they are imported
        for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            (folder / variable).mkdir()
            os.environ[variable] = str(folder / variable)
        os.environ.update(nnUNet_n_proc_DA="0", nnUNet_compile="0", nnUNet_fed_threads=str(arguments.threads))
        os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(arguments.threads)))
        result = measure(arguments, folder)
    show(result, arguments.trainer, Console())
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
