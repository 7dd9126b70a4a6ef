"""Rounds of training: Flower's strategies do the sums, this adds what every run needs around them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedMedian, FedTrimmedAvg, FedYogi, Krum, Strategy

from clients.grid import SiteGrid
from clients.messages import ARRAYS, METRICS, Known, content_bytes, order_record, read_update
from clients.plan import Order, Plan
from clients.privacy import next_clip, noised_mean
from clients.scaffold import CONTROL, Scaffold
from clients.secure import update_of
from clients.secure_grid import SecureGrid
from clients.site import Layouts, Model, Update
from clients.wire import WireError, merge_norm
from dermaflow.errors import FederationError
from dermaflow.evaluation.metrics import balanced_accuracy
from dermaflow.learning.optimisation import Scope, cosine_rate

_STATE = ("m_t", "v_t", "momentum_vector", "control")
"""What Flower's strategies and ours remember between rounds."""


def make_strategy(plan: Plan, sites: int) -> FedAvg:
    """The strategy that a plan names, over `sites` sites."""
    options: dict[str, Any] = {
        "fraction_train": plan.fraction, "min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1,
    }  # fmt: skip
    rate = plan.server_rate
    match plan.strategy:
        case "fedavgm":
            return FedAvgM(server_learning_rate=rate or 1.0, server_momentum=plan.server_momentum, **options)
        case "fedadam":
            return FedAdam(eta=rate or 1e-2, beta_1=0.9, beta_2=0.99, **options)
        case "fedyogi":
            return FedYogi(eta=rate or 1e-2, beta_1=0.9, beta_2=0.99, **options)
        case "scaffold":
            return Scaffold(sites=sites, rate=rate or 1.0, **options)
        case "trimmed_mean":
            return FedTrimmedAvg(beta=0.0, **options)  # see `trimmed_share`
        case "median":
            return FedMedian(**options)
        case "krum":
            return Krum(num_malicious_nodes=plan.malicious, **options)
    return FedAvg(**options)  # fedprox too: its pull is the site's work


def trimmed_share(answers: int, malicious: int) -> float:
    """Share of the answers to leave out at each end, so that it is as many as may lie, however many came.

    Raises:
        FederationError: Nothing would be left.
    """
    if answers <= 2 * malicious:
        raise FederationError(
            f"{answers} sites answered; a trimmed mean leaves out the {malicious} largest and smallest of each number",
            expected=f"at least {2 * malicious + 1}", todo="wait for more sites, or lower malicious",
        )  # fmt: skip
    return (malicious + 0.25) / answers  # Flower rounds down


@dataclass
class RoundRecord:
    """What is known of a round.

    Attributes:
        round: Its number, from 1, over all phases.
        scope: What was trained.
        seconds: From the first message to the new model.
        sites: Figures of each site that answered: images, loss, seconds, sent and received bytes; where the model was
            looked at, ``balanced_accuracy`` of the model that the round began with on its calibration split. Under
            secure aggregation the loss is that of all together, and no site's balanced accuracy is known.
        failed: Sites that did not, and why.
        confusion: int [7, 7] of the model that the round began with, over the answering sites' calibration splits.
    """

    round: int
    scope: Scope
    seconds: float = 0.0
    sites: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    confusion: np.ndarray | None = None


