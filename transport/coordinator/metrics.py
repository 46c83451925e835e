"""Figures of a running coordinator for Prometheus. Source: ours, on ``prometheus_client``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from nnunet_fed.coordinator.coordinator import Coordinator


class Meter(grpc.ServerInterceptor):  # type: ignore[misc]
    """Count calls by method and status, and the bytes of their messages (without those of gRPC and TLS).

    Args:
        registry: where the counters go.
    """

    def __init__(self, registry: CollectorRegistry):
        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"nnunet_fed_{name}", about, ["method", *labels], registry=registry)

        self._calls = counter("calls", "Calls that ended; refusals are those whose status is not OK.", "status")
        self._received = counter("received_bytes", "Bytes of the sites' messages.")
        self._sent = counter("sent_bytes", "Bytes of the answers.")

    def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Any], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """See :class:`grpc.ServerInterceptor`."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method.removeprefix("/nnunet_fed.v1.").lstrip("/")
        received, sent = self._received.labels(method), self._sent.labels(method)
        kind = (
            f"{'stream' if handler.request_streaming else 'unary'}_"
            f"{'stream' if handler.response_streaming else 'unary'}"
        )
        serve = getattr(handler, kind)

        def counted(messages: Iterator[Any], counter: Counter) -> Iterator[Any]:
            for message in messages:
                counter.inc(_size(message))
                yield message

        def ask(request: Any, context: grpc.ServicerContext) -> Any:
            if handler.request_streaming:
                return serve(counted(request, received), context)
            received.inc(_size(request))
            return serve(request, context)

        def unary(request: Any, context: grpc.ServicerContext) -> Any:
            with self._ended(method, context):
                reply = ask(request, context)
                sent.inc(_size(reply))
                return reply

        def stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            with self._ended(method, context):
                yield from counted(ask(request, context), sent)

        metered = stream if handler.response_streaming else unary
        wrap = getattr(grpc, f"{kind}_rpc_method_handler")
        return wrap(metered, handler.request_deserializer, handler.response_serializer)

    def _ended(self, method: str, context: grpc.ServicerContext) -> _Ended:
        return _Ended(self._calls, method, context)


class _Ended:
    """Counts a call once it is over."""

    def __init__(self, calls: Counter, method: str, context: grpc.ServicerContext):
        self._calls = calls
        self._method = method
        self._context = context

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        code = self._context.code()
        if code is None:  # no abort
            status = "OK" if kind is None else "CANCELLED" if issubclass(kind, GeneratorExit) else "UNKNOWN"
        else:
            status = code.name
        self._calls.labels(self._method, status).inc()


class CoordinatorCollector(Collector):
    """What a coordinator knows, asked of it at each scrape.

    Args:
        coordinator: the state machine.
    """

    def __init__(self, coordinator: Coordinator):
        self._coordinator = coordinator

    def collect(self) -> Iterator[Metric]:
        """See :class:`prometheus_client.registry.Collector`."""
        status, tally = self._coordinator.status(), self._coordinator.tally()
        sites = status["sites"]
        yield GaugeMetricFamily("nnunet_fed_sites", "Sites of the study.", len(sites))
        seen = GaugeMetricFamily(
            "nnunet_fed_site_last_seen_timestamp_seconds", "When a site was last heard of since the start.",
            labels=["site"],
        )  # fmt: skip
        active = GaugeMetricFamily(
            "nnunet_fed_site_active", "1: takes part in the newest run; 0: absent, has left, or not here yet.",
            labels=["site"],
        )  # fmt: skip
        for name, site in sites.items():
            if site["last_seen"] is not None:
                seen.add_metric([name], site["last_seen"])
            active.add_metric([name], float(site["standing"] == "active"))
        yield from (seen, active)

        rounds = CounterMetricFamily("nnunet_fed_rounds", "Rounds that have closed.", labels=["run"])
        for run, number in tally.rounds.items():
            rounds.add_metric([run], number)
        yield rounds
        yield SummaryMetricFamily(
            "nnunet_fed_reduction_seconds", "Time to compute results and store them, since the start.",
            tally.reductions, tally.reduction_seconds,
        )  # fmt: skip

        waiting = status["open"]
        yield GaugeMetricFamily("nnunet_fed_open_collectives", "Collectives that have begun.", len(waiting))
        yield GaugeMetricFamily(
            "nnunet_fed_failed_collectives", "Collectives that have failed, and that nobody has begun anew.",
            len(status["failed"]),
        )  # fmt: skip
        closes = GaugeMetricFamily(
            "nnunet_fed_collective_closes_timestamp_seconds", "Deadline of an open collective.", labels=["run", "key"]
        )
        missing = GaugeMetricFamily(
            "nnunet_fed_collective_waits_for", "1: an open collective waits for this site.",
            labels=["run", "key", "site"],
        )  # fmt: skip
        for collective in waiting:
            place = [collective["run"], collective["key"]]
            closes.add_metric(place, collective["closes_at"])
            for site in collective["missing"]:
                missing.add_metric([*place, site], 1)
        yield from (closes, missing)


def _size(message: Any) -> int:
    """Of a message, or of a piece of a payload that goes without one."""
    return message.ByteSize() if hasattr(message, "ByteSize") else memoryview(message).nbytes
