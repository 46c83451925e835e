"""What the fault tests are made of: a coordinator process, site processes that exchange, and a link that misbehaves."""

from __future__ import annotations

import json
import os
import random
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from warm import Forked

from nnunet_fed.files import replacing
from nnunet_fed.study.toml import to_toml

SITE = """
import hashlib, json, logging, os, sys, time
import numpy as np
from nnunet_fed.transport.channel import options
settings = json.loads(sys.argv[1])
options.CHANNEL_OPTIONS = tuple(
    (name, settings["keepalive"].get(name, value)) for name, value in options.CHANNEL_OPTIONS
)
from nnunet_fed.errors import RoundClosedError
from nnunet_fed.study.site import Site
from nnunet_fed.exchange.keys import round_of
from nnunet_fed.exchange.outgoing_log import OutgoingLog
from nnunet_fed.transport.site.client import GrpcCommunicator
from pathlib import Path
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
name, size = settings["name"], settings["size"]
site = Site(name=name, coordinator=settings["address"], insecure=True, connect_minutes=1)
seat = GrpcCommunicator(site, OutgoingLog(Path(settings["outgoing"])))
study = seat.join("training", settings["digest"], "3d_fullres", "Faults")
model, done, checkpoint = np.full(size, 0.5, np.float32), 0, settings["checkpoint"]
if checkpoint and os.path.exists(checkpoint):
    with np.load(checkpoint) as saved:
        model, done = saved["model"], int(saved["done"])
number = done
while number < settings["rounds"]:
    time.sleep(settings["pause"])
    # what a site contributes follows from the round and the model, as in a repeatable training
    rng = np.random.default_rng([number, *name.encode()])
    update = model + rng.normal(size=size).astype(np.float32)
    scope = f"round-{number:04d}"
    try:
        seat.gather(f"{scope}/before", {"of": name})
        model = seat.mean(f"{scope}/model", {"w": update, "b": update[:3] * 2}, 1.0 + len(name))["w"]
    except RoundClosedError:  # on with the newest model, as in a training
        while (newest := seat.newest("model")) is None or round_of(newest) < number:
            time.sleep(0.1)
        model, number = seat.fetch(newest)["w"], round_of(newest)
    print(number, hashlib.sha256(model.tobytes()).hexdigest(), flush=True)
    number += 1
    if checkpoint:
        np.savez(checkpoint + ".new.npz", model=model, done=number)
        os.replace(checkpoint + ".new.npz", checkpoint)
    if settings["stop_after"] == number - 1:
        os._exit(0)
seat.leave("done")
seat.close()
"""

CLOCK = """
import runpy, sys, time
from pathlib import Path
real, shift = time.time, Path(sys.argv[1])
def set_by_somebody():
    # gRPC hands what it is told to its core, which looks at the machine's clock
    for_core = sys._getframe(1).f_globals["__name__"].startswith("grpc")
    return real() if for_core else real() + float(shift.read_text())
time.time = set_by_somebody
sys.argv[:2] = ["nnunet_fed"]
runpy.run_module("nnunet_fed", run_name="__main__", alter_sys=True)
"""
"""A command whose wall clock somebody sets while it runs. The monotonic clock is left alone, which libfaketime 0.9.10
cannot do to Python: ``time.sleep`` then fails."""


