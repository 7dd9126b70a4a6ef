"""Figures for Prometheus, of one ingress replica. Labels are routes and states, never ids."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """What is counted."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        to = {"registry": self.registry}
        self.requests = Counter("dermaflow_requests", "Requests", ["method", "route", "status"], **to)
        self.seconds = Histogram(
            "dermaflow_request_seconds", "Time to the first byte of the answer", ["route"], buckets=_SECONDS, **to
        )
        self.in_flight = Gauge("dermaflow_requests_in_flight", "Requests that are being worked on", **to)
        self.streams = Gauge("dermaflow_event_streams", "Clients that watch a batch", **to)
        self.refused = Counter("dermaflow_refused", "Requests refused because too many wait", ["where"], **to)
        self.images = Counter("dermaflow_images", "Images classified, by what came of it", ["status"], **to)
        self.batch = Histogram("dermaflow_batch_images", "Images scored at once", buckets=_IMAGES, **to)
        self.pathways = Counter("dermaflow_pathways", "Pathways computed", ["urgency"], **to)
        self.uploaded = Counter("dermaflow_uploaded_bytes", "Bytes uploaded to batches", **to)
        self.batches = Gauge("dermaflow_batches", "Batches by state", ["state"], **to)
        self.model = Gauge("dermaflow_model_info", "The model in use", ["name", "version"], **to)

    def text(self) -> bytes:
        return generate_latest(self.registry)
