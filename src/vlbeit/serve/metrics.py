"""What the server counts, in Prometheus' text format at /metrics."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """One server's counters; each server has a registry of its own."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which nobody asks for
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.requests = Counter(
            "vlbeit_requests_total",
            "Answered requests by route (the mode of /v1 routes) and status",
            ("route", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "vlbeit_request_seconds",
            "From the head of a request to its answer, by route",
            ("route",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.batch_size = Histogram(
            "vlbeit_batch_size",
            "Requests that went through the model together, by mode",
            ("mode",),
            buckets=BATCHES,
            registry=self.registry,
        )
        self.model_seconds = Histogram(
            "vlbeit_model_seconds",
            "Of the model for one batch, by mode",
            ("mode",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.queue_length = self._gauge("vlbeit_queue_length", "Requests that wait for the model")
        self.in_work = self._gauge("vlbeit_in_work", "Requests to the model, not answered yet")
        self.bytes_held = self._gauge("vlbeit_bytes_held", "Bytes of bodies held")
        self.connections = self._gauge("vlbeit_connections", "Open connections")
        self.cut = Counter(
            "vlbeit_connections_cut_total",
            "Connections that were cut, by what the client took too long for",
            ("reason",),
            registry=self.registry,
        )

    def _gauge(self, name: str, help: str) -> Gauge:
        return Gauge(name, help, registry=self.registry)

    def text(self) -> bytes:
        return generate_latest(self.registry)