class Link(threading.Thread):
    """A TCP proxy that cuts connections at random bytes, delays, or lets nothing through.

    Args:
        target: ``host:port`` behind it.
        seed: of what happens at random.
        cut_after: about so many bytes pass before a connection is cut; 0: none is cut.
        delay: largest pause in seconds before bytes are handed on.
    """

    def __init__(self, target: str, seed: int = 0, cut_after: int = 0, delay: float = 0.0):
        super().__init__(daemon=True)
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._random = random.Random(seed)
        self._cut_after, self._delay = cut_after, delay
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._swallowed: list[tuple[socket.socket, socket.socket]] = []
        self._stopped = False
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self.passed = self.cuts = 0
        self.start()

    def blackhole(self) -> None:
        """What goes over the present connections from now on is lost, without a word to either side."""
        self._swallowed = list(self._pairs)

    def run(self) -> None:
        """Accept and serve each connection in a thread of its own."""
        while not self._stopped:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._target, timeout=5)
            except OSError:
                near.close()
                continue
            pair = (near, far)
            self._pairs.append(pair)
            left = self._random.randint(1, 2 * self._cut_after) if self._cut_after else None
            threading.Thread(target=self._pass_on, args=(pair, left), daemon=True).start()

    def _pass_on(self, pair: tuple[socket.socket, socket.socket], left: int | None) -> None:
        with selectors.DefaultSelector() as ready, pair[0], pair[1]:
            ready.register(pair[0], selectors.EVENT_READ, pair[1])
            ready.register(pair[1], selectors.EVENT_READ, pair[0])
            while not self._stopped:
                for key, _ in ready.select(0.2):
                    if pair in self._swallowed:
                        time.sleep(0.05)  # and nothing is read: buffers fill, acknowledgements end
                        continue
                    try:
                        data = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                        if self._delay:
                            time.sleep(self._random.uniform(0, self._delay))
                        key.data.sendall(data if left is None else data[:left])
                    except OSError:
                        return
                    self.passed += len(data)
                    if not data:
                        return
                    if left is not None:
                        left -= len(data)
                        if left <= 0:
                            self.cuts += 1
                            return

    def stop(self) -> None:
        """Close everything."""
        self._stopped = True
        self._listening.close()


class Exchange:
    """A coordinator and its sites as processes; each site prints a digest of every round's model.

    Args:
        folder: of all files.
        study: settings of the study.
        size: of the model, in parameters.
        options: of the coordinator's command.
        pause: seconds that a site takes to train a round.
        disk_mb: the coordinator's state directory is a disk of its own of so many MB, which only it can see and which
            goes with it; 0: it is an ordinary folder.
    """

    def __init__(
        self, folder: Path, study: dict[str, Any], size: int = 100_000, options: tuple[str, ...] = (), disk_mb: int = 0,
        pause: float = 0.0,
    ):  # fmt: skip
        self.folder, self.size, self._options, self._disk_mb, self._pause = folder, size, options, disk_mb, pause
        folder.mkdir(parents=True)
        self.write_study({"name": "faults", "method": {"name": "fedavg"}, **study})
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.coordinator: subprocess.Popen[bytes] | Forked | None = None
        self.sites: dict[str, Forked] = {}
        (folder / "site.py").write_text(SITE)
        (folder / "clock.py").write_text(CLOCK)
        self.set_clock(0)

    def write_study(self, settings: dict[str, Any]) -> None:
        """Edit ``federation.toml``, which the coordinator reads when it starts."""
        from nnunet_fed.study.federation import Federation

        self.study = Federation.model_validate(settings)
        (self.folder / "federation.toml").write_text(to_toml(self.study.model_dump(mode="json")))

    def change_sites(self, sites: Sequence[str]) -> None:
        """Let other names stand in ``sites``, and restart the coordinator."""
        self.write_study({**self.study.model_dump(), "sites": tuple(sites)})
        self.restart()

    def set_clock(self, shift: float) -> None:
        """Set the coordinator's wall clock, in seconds ahead of what it is; it may be running."""
        with replacing(self.folder / "clock") as part:
            part.write_text(str(shift))

    def restart(self) -> None:
        """Kill the coordinator and start it again."""
        self.kill(self.coordinator)
        self.serve()

    def serve(self) -> None:
        """Start the coordinator."""
        log = self.folder / "coordinator.log"
        words = [sys.executable, "-m", "nnunet_fed", "coordinator", str(self.folder / "federation.toml"), "--listen"]
        words += [self.address, "--state", str(self.folder / "state"), "--insecure", *self._options]
        if self._disk_mb:
            words = [*on_small_disk(self.folder / "state", self._disk_mb), *words]
            with log.open("ab") as file:
                self.coordinator = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
        else:
            words[:3] = [str(self.folder / "clock.py"), str(self.folder / "clock")]
            self.coordinator = Forked(words, os.environ, log)

    def start(
        self,
        name: str,
        address: str | None = None,
        stop_after: int | None = None,
        keepalive: int | None = None,
        checkpoint: bool = False,
    ) -> None:
        """Start a site; without a checkpoint it goes through all rounds from the first one again."""
        timing = {"keepalive_time_ms": keepalive, "keepalive_timeout_ms": 1, "http2.ping_timeout_ms": keepalive}
        shortened = {f"grpc.{option}": 1000 * seconds for option, seconds in timing.items() if seconds and keepalive}
        settings = {
            "name": name, "address": address or self.address, "digest": self.study.digest, "size": self.size,
            "rounds": self.study.rounds, "outgoing": str(self.outgoing(name)), "stop_after": stop_after,
            "pause": self._pause, "keepalive": shortened,
            "checkpoint": str(self.folder / f"{name}.npz") if checkpoint else None,
        }  # fmt: skip
        if not checkpoint:
            self.results(name).unlink(missing_ok=True)
        words = [str(self.folder / "site.py"), json.dumps(settings)]
        self.sites[name] = Forked(words, os.environ, self.folder / f"{name}.log", self.results(name))

    @property
    def state(self) -> Path:
        """The state directory as the coordinator sees it."""
        assert self.coordinator is not None
        return Path(f"/proc/{self.coordinator.pid}/root{self.folder / 'state'}")

    def results(self, name: str) -> Path:
        """What a site prints."""
        return self.folder / f"{name}.txt"

    def outgoing(self, name: str) -> Path:
        """What a site says that it sent."""
        return self.folder / f"{name}.jsonl"

    def uploads(self, name: str) -> list[dict[str, Any]]:
        """A site's uploads, the repeated ones too."""
        lines = self.outgoing(name).read_text().splitlines() if self.outgoing(name).exists() else []
        return [entry for entry in map(json.loads, lines) if entry["what"] == "upload"]

    def kill(self, process: subprocess.Popen[bytes] | Forked | None) -> None:
        """SIGKILL."""
        assert process is not None
        process.kill()
        process.wait()

    def finish(self, *names: str, seconds: float = 120) -> dict[str, list[str]]:
        """Wait for sites; returns what each has printed."""
        end = time.monotonic() + seconds
        for name in names or tuple(self.sites):
            status = self.sites[name].wait(max(0.1, end - time.monotonic()))
            assert status == 0, (self.folder / f"{name}.log").read_text()[-3000:]
        return {name: self.results(name).read_text().splitlines() for name in names or tuple(self.sites)}

    def stop(self) -> None:
        """End what is left."""
        for process in [*self.sites.values(), self.coordinator]:
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()


