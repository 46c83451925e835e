"""What a coordinator shows to those who watch it: /status and /metrics, log lines, health."""

from __future__ import annotations

import http.client
import json
import logging
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from serving import make_study, together

from nnunet_fed.certificates.authority import Authority
from nnunet_fed.coordinator.coordinator import Coordinator
from nnunet_fed.coordinator.log_fields import about
from nnunet_fed.coordinator.store import Store
from nnunet_fed.coordinator.verdict import Offer
from nnunet_fed.coordinator.watch import status_table
from nnunet_fed.errors import ConfigurationError, RefusedError
from nnunet_fed.logs import JsonLines
from nnunet_fed.study.address import Address
from nnunet_fed.study.site import Site
from nnunet_fed.transport.channel.tls import KeyFiles
from nnunet_fed.transport.coordinator.http import StatusServer
from nnunet_fed.transport.coordinator.server import CoordinatorServer
from nnunet_fed.transport.proto import federation_pb2 as pb
from nnunet_fed.transport.site.client import GrpcCommunicator

Metrics = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Watched:
    """A coordinator with ``--http``."""

    def __init__(self, folder: Path, stack: ExitStack, address: str = "127.0.0.1:0"):
        self.study = make_study("ab")
        store = Store(folder)
        stack.callback(store.close)
        self.coordinator = Coordinator(self.study, store)
        self.pages = StatusServer(self.coordinator, address)
        self.pages.start()
        stack.callback(self.pages.stop)
        self.server = CoordinatorServer(self.coordinator, "127.0.0.1:0", insecure=True, meter=self.pages.meter)
        self.server.start()
        stack.callback(self.server.stop, 0)

    def seat(self, site: str) -> GrpcCommunicator:
        settings = {"name": site, "coordinator": self.server.address, "insecure": True, "connect_minutes": 0.05}
        seat = GrpcCommunicator(Site.model_validate(settings))
        seat.join("training", self.study.digest, "3d_fullres", "T")
        return seat

    def get(self, path: str, method: str = "GET") -> tuple[int, str, bytes]:
        connection = http.client.HTTPConnection(*Address.parse(self.pages.address), timeout=10)
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.getheader("Content-Type", ""), answer.read()

    def metrics(self) -> Metrics:
        status, kind, body = self.get("/metrics")
        assert status == 200
        assert kind.startswith("text/plain; version=")
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(body.decode())
            for sample in family.samples
        }


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    with ExitStack() as stack:
        yield Watched(tmp_path / "state", stack)


def labels(**given: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(given.items()))


# ------------------------------------------------------------------------------------------------- pages


def test_status_and_metrics_of_a_round(watched: Watched) -> None:
    a, b = watched.seat("a"), watched.seat("b")
    before = watched.metrics()
    assert before["nnunet_fed_sites", ()] == 2
    tensors = {"w": np.ones(1_000_000, np.float32)}
    together(lambda: a.mean("round-0000/model", tensors, 1), lambda: b.mean("round-0000/model", tensors, 1))
    a.report({"phase": "training", "loss": 0.5}, wait=True)
    with pytest.raises(RefusedError):
        a.sum("no key", np.arange(2))
    after = watched.metrics()

    assert after["nnunet_fed_rounds_total", labels(run=a.run)] == 1
    assert after["nnunet_fed_reduction_seconds_count", ()] == 1
    assert after["nnunet_fed_reduction_seconds_sum", ()] > 0
    assert {after["nnunet_fed_site_active", labels(site=site)] for site in "ab"} == {1}
    assert after["nnunet_fed_site_last_seen_timestamp_seconds", labels(site="a")] > 1.7e9
    received = after["nnunet_fed_received_bytes_total", labels(method="Coordinator/Upload")]
    sent = after["nnunet_fed_sent_bytes_total", labels(method="Coordinator/Result")]
    assert 8_000_000 < received < 8_010_000
    assert 8_000_000 < sent < 8_010_000
    refused = labels(method="Coordinator/Offer", status="FAILED_PRECONDITION")
    assert after["nnunet_fed_calls_total", refused] == 1
    assert after["nnunet_fed_calls_total", labels(method="Coordinator/Upload", status="OK")] == 2
    for seat in (a, b):
        seat.close()

    status, kind, body = watched.get("/status")
    assert (status, kind) == (200, "application/json")
    shown = json.loads(body)
    assert shown["sites"]["a"]["progress"] == {"phase": "training", "loss": 0.5}
    assert shown["digest"] == watched.study.digest


