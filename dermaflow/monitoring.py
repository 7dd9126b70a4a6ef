"""Figures of work that ends, for Prometheus, by way of a Pushgateway (``DERMAFLOW_PUSHGATEWAY``).

A service is asked for its figures (`serve.metrics`); a batch is gone before anybody asks, so it pushes them. The
gateway keeps one group a kind of work. Counters go on from what the group says, over all runs and machines, so
``increase()`` means what it says; two processes that push at the same moment may lose one of the two additions. Without
a gateway nothing is sent, and one that does not answer never stops the work.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, pushadd_to_gateway
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from dermaflow.settings import settings

log = logging.getLogger(__name__)

EVERY = 15.0  # seconds between two pushes of work that goes on
PATIENCE = 5.0  # seconds that a gateway has to answer
SILENCE = 300.0  # seconds without a try after one that failed

_Key = tuple[str, tuple[tuple[str, str], ...]]
"""A sample: its name and its labels, sorted."""
_Counted = list[tuple[Metric, _Key, float]]


class Job:
    """The figures of one kind of work, and their group at the gateway.

    Args:
        name: Of the group, Prometheus' label ``job``.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.registry = CollectorRegistry(auto_describe=True)
        self._sent: dict[_Key, float] = {}
        self._lock = threading.Lock()
        self._due = self._silent_until = 0.0

    def counter(self, name: str, help_text: str, labels: tuple[str, ...] = ()) -> Counter:
        """A counter; Prometheus sees it with ``_total`` behind its name."""
        return Counter(name, help_text, labels, registry=self.registry)

    def gauge(self, name: str, help_text: str, labels: tuple[str, ...] = ()) -> Gauge:
        """A figure of the last run; not sent before it is set."""
        made = Gauge(name, help_text, labels, registry=self.registry)
        if not labels:
            made.set(math.nan)
        return made

    def push(self, *, now: bool = True) -> None:
        """Send what was counted since the last push.

        Args:
            now: False sends only if the last push was `EVERY` seconds ago, for work that goes on.
        """
        gateway = settings().pushgateway
        if gateway is None:
            return
        with self._lock:
            if time.monotonic() < (self._silent_until if now else max(self._silent_until, self._due)):
                return
            try:
                earlier = self._earlier(gateway)
                counted = list(self._samples())  # once: other threads go on counting
                pushadd_to_gateway(gateway, self.name, _Together(counted, self._sent, earlier), timeout=PATIENCE)
            except (OSError, ValueError) as error:  # ValueError: what answers is no gateway
                log.warning("figures could not be sent to %s: %s", gateway, error)
                self._silent_until = time.monotonic() + SILENCE
                return
            self._sent = {key: value for _, key, value in counted if key[0].endswith("_total")}
            self._due = time.monotonic() + EVERY

    def _earlier(self, gateway: str) -> dict[_Key, float]:
        """The samples of this group at the gateway."""
        with urllib.request.urlopen(f"{gateway.rstrip('/')}/metrics", timeout=PATIENCE) as answer:
            text = answer.read().decode()
        return {
            _key(sample.name, sample.labels): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.labels.get("job") == self.name
        }

    def _samples(self) -> Iterator[tuple[Metric, _Key, float]]:
        for family in self.registry.collect():
            for sample in family.samples:
                if not sample.name.endswith("_created") and not math.isnan(sample.value):
                    yield family, _key(sample.name, sample.labels), sample.value


class _Together(Collector):
    """What this process counted since it last sent something, on top of what the group has."""

    def __init__(self, counted: _Counted, sent: Mapping[_Key, float], earlier: Mapping[_Key, float]) -> None:
        self._counted, self._sent, self._earlier = counted, sent, earlier

    def collect(self) -> Iterator[Metric]:
        found: dict[_Key, float] = {}
        families: dict[str, Metric] = {}
        for family, key, value in self._counted:
            families[key[0]] = family
            if family.type == "counter":
                value += self._earlier.get(key, 0.0) - self._sent.get(key, 0.0)
            found[key] = value
        for key, value in self._earlier.items():  # of other labels: a push replaces all of a name
            if key[0] in families:
                found.setdefault(key, value)
        for name, family in families.items():
            made = Metric(family.name, family.documentation, family.type)
            for key, value in found.items():
                if key[0] == name:
                    made.add_sample(name, dict(key[1]), value)
            yield made


def _key(name: str, labels: Mapping[str, str]) -> _Key:
    return name, tuple(sorted((k, v) for k, v in labels.items() if k not in ("job", "instance")))


PREPARATION = Job("dermaflow-preparation")
_prepared = PREPARATION.counter("dermaflow_preparation_images", "Images looked at, by what came of it", ("outcome",))
_shards = PREPARATION.counter("dermaflow_preparation_shards", "Shards written")
_prepare_seconds = PREPARATION.counter("dermaflow_preparation_seconds", "Time spent preparing")