class SiteRounds(Strategy):
    """Wraps a strategy of Flower: checks answers, merges normalisation statistics, keeps the average of the rounds.

    Args:
        plan: The run.
        order: What the sites are asked, for round 1; the round and the learning rate are filled in.
        layouts: Of the messages.
        model: The model to start from, with `rest`.
        first: Number of the first round of this phase, from 1.
        sites: How many sites may be drawn.
        known: Who has `rest` already.
        on_round: Called with each finished round.
    """

    def __init__(
        self, plan: Plan, order: Order, layouts: Layouts, model: Model, first: int, sites: int,
        known: Known, on_round: Callable[[RoundRecord], None] = lambda record: None,
    ) -> None:  # fmt: skip
        self.plan, self.order, self.layouts = plan, order, layouts
        self.first, self._origin = first, first
        self.inner = make_strategy(plan, sites)
        self.model = model
        self.average: Model | None = None
        self.record = RoundRecord(first, order.scope)
        self._on_round = on_round
        self._known = known
        self._began = 0.0
        self._names: dict[int, str] = {}
        self._grid: SiteGrid | None = None

    @property
    def kept(self) -> Model:
        """The model to keep: the average of the rounds, or the last."""
        return self.average or self.model

    def failed(self, reasons: dict[str, str]) -> None:
        """Note sites that did not answer."""
        self.record.failed |= reasons
        self._known.forget(reasons)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Orders for the sites that the strategy draws."""
        assert isinstance(grid, SiteGrid)
        number = self.first + server_round - 1
        self.record, self._began = RoundRecord(number, self.order.scope), time.monotonic()
        self._names, self._grid = grid.names, grid
        order = self.order.model_copy(
            update={
                "round": number, "rate": self._rate(number), "precision": self.plan.precision,
                "monitor": (number - 1) % self.plan.monitor_every == 0,
            }
        )  # fmt: skip
        random.seed(self.plan.seed * 1009 + number)  # the strategy draws the sites by it
        messages = list(self.inner.configure_train(number - self._origin + 1, arrays, config, grid))
        for message in messages:
            sent = message.content.array_records[ARRAYS]
            control = sent[CONTROL].numpy() if CONTROL in sent else None
            site = self._names[message.metadata.dst_node_id]
            model = self._known.unsent(site, replace(self.model, control=control), self.layouts)
            message.content = order_record(order, model, self.layouts)
            message.metadata.group_id = str(number)  # the round, for the audit logs
            self.record.sites[site] = {"received": float(content_bytes(message.content))}
        return messages

    def _rate(self, number: int) -> float:
        """Share of the learning rate: over the rounds what the recipe has over its steps."""
        if self.plan.decay == "none":
            return 1.0
        rounds = self.plan.rounds
        return cosine_rate(number - 1, rounds, self.order.recipe.optim.warmup * rounds)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the answers, let the strategy move the weights, merge the statistics."""
        good = self._read_sum(list(replies)) if self.plan.secure else self._without_giants(self._read(replies))
        for site in self.record.failed:
            self.record.sites.pop(site, None)
        self._known.note(self.record.sites, self.model, self.layouts)
        if len(self.record.sites) < self.plan.min_sites:
            raise FederationError(
                f"{len(self.record.sites)} sites answered round {self.record.round}; "
                f"{self.record.failed or 'none failed'}",
                expected=f"at least {self.plan.min_sites}", todo="look at the sites named, then submit the run again",
            )  # fmt: skip
        if self.plan.dp == "central":
            good = [(good[0][0], noised_mean([update for _, update in good], self.order))]
        steps = self._mean_steps() if self.order.weigh == "steps" else 1.0
        for reply, update in good:
            arrays = {"weights": Array(self.model.weights + np.float32(steps) * update.delta)}
            if update.control is not None:
                arrays[CONTROL] = Array(update.control)
            figures = {"num-examples": update.figures["images"]}
            reply.content = RecordDict({ARRAYS: ArrayRecord(arrays), METRICS: MetricRecord(figures)})
        number = self.record.round - self._origin + 1  # of the phase, also after a restart: optimisers count by it
        if isinstance(self.inner, FedTrimmedAvg):
            self.inner.beta = trimmed_share(len(good), self.plan.malicious)
        found, metrics = self.inner.aggregate_train(number, [reply for reply, _ in good])
        updates = [update for _, update in good]
        if self.plan.dp in ("site", "central"):
            cut = float(np.mean([update.figures["clipped"] for update in updates]))
            self.order = self.order.model_copy(update={"clip": next_clip(self.order.clip, cut)})
        images = [update.figures["images"] for update in updates]
        if found is not None:
            weights = found["weights"].numpy().astype(np.float32)  # Flower's optimisers compute in float64
            norm = self.model.norm
            if norm.size and self.plan.strategy in ("trimmed_mean", "median", "krum"):
                norm = np.median([update.norm for update in updates], axis=0)  # no site moves it far
            elif norm.size:
                norm = merge_norm([update.norm for update in updates], images, self.layouts.norm)
            self.model = Model(weights, norm, self.model.rest)
            self._average()
        seen = [update.confusion for update in updates if update.confusion is not None]
        self.record.confusion = np.sum(seen, axis=0) if seen else None
        self.record.seconds = time.monotonic() - self._began
        self._on_round(self.record)
        return ArrayRecord({"weights": Array(self.model.weights)}), metrics

    def _mean_steps(self) -> float:
        """Steps of a site, mean over the images: how far the mean of updates a step goes (FedNova's tau_eff).

        Wang et al., NeurIPS 2020 (arXiv 2007.07481). A site that does not say counts as one step.
        """
        sites = self.record.sites.values()
        return sum(site["images"] * site.get("steps", 1.0) for site in sites) / sum(site["images"] for site in sites)

    def _read(self, replies: Iterable[Message]) -> list[tuple[Message, Update]]:
        assert self._grid is not None
        good: list[tuple[Message, Update]] = []
        for reply in replies:
            site = self._names[reply.metadata.src_node_id]
            self.record.sites[site]["sent"] = float(content_bytes(reply.content))
            try:
                update = read_update(reply.content, self.layouts)
                self._grid.check_images(site, update.figures)
                good.append((reply, update))
                confusion = update.confusion
                self.record.sites[site] |= update.figures
                if confusion is not None and confusion.any():
                    seen = balanced_accuracy(confusion[None].astype(np.float64))
                    self.record.sites[site]["balanced_accuracy"] = float(seen[0])
            except WireError as error:
                self.record.failed[site] = f"refused: {error}"
        return good

    def _read_sum(self, replies: list[Message]) -> list[tuple[Message, Update]]:
        """The sites' sum as though it were one site's update; each site's loss is then that of all."""
        assert isinstance(self._grid, SecureGrid)
        figures = self._grid.figures
        if not replies:
            return []
        images = sum(of_site["images"] for of_site in figures.values())
        update = update_of(replies[0].content, self.order, self.layouts, images)
        loss = {name: value for name, value in update.figures.items() if name == "loss"}
        for site in list(self.record.sites):
            if site in figures:
                self.record.sites[site] |= figures[site] | loss
            else:
                self.record.sites.pop(site)
        return [(replies[0], update)]

    def _without_giants(self, good: list[tuple[Message, Update]]) -> list[tuple[Message, Update]]:
        """Leave out updates that are far longer than the others'; with two or fewer there is no telling."""
        if len(good) < 3:
            return good
        lengths = [float(np.linalg.norm(update.delta)) for _, update in good]
        if self.order.weigh == "steps":
            lengths = [
                length * update.figures.get("steps", 1.0) for length, (_, update) in zip(lengths, good, strict=True)
            ]
        middle = float(np.median(lengths))
        kept = []
        for pair, length in zip(good, lengths, strict=True):
            if length > self.plan.largest_update * middle:
                site = self._names[pair[0].metadata.src_node_id]
                self.record.failed[site] = f"refused: its update is {length / middle:.0f} times as long as the median"
            else:
                kept.append(pair)
        return kept

    def _average(self) -> None:
        if not self.plan.average:
            return
        old = self.average or self.model
        share = self.plan.average
        mixed = [
            share * a + (1 - share) * b for a, b in ((old.weights, self.model.weights), (old.norm, self.model.norm))
        ]
        self.average = Model(mixed[0], mixed[1], self.model.rest)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: sites look at the model when it comes for the next round."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing was asked."""
        return None

    def summary(self) -> None:
        """Flower's own lines."""
        self.inner.summary()

    def state(self) -> dict[str, np.ndarray]:
        """Everything that a later process needs to go on after the last round."""
        arrays = {"weights": self.model.weights, "norm": self.model.norm}
        if self.average is not None:
            arrays |= {"average.weights": self.average.weights, "average.norm": self.average.norm}
        arrays["clip"] = np.array(self.order.clip)
        for name in _STATE:
            value = getattr(self.inner, name, None)
            if isinstance(value, dict):
                value = value["weights"]
            elif isinstance(value, list):
                value = value[0]
            if value is not None:
                arrays[f"strategy.{name}"] = np.asarray(value)
        return arrays

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Go on from `state`."""
        self.model = Model(arrays["weights"], arrays["norm"], self.model.rest)
        if "average.weights" in arrays:
            self.average = Model(arrays["average.weights"], arrays["average.norm"], self.model.rest)
        self.order = self.order.model_copy(update={"clip": float(arrays["clip"])})
        for name in _STATE:
            value: Any = arrays.get(f"strategy.{name}")
            if value is not None:
                if name in ("m_t", "v_t"):
                    value = {"weights": value}
                elif name == "momentum_vector":
                    value = [value]
                setattr(self.inner, name, value)
