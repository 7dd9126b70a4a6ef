"""The coordinator's side of a run: first weights, rounds, checkpoints, the final look at every site's test split."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from datetime import UTC, datetime
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from safetensors.numpy import load_file, save

from clients.answers import check_answer, copies_of
from clients.grid import SiteGrid
from clients.messages import CONFIG, Known, array_of, content_bytes, order_record
from clients.plan import Order, Plan
from clients.privacy import guarantee, private_head
from clients.rounds import RoundRecord, SiteRounds
from clients.secure_grid import SecureGrid
from clients.site import Layouts, Model
from clients.site_data import simulated_sites
from clients.wire import pack, unpack
from dermaflow import monitoring, storage
from dermaflow.errors import CheckpointError, FederationError
from dermaflow.learning.backbones import Network, build
from dermaflow.learning.linear_head import ABSENT, SCALES, ClassSums, discriminant_head
from dermaflow.learning.optimisation import Scope
from dermaflow.learning.train import versions
from dermaflow.schemas.bundle import Calibration, Copies, Reference
from dermaflow.trust.ood import reference_of_sums
from dermaflow.trust.pooled import CalibrationCounts, ScalingSums, calibration_of, fit_scaling

log = logging.getLogger(__name__)

CHECKPOINT, ROUNDS, RESULT, WEIGHTS = "checkpoint.safetensors", "rounds.jsonl", "result.json", "weights.safetensors"
REFERENCE = "reference.safetensors"
UNSEEN = -30.0
"""First logit of a class that no site has: as good as never, and yet a number that training can move."""
ONLINE = 120.0
"""Seconds to wait for all sites of a run; then it begins with those that are there, if they are a quorum."""


S = TypeVar("S", ClassSums, ScalingSums, CalibrationCounts)


class Coordinator:
    """One federated run, from the plan to `result.json`.

    Args:
        plan: What to do.
        grid: Flower's.
        run: Name of the run, under which sites remember things.
    """

    def __init__(self, plan: Plan, grid: Grid, run: str) -> None:
        self.plan, self.out = plan, Path(plan.out)
        self.out.mkdir(parents=True, exist_ok=True)
        recipe = plan.parsed_recipe
        torch.manual_seed(plan.seed)
        self.network = build(recipe.backbone)
        self.order = Order(
            run=run, round=0, rounds=plan.rounds, strategy=plan.strategy, scope=plan.scope,
            recipe=recipe.model_copy(update={"seed": plan.seed}), local_epochs=plan.local_epochs,
            adjusted=plan.loss == "adjusted", norm=plan.norm, weigh=plan.weigh, keep_moments=plan.keep_moments,
            seed=plan.seed, mu=plan.proximal_mu if plan.strategy == "fedprox" else 0.0, resamples=plan.resamples,
            secure_range=plan.secure_range if plan.secure else 0.0, dp=plan.dp, epsilon=plan.epsilon, delta=plan.delta,
            noise=plan.noise, clip=plan.clip, directions=plan.directions,
        )  # fmt: skip
        self.rounds = read_rounds(self.out)
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        self.asked: dict[int, dict[str, int]] = {}  # bytes of questions beside the rounds, by node
        self.known = Known()
        self.unanswered: dict[str, dict[str, str]] = {}  # why, by question beside the rounds and by site
        self._failed: Callable[[dict[str, str]], None] = lambda reasons: self._left_out("online", reasons)
        self.grid = self._find_sites(grid)
        chosen = plan.only.split(",") if plan.only else list(self.grid.names.values())
        self.training = self._grid_of(
            {node: name for node, name in self.grid.names.items() if name in chosen}, secure=plan.secure
        )
        if not self.training.names:
            raise FederationError(
                f"no site to train with: asked for {chosen or 'all'}, left out {self.unanswered or 'none'}",
                expected=f"some of {sorted(self.grid.names.values())}" if self.grid.names else "sites that answer",
            )  # fmt: skip

    def run(self) -> dict[str, Any]:
        """Everything; what an earlier process of the same run finished is not done again."""
        began = time.monotonic()
        described = self._ask(self.training, "describe", None, self.order)
        self._enough("describe")
        counts = {self._site_of(answer): array_of(answer, "train").tolist() for answer in described}
        data = {self._site_of(answer): str(answer.content.config_records[CONFIG]["data"]) for answer in described}
        calibration_images = np.sum([array_of(answer, "calibration") for answer in described], axis=0)
        copies = common_copies(described)
        images = {site: sum(of_site) for site, of_site in counts.items()}
        self.training.images = dict.fromkeys(images, 1.0) if self.plan.dp == "site" else images
        most = max(images.values(), default=0)
        self.order = self.order.model_copy(update={"most_images": most})
        if self.plan.weights_of == "all":
            self.order = self.order.model_copy(update={"counts": np.sum(list(counts.values()), axis=0).tolist()})
        if self.plan.head == "statistics" and not self.rounds:
            self._statistics_head(counts)
        scopes: list[tuple[Scope, int, int]] = [
            ("head", 1, self.plan.head_rounds), (self.plan.scope, self.plan.head_rounds + 1, self.plan.rounds)
        ]  # fmt: skip
        for scope, first, last in scopes:
            if first <= last:
                self._train(scope, first, last)
        storage.write_bytes(self.out / WEIGHTS, save({k: v.numpy() for k, v in self.network.state_dict().items()}))
        sites = self._evaluate()
        calibration = None
        # Else a site calibrates for itself: under noise no exact sum leaves it, and with its own normalisation its sums
        # would be of another model than the one that is saved
        if self.plan.dp in ("none", "central") and self.plan.norm != "local":
            calibration, reference = self._calibrate(calibration_images)
            storage.write_bytes(self.out / REFERENCE, save({"mean": reference.mean, "whitener": reference.whitener}))
            for site, found in self._reliability(calibration).items():
                if site in sites:
                    sites[site]["reliability"] = found
        result = {
            "calibration": calibration.model_dump(mode="json") if calibration else None,
            "privacy": guarantee(self.plan, len(self.rounds)),
            "plan": self.plan.model_dump() | {"recipe": json.loads(self.plan.recipe)},
            "copies": copies.model_dump() if copies else None, "counts": counts,
            "rounds": self.rounds, "sites": sites, "seconds": time.monotonic() - began,
            "training_sites": sorted(self.training.names.values()), "data": data, "versions": versions(),
            "asked": {name: self.asked.get(node, {}) for node, name in self.grid.names.items()},
            "unanswered": self.unanswered, "started": self.started,
        }  # fmt: skip
        storage.write_bytes(self.out / RESULT, json.dumps(result, indent=1).encode())
        return result

    def _find_sites(self, grid: Grid) -> SiteGrid:
        names = self.plan.node_ids()
        if names:
            found = self._grid_of(names, grid)
            found.wait(ONLINE, max(self.plan.min_sites, math.ceil(self.plan.quorum * len(names))))
            return found
        expected = len(simulated_sites(self.plan.shards, self.plan.partition))
        end = time.monotonic() + ONLINE
        while len(list(grid.get_node_ids())) < expected and time.monotonic() < end:
            time.sleep(0.1)
        found = self._grid_of({node: str(node) for node in grid.get_node_ids()}, grid)
        answers = self._ask(found, "describe", None, self.order)
        own = {reply.metadata.src_node_id: str(reply.content.config_records[CONFIG]["site"]) for reply in answers}
        return self._grid_of(own, grid)

    def _grid_of(self, names: dict[int, str], grid: Grid | None = None, *, secure: bool = False) -> SiteGrid:
        options: dict[str, Any] = {
            "quorum": self.plan.quorum, "grace": self.plan.grace, "failed": lambda reasons: self._failed(reasons),
            "check": lambda answer: check_answer(answer, self.network.head.in_features),
        }  # fmt: skip
        if secure:
            options |= {"threshold": self.plan.secure_threshold, "limit": self.plan.secure_range}
            return SecureGrid(grid or self.grid, names, **options)
        return SiteGrid(grid or self.grid, names, **options)

    def _ask(
        self, grid: SiteGrid, question: str, model: Model | None, order: Order, **more: np.ndarray
    ) -> list[Message]:
        self._failed = lambda reasons: self._left_out(question, reasons)
        layouts = Layouts.of(order) if model else None
        messages = []
        for node in grid.get_node_ids():
            sent = self.known.unsent(grid.names[node], model, layouts) if model and layouts else None
            record = order_record(order, sent, layouts, **more)
            messages.append(Message(record, dst_node_id=node, message_type=f"query.{question}"))
        for message in messages:  # counted now: sent, a message may be emptied
            sizes = self.asked.setdefault(message.metadata.dst_node_id, {"received": 0, "sent": 0})
            sizes["received"] += content_bytes(message.content)
        answers = grid.send_and_receive(messages, timeout=self.plan.timeout)
        for answer in answers:
            self.asked[answer.metadata.src_node_id]["sent"] += content_bytes(answer.content)
        if model and layouts:
            self.known.note(grid.answered, model, layouts)
        return answers

    def _left_out(self, question: str, reasons: dict[str, str]) -> None:
        self.unanswered.setdefault(question, {}).update(reasons)
        self.known.forget(reasons)
        for site, reason in sorted(reasons.items()):
            log.warning("%s: %s left out: %s", question, site, reason)

    def _site_of(self, answer: Message) -> str:
        return self.grid.names[answer.metadata.src_node_id]

    def _enough(self, question: str) -> None:
        """Raise FederationError if fewer sites than the plan wants are in the last answers."""
        count = len(self.training.answered)
        if count < self.plan.min_sites:
            raise FederationError(f"{count} sites answered {question}", expected=f"at least {self.plan.min_sites}")

    def _model(self, order: Order) -> tuple[Model, Layouts]:
        """The coordinator's network in pieces."""
        layouts, tensors = Layouts.of(order), self.network.state_dict()
        pieces = [pack(tensors, layout) for layout in (layouts.weights, layouts.norm, layouts.rest)]
        return Model(pieces[0], pieces[1], pieces[2]), layouts

    def _statistics_head(self, counts: dict[str, list[int]]) -> None:
        """A head from the sums of all sites: linear discriminant analysis on the frozen backbone's features."""
        order = self.order.model_copy(update={"scope": "head"})
        private, more = self.plan.dp == "lesion", {}
        if private:
            answers = self._ask(self.training, "centre", self._model(order)[0], order)
            self._enough("centre")
            lesions = max(float(np.sum(list(counts.values()))), 1.0)
            more["centre"] = np.sum([array_of(answer, "sum") for answer in answers], axis=0) / lesions
        answers = self._ask(self.training, "class_sums", self._model(order)[0], order, **more)
        self._enough("class_sums")
        sums = [ClassSums(*(array_of(a, name) for name in ("counts", "sums", "products"))) for a in answers]
        total = sum(sums[1:], sums[0])
        even = np.ones(len(total.counts)) if self.order.adjusted else None  # what the adjusted loss trains towards
        weight, bias = private_head(total, more["centre"], even) if private else discriminant_head(total, priors=even)
        self._put_head(weight, bias)
        scale = 1.0
        if not private:  # the sums for a scale are exact
            answers = self._ask(self.training, "scale_losses", self._model(order)[0], order)
            scale = float(SCALES[np.sum([array_of(a, "losses") for a in answers], axis=0).argmin()]) if answers else 1.0
        self._put_head(scale * weight, np.where(bias == ABSENT, UNSEEN, scale * bias))
        sites, images = len(self.training.answered), int(total.counts.sum())
        log.info("head from the sums of %d sites, %d images; scale %.3f", sites, images, scale)

    def _put_head(self, weight: np.ndarray, bias: np.ndarray) -> None:
        with torch.no_grad():
            self.network.head.weight.copy_(torch.from_numpy(weight))
            self.network.head.bias.copy_(torch.from_numpy(bias))

    def _train(self, scope: Scope, first: int, last: int) -> None:
        done = len(self.rounds)
        if done > last:
            return
        order = self.order.model_copy(update={"scope": scope})
        model, layouts = self._model(order)
        phase = SiteRounds(self.plan, order, layouts, model, first, len(self.training.names), self.known, self._note)
        checkpoint = self.out / CHECKPOINT
        if first <= done:
            if not checkpoint.exists():
                raise CheckpointError("no checkpoint of the rounds that are done", where=checkpoint)
            phase.restore(load_file(checkpoint))
            phase.first = done + 1
        self._failed = phase.failed

        def keep(number: int, arrays: ArrayRecord) -> None:
            if number:
                storage.write_bytes(checkpoint, save(phase.state()))
                self._write_round(phase.record)

        if phase.first <= last:
            phase.start(
                self.training, ArrayRecord({"weights": Array(phase.model.weights)}), last - phase.first + 1,
                self.plan.timeout, ConfigRecord(), evaluate_fn=keep,
            )  # fmt: skip
        kept = phase.kept if last == self.plan.rounds else phase.model
        tensors = unpack(kept.weights, layouts.weights) | unpack(kept.norm, layouts.norm)
        self.network.load_state_dict(tensors, strict=False)

    def _note(self, record: RoundRecord) -> None:
        losses = ", ".join(f"{name} {of.get('loss', math.nan):.3f}" for name, of in sorted(record.sites.items()))
        log.info("round %d of %d: %.1f s, loss %s", record.round, self.plan.rounds, record.seconds, losses)
        for site, reason in record.failed.items():
            log.warning("round %d: %s left out: %s", record.round, site, reason)
        monitoring.round_ended(record.seconds, record.sites, record.failed)

    def _write_round(self, record: RoundRecord) -> None:
        entry = asdict(record)
        if record.confusion is not None:
            entry["confusion"] = record.confusion.tolist()
            entry["balanced_accuracy"] = balanced_accuracy(record.confusion)
        self.rounds.append(entry)
        lines = "".join(json.dumps(row) + "\n" for row in self.rounds)
        storage.write_bytes(self.out / ROUNDS, lines.encode())

    def _calibrate(self, images: np.ndarray) -> tuple[Calibration, Reference]:
        """Temperature, bias, sets, thresholds and out-of-distribution distance from sums of the training sites.

        Args:
            images: [7], images of each class in their calibration splits.
        """

        def total(kind: type[S], question: str, model: Model | None, **more: np.ndarray) -> S:
            answers = self._ask(self.training, question, model, self.order, **more)
            self._enough(question)
            names = [item.name for item in fields(kind)]
            return reduce(add, [kind(*(array_of(answer, name) for name in names)) for answer in answers])

        features = total(ClassSums, "class_sums", None)  # of the model that was evaluated: the sites have it
        reference = reference_of_sums(features.counts.sum(), features.sums.sum(0), features.products)
        temperature, bias = fit_scaling(lambda at: total(ScalingSums, "scaling_sums", None, parameters=at))
        counts = total(
            CalibrationCounts, "calibration_counts", None, parameters=np.append(np.log(temperature), bias),
            priors=images / images.sum(), mean=reference.mean, whitener=reference.whitener,
        )  # fmt: skip
        return calibration_of(counts, temperature, bias), reference

    def _evaluate(self) -> dict[str, Any]:
        """The final model on every site's test split: counts only."""
        model, _ = self._model(self.order)
        answers = self._ask(self.grid, "evaluate", model, self.order)
        return {
            self._site_of(a): {name: array_of(a, name).tolist() for name in ("confusion", "lesions", "hits", "totals")}
            for a in answers
        }

    def _reliability(self, calibration: Calibration) -> dict[str, Any]:
        """The calibrated model on every site's test split: counts by bin of its confidence."""
        parameters = np.append(np.log(calibration.temperature), calibration.bias)
        answers = self._ask(self.grid, "reliability", None, self.order, parameters=parameters)
        return {self._site_of(a): {name: array_of(a, name).tolist() for name in ("bins", "error")} for a in answers}


def common_copies(described: list[Message]) -> Copies | None:
    """How the training images of all sites are stored, if all are small JPEG copies alike."""
    found = {copies_of(answer) for answer in described if array_of(answer, "train").any()}
    return found.pop() if len(found) == 1 else None


def balanced_accuracy(confusion: np.ndarray) -> float:
    """Mean recall of the classes that are there, of counts [7, 7], truth by prediction."""
    there = confusion.sum(1) > 0
    return float((np.diag(confusion)[there] / confusion.sum(1)[there]).mean())


def read_rounds(out: Path) -> list[dict[str, Any]]:
    """The finished rounds of a run's folder."""
    path = out / ROUNDS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def network_of_result(plan: Plan, folder: Path) -> Network:
    """The network of a finished run."""
    network = build(plan.parsed_recipe.backbone.model_copy(update={"weights": None}))
    network.load_state_dict({name: torch.from_numpy(array) for name, array in load_file(folder / WEIGHTS).items()})
    return network