def test_a_figure_that_is_undefined_is_null_wherever_it_is_told(watched: Watched) -> None:
    """A site without foreground has no Dice; a site of version 0.1 calls it NaN, which is no JSON."""

    def no_json(constant: str) -> None:
        raise AssertionError(constant)

    a = watched.seat("a")
    told = '{"phase": "training", "loss": NaN, "dice": Infinity}'
    a._stub.Report(pb.ReportRequest(run=a.run, site="a", progress=told), timeout=10)
    for text in (watched.get("/status")[2], a._stub.Status(pb.StatusRequest(record=True), timeout=10).status):
        progress = json.loads(text, parse_constant=no_json)["sites"]["a"]["progress"]
        assert progress == {"phase": "training", "loss": None, "dice": None}
    a.report({"phase": "training", "loss": float("nan"), "dice": 0.5}, wait=True)
    assert a.status()["sites"]["a"]["progress"] == {"phase": "training", "loss": None, "dice": 0.5}
    assert status_table(a.status()).row_count == 2


def test_who_is_waited_for(watched: Watched) -> None:
    a, b = watched.seat("a"), watched.seat("b")
    watched.coordinator.offer(Offer(a.run, "round-0000/model", "a", "mean", 0.0, "", 0))
    metrics = watched.metrics()
    place = {"run": a.run, "key": "round-0000/model"}
    assert metrics["nnunet_fed_open_collectives", ()] == 1
    assert metrics["nnunet_fed_collective_waits_for", labels(site="b", **place)] == 1
    assert ("nnunet_fed_collective_waits_for", labels(site="a", **place)) not in metrics
    assert metrics["nnunet_fed_collective_closes_timestamp_seconds", labels(**place)] > 1.7e9
    b.leave("done")
    assert watched.metrics()["nnunet_fed_site_active", labels(site="b")] == 0
    for seat in (a, b):
        seat.close()


def test_nothing_but_reading(watched: Watched) -> None:
    assert watched.get("/")[0] == 404
    assert watched.get("/status/../journal.sqlite")[0] == 404
    for method in ("POST", "PUT", "DELETE"):
        assert watched.get("/status", method)[0] == 405
    status, _, body = watched.get("/metrics", "HEAD")
    assert (status, body) == (200, b"")


def test_a_client_that_keeps_silent_holds_nobody_up(watched: Watched) -> None:
    host, _, port = watched.pages.address.rpartition(":")
    with socket.create_connection((host, int(port))):
        assert watched.get("/status")[0] == 200


def test_it_is_shown_on_this_machine_only_unless_the_user_insists(watched: Watched) -> None:
    with pytest.raises(ConfigurationError, match="--http-insecure"):
        StatusServer(watched.coordinator, "0.0.0.0:0")
    with pytest.raises(ConfigurationError, match="no HOST:PORT"):
        StatusServer(watched.coordinator, "127.0.0.1")
    with pytest.raises(ConfigurationError, match="cannot listen there"):
        StatusServer(watched.coordinator, watched.pages.address)
    insisted = StatusServer(watched.coordinator, "0.0.0.0:0", anywhere=True)
    insisted.start()
    insisted.stop()


# ------------------------------------------------------------------------------------------------------ logs