TRAINING = Job("dermaflow-training")
_epochs = TRAINING.counter("dermaflow_training_epochs", "Epochs finished")
_trained = TRAINING.counter("dermaflow_training_images", "Images trained on, each as often as it was drawn")
_train_seconds = TRAINING.counter("dermaflow_training_seconds", "Time spent in epochs")
_loss = TRAINING.gauge("dermaflow_training_loss", "Mean training loss of the last epoch, in nats")
_val_loss = TRAINING.gauge("dermaflow_training_validation_loss", "Log loss of the last validation, in nats")
_val_accuracy = TRAINING.gauge(
    "dermaflow_training_validation_balanced_accuracy_ratio", "Balanced accuracy of the last validation, 0 to 1"
)
_epoch_at = TRAINING.gauge("dermaflow_training_last_epoch_timestamp_seconds", "When the last epoch ended")

SCORING = Job("dermaflow-scoring")
_scored = SCORING.counter("dermaflow_scoring_images", "Images scored, by what came of it", ("status",))
_score_seconds = SCORING.counter("dermaflow_scoring_worker_seconds", "Time that workers spent on parts")
_runs = SCORING.counter("dermaflow_scoring_runs", "Runs finished")
_waiting = SCORING.gauge("dermaflow_scoring_remaining_images", "Images that the last run has still to score")
_finished_at = SCORING.gauge("dermaflow_scoring_last_success_timestamp_seconds", "When a run last finished")

FEDERATION = Job("dermaflow-federation")
_rounds = FEDERATION.counter("dermaflow_federation_rounds", "Rounds finished")
_round_seconds = FEDERATION.counter("dermaflow_federation_round_seconds", "Time spent in rounds")
_bytes = FEDERATION.counter(
    "dermaflow_federation_bytes", "Bytes of models and updates, from and to a site", ("site", "direction")
)
_failures = FEDERATION.counter("dermaflow_federation_site_failures", "Rounds that a site was left out of", ("site",))
_site_loss = FEDERATION.gauge("dermaflow_federation_site_loss", "Training loss of a site in the last round", ("site",))
_round_at = FEDERATION.gauge("dermaflow_federation_last_round_timestamp_seconds", "When the last round ended")

FLOWS = Job("dermaflow-flows")
_flow_runs = FLOWS.counter("dermaflow_flow_runs", "Runs of flows that ended, by how", ("flow", "state"))
_flow_seconds = FLOWS.counter("dermaflow_flow_run_seconds", "Time spent in runs of flows", ("flow",))
_flow_last = FLOWS.gauge("dermaflow_flow_last_run_duration_seconds", "Duration of the last run", ("flow",))
_flow_at = FLOWS.gauge("dermaflow_flow_last_success_timestamp_seconds", "When a run last succeeded", ("flow",))

JOBS = (PREPARATION, TRAINING, SCORING, FEDERATION, FLOWS)


def prepared(*, inspected: int, quarantined: int, shards: int, seconds: float) -> None:
    """Count a finished preparation: images read for the first time, images in quarantine, shards written."""
    _prepared.labels("inspected").inc(inspected)
    _prepared.labels("quarantined").inc(quarantined)
    _shards.inc(shards)
    _prepare_seconds.inc(seconds)
    PREPARATION.push()


def epoch_ended(entry: Mapping[str, float]) -> None:
    """Count an epoch by its entry in the history (`dermaflow.learning.loop`)."""
    _epochs.inc()
    _trained.inc(entry["images"])
    _train_seconds.inc(entry["seconds"])
    _loss.set(entry["loss"])
    if "val_loss" in entry:
        _val_loss.set(entry["val_loss"])
        _val_accuracy.set(entry["val_balanced_accuracy"])
    _epoch_at.set_to_current_time()
    TRAINING.push()


def part_scored(*, ok: int, not_assessable: int, failed: int, seconds: float, remaining: int) -> None:
    """Count a part of bulk scoring."""
    for status, count in (("ok", ok), ("not_assessable", not_assessable), ("failed", failed)):
        _scored.labels(status).inc(count)
    _score_seconds.inc(seconds)
    _waiting.set(remaining)
    SCORING.push(now=False)


def run_scored() -> None:
    """Count a run of bulk scoring that finished."""
    _runs.inc()
    _waiting.set(0)
    _finished_at.set_to_current_time()
    SCORING.push()


def round_ended(seconds: float, sites: Mapping[str, Mapping[str, float]], failed: Mapping[str, str]) -> None:
    """Count a round of a federation.

    Args:
        seconds: Of the round.
        sites: Of each site that answered ``sent`` and ``received`` (bytes), and ``loss`` where it tells it.
        failed: Sites that were left out, and why.
    """
    _rounds.inc()
    _round_seconds.inc(seconds)
    for site, figures in sites.items():
        if "loss" in figures:  # it stays at a site that adds noise
            _site_loss.labels(site).set(figures["loss"])
        for direction in ("sent", "received"):
            _bytes.labels(site, direction).inc(figures[direction])
    for site in failed:
        _failures.labels(site).inc()
    _round_at.set_to_current_time()
    FEDERATION.push()


def flow_ended(flow: str, state: str, seconds: float) -> None:
    """Count a run of a flow.

    Args:
        flow: Its name.
        state: ``completed``, ``failed`` or ``cancelled``.
        seconds: That it took.
    """
    _flow_runs.labels(flow, state).inc()
    _flow_seconds.labels(flow).inc(seconds)
    _flow_last.labels(flow).set(seconds)
    if state == "completed":
        _flow_at.labels(flow).set_to_current_time()
    FLOWS.push()