@contextmanager
def exchange(
    folder: Path, sites: Sequence[str] = "ab", size: int = 100_000, options: tuple[str, ...] = (), disk_mb: int = 0,
    pause: float = 0.0, **study: Any,
) -> Iterator[Exchange]:  # fmt: skip
    """A served exchange; a text names sites of one letter each."""
    running = Exchange(folder, {"rounds": 3, "sites": tuple(sites), **study}, size, options, disk_mb, pause)
    try:
        running.serve()
        yield running
    finally:
        running.stop()


def on_small_disk(folder: Path, megabytes: int) -> list[str]:
    """Begin of a command that has a disk of its own at ``folder``, in a mount namespace."""
    folder.mkdir(exist_ok=True)
    mount = f'mount -t tmpfs -o size={megabytes}m tmpfs "$0" && exec "$@"'
    return ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, str(folder)]


def small_disks_can_be_mounted(folder: Path) -> bool:
    """Whether this machine lets its users mount within a namespace of theirs."""
    try:
        return subprocess.run([*on_small_disk(folder, 1), "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


REPETITIONS = int(os.environ.get("FAULT_REPETITIONS", "2"))
"""Of what happens at random instants; by hand, half as many of whole trainings:

FAULT_REPETITIONS=20 python -m pytest tests/e2e/test_faults.py tests/e2e/test_training.py -k "random or site_killed"
FAULT_REPETITIONS=20 python -m pytest tests/e2e/test_campaign.py
"""