def test_log_lines_that_a_machine_reads(watched: Watched) -> None:
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler, package = Keep(), logging.getLogger("nnunet_fed")
    handler.setFormatter(JsonLines())
    package.addHandler(handler)
    level = package.level
    package.setLevel(logging.INFO)
    try:
        a, b = watched.seat("a"), watched.seat("b")
        tensors = {"w": np.ones(3, np.float32)}
        together(lambda: a.mean("round-0007/model", tensors, 1), lambda: b.mean("round-0007/model", tensors, 1))
        a.note("a note\nof two lines")
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
    assert all("\n" not in line for line in lines)
    entries = [json.loads(line) for line in lines]
    place = {"run": a.run, "key": "round-0007/model", "round": 7}
    given = [entry for entry in entries if "mean from" in entry["message"]]
    assert [{**place, "site": site} for site in "ab"] == sorted(
        ({name: entry[name] for name in (*place, "site")} for entry in given), key=lambda facts: facts["site"]
    )
    [closed] = [entry for entry in entries if "closed over" in entry["message"]]
    assert place.items() <= closed.items()
    [note] = [entry for entry in entries if "a note" in entry["message"]]
    assert (note["site"], note["level"], "round" in note) == ("a", "INFO", False)
    for seat in (a, b):
        seat.close()


def test_a_coordinator_process_that_is_watched(tmp_path: Path) -> None:
    (tmp_path / "federation.toml").write_text('name = "s"\nsites = ["a"]\nrounds = 2\n[method]\nname = "fedavg"\n')
    command = ["coordinator", "federation.toml", "--state", "state", "--listen", "127.0.0.1:0", "--insecure"]
    process = subprocess.Popen(
        [sys.executable, "-m", "nnunet_fed", *command, "--http", "127.0.0.1:0", "--log-json"], cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(json.loads(line))
            if "status and metrics at" in lines[-1]["message"]:
                break
        with urllib.request.urlopen(lines[-1]["message"].rpartition(" ")[2] + "/metrics", timeout=10) as answer:
            assert b"nnunet_fed_sites 1.0" in answer.read()
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, rest
    assert all(json.loads(line)["level"] == "INFO" for line in rest.splitlines())


def test_an_error_is_one_line_too() -> None:
    try:
        raise ValueError("x")
    except ValueError as error:
        record = logging.LogRecord("n", logging.ERROR, "", 0, "bad", (), (type(error), error, error.__traceback__))
    line = JsonLines().format(record)
    assert "\n" not in line
    assert "ValueError: x" in json.loads(line)["error"]


def test_what_a_line_is_about() -> None:
    assert about("r", "round-0012/selector/3", "a") == {
        "run": "r", "key": "round-0012/selector/3", "site": "a", "round": 12,
    }  # fmt: skip
    assert about(key="planning/dataset") == {"key": "planning/dataset"}


# ---------------------------------------------------------------------------------------------------- health


@contextmanager
def health(address: str, folder: Path | None = None) -> Iterator[health_pb2_grpc.HealthStub]:
    if folder is None:
        channel = grpc.insecure_channel(address)
    else:
        ca, key, certificate = ((folder / name).read_bytes() for name in ("ca.pem", "key.pem", "certificate.pem"))
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, certificate))
    with channel:
        yield health_pb2_grpc.HealthStub(channel)


SERVING = health_pb2.HealthCheckResponse.SERVING


def test_health(watched: Watched) -> None:
    with health(watched.server.address) as stub:
        assert stub.Check(health_pb2.HealthCheckRequest(), timeout=10).status == SERVING
        with pytest.raises(grpc.RpcError, match="UNIMPLEMENTED"):
            next(stub.Watch(health_pb2.HealthCheckRequest(), timeout=10))


def test_health_is_told_to_those_who_may_read_the_status(tmp_path: Path, serve: Callable[..., Any]) -> None:
    authority = Authority.create(tmp_path / "authority", "study")
    own = authority.site("coordinator", ["127.0.0.1"])
    served = serve(make_study("a"), keys=KeyFiles(*(own / f"{n}.pem" for n in ("certificate", "key", "ca"))))
    for name in ("a", "watcher", "coordinator", "outsider"):
        folder = own if name == "coordinator" else authority.site(name)
        with health(served.server.address, folder) as stub:
            if name == "outsider":
                with pytest.raises(grpc.RpcError, match="PERMISSION_DENIED"):
                    stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
            else:
                assert stub.Check(health_pb2.HealthCheckRequest(), timeout=10).status == SERVING
