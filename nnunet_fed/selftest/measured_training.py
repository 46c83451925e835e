"""``nnUNetv2_train`` with the same arguments, with a note of what each step takes: of any trainer, nnU-Net's too.

Run as a program. ``nnUNet_fed_measured`` names the JSON file that it writes. With ``nnUNet_fed_kill_at=SITE:STEP`` the
training of that site ends itself there with all its processes (``kill -9``) and is started again with ``--c``.
Source: ours.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nnunet_fed.files import write_json
from nnunet_fed.processes import Process, Step, signals_interrupt, stop
from nnunet_fed.study.site import Site

MEASURED_VARIABLE, KILL_VARIABLE, STEPS_VARIABLE = (
    "nnUNet_fed_measured", "nnUNet_fed_kill_at", "nnUNet_fed_plain_steps"
)  # fmt: skip
"""The last one limits nnU-Net's own trainer to one epoch of so many steps, and no validation after it."""
ARMED_VARIABLE = "nnUNet_fed_armed"
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # on Windows, the latter ends a process at once


@dataclass
class Measured:
    """What a training took."""

    compiled: bool = False
    mixed_precision: bool = False
    seconds: list[float] = field(default_factory=list)
    """Of each step, until the device had done it."""
    peak_memory: int = 0
    """Bytes: what torch allocated on the GPU, or the process's largest resident set."""
    finite: bool = True
    """All losses were numbers."""
    continued_in_epoch: int | None = None

    @classmethod
    def read(cls, path: Path) -> Measured:
        """What a training wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def main() -> None:
    """Train; where this site's training is to be killed, in a process of its own, and again."""
    site, _, number = os.environ.get(KILL_VARIABLE, "").partition(" ")
    if not site or ARMED_VARIABLE in os.environ or Site.from_environment().name != site:
        train()
        return
    folder = Path(os.environ[MEASURED_VARIABLE]).parent
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, *sys.argv[1:]]
    for attempt, (step, more) in enumerate(((number, []), ("0", ["--c"]))):
        log = folder / f"attempt_{attempt}.log"
        with signals_interrupt():
            process = Process(Step("Training", [*command, *more], {**os.environ, ARMED_VARIABLE: step}, log))
            try:
                while process.exit_status() is None:
                    time.sleep(0.2)
            finally:
                stop([process])
        sys.stdout.write(log.read_text(encoding="utf-8", errors="replace"))
        sys.stdout.flush()
        if attempt == 0 and process.exit_status() == 0:
            sys.exit("Error: the training was to be killed and came to its end.")
    sys.exit(process.exit_status())


def train() -> None:
    """nnU-Net's own command, whose trainer is measured."""
    from nnunetv2.run import run_training

    measured, make = Measured(), run_training.get_trainer_from_args

    def measured_trainer(*arguments: Any, **options: Any) -> Any:
        trainer = make(*arguments, **options)
        _measure(trainer, measured)
        return trainer

    run_training.get_trainer_from_args = measured_trainer
    run_training.run_training_entry()
    write_json(Path(os.environ[MEASURED_VARIABLE]), asdict(measured))


def _measure(trainer: Any, measured: Measured) -> None:
    import torch

    step, kill_at = trainer.train_step, int(os.environ.get(ARMED_VARIABLE, 0))

    def measured_step(batch: Any) -> Any:
        if not measured.seconds:
            measured.compiled = isinstance(trainer.network, torch._dynamo.OptimizedModule)
            measured.mixed_precision = trainer.grad_scaler is not None
            measured.continued_in_epoch = trainer.current_epoch if "--c" in sys.argv else None
        started = time.perf_counter()
        output = step(batch)
        if trainer.device.type in ("cuda", "mps"):
            getattr(torch, trainer.device.type).synchronize()
        measured.seconds.append(time.perf_counter() - started)
        measured.peak_memory = max(measured.peak_memory, _memory(trainer.device.type))
        measured.finite = measured.finite and math.isfinite(float(output["loss"]))
        if len(measured.seconds) == kill_at:
            if hasattr(os, "killpg"):
                os.killpg(0, KILL)  # the processes that augment, too
            os.kill(os.getpid(), KILL)
        return output

    trainer.train_step = measured_step
    if STEPS_VARIABLE in os.environ:
        trainer.num_epochs, trainer.num_val_iterations_per_epoch = 1, 1
        trainer.num_iterations_per_epoch = int(os.environ[STEPS_VARIABLE])
        trainer.perform_actual_validation = lambda *_, **__: None
        if trainer.device.type == "cpu":  # as our trainers do; nnU-Net takes all cores, which the sites share here
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def _memory(device: str) -> int:
    """Bytes at the peak; 0: not known."""
    import torch

    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    if device == "mps":
        return int(torch.mps.driver_allocated_memory())
    with suppress(OSError):
        # not getrusage, which counts what the parent held when it forked
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
