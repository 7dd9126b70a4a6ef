"""What a site does when it is asked: train, describe, count. It knows nothing of the network in between."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import torch
from scipy.special import softmax

from clients.memory import Memory
from clients.plan import Norm, Order
from clients.site_data import SiteData
from clients.wire import Layout, layout_of, norm_layout, norm_parameters, pack, rest_layout, unpack
from dermaflow.errors import DataError
from dermaflow.evaluation.crosssite import Reliability, count_test, reliability_of
from dermaflow.learning.backbones import BackboneConfig, Network, build
from dermaflow.learning.inference import predict
from dermaflow.learning.linear_head import ClassSums, class_sums, scale_losses
from dermaflow.learning.local import class_counts, memory_feed
from dermaflow.learning.loop import Batch, Feed, Run, fit
from dermaflow.learning.optimisation import Scope, keep_freed_memory, pick_device
from dermaflow.learning.recipe import Recipe
from dermaflow.preparation.balancing import balance
from dermaflow.schemas.bundle import Reference
from dermaflow.schemas.shard import Split
from dermaflow.settings import settings
from dermaflow.trust.ood import ood_score
from dermaflow.trust.pooled import CalibrationCounts, ScalingSums, calibration_counts, scaling_sums


@dataclass
class Model:
    """A network in pieces, as it travels.

    Attributes:
        weights: float32 [size of `layout_of`], what is trained and shared.
        norm: float32 [size of `norm_layout`], running statistics of normalisation layers that training moves.
        rest: float32, everything else, sent once; None where the site has it already.
        control: float32 like `weights`, SCAFFOLD's control variate of the coordinator; None without SCAFFOLD.
    """

    weights: np.ndarray
    norm: np.ndarray
    rest: np.ndarray | None = None
    control: np.ndarray | None = None


@dataclass
class Update:
    """What a site answers after training.

    Attributes:
        delta: float32, new weights less those received; where `Order.weigh` is ``steps``, divided by its steps.
        norm: float32, the site's running statistics.
        control: float32, change of the site's control variate; None without SCAFFOLD.
        figures: ``images``, ``steps``, ``loss``, ``seconds`` and, where asked, ``val_*`` of the received model.
        confusion: int [7, 7], truth by prediction of the received model on the calibration split; None if not asked.
    """

    delta: np.ndarray
    norm: np.ndarray
    control: np.ndarray | None
    figures: dict[str, float]
    confusion: np.ndarray | None = field(default=None)


@dataclass(frozen=True)
class Layouts:
    """Names and shapes of a `Model`'s pieces."""

    weights: Layout
    norm: Layout
    rest: Layout

    @classmethod
    def of(cls, order: Order) -> Layouts:
        """For what an order trains."""
        return cls._of(order.recipe.backbone.model_dump_json(), order.scope, order.norm)

    @classmethod
    @lru_cache(maxsize=16)
    def _of(cls, backbone: str, scope: Scope, norms: Norm) -> Layouts:
        network = empty_network(BackboneConfig.model_validate_json(backbone))
        weights = layout_of(network, scope, local_norm=norms == "local")
        norm = norm_layout(network, scope, frozen=norms == "frozen")
        return cls(weights, norm, rest_layout(network, weights, norm))


def empty_network(config: BackboneConfig) -> Network:
    """A network whose tensors have names and shapes, but no numbers yet."""
    with torch.device("meta"):
        return build(config.model_copy(update={"weights": None}))


class Site:
    """One hospital's images and what it remembers of a run."""

    def __init__(self, data: SiteData, memory: Memory) -> None:
        self.data = data
        self.memory = memory

    def train(self, order: Order, model: Model) -> Update:
        """Train the received model on the site's training split.

        The received model is looked at first, on the calibration split, so that no message is needed for it alone.

        Raises:
            DataError: The site has no training image.
        """
        torch.set_num_threads(settings().threads)
        keep_freed_memory()
        network = self.network(order, model)
        layouts = Layouts.of(order)
        labels = self.data.labels("train")
        if not len(labels):
            raise DataError("no training image", where=self.data.name)
        seen = self._confusion(network, order, "calibration") if order.monitor else None
        recipe = local_recipe(order, self.data.name)
        size = recipe.input.height, recipe.input.width
        rule = balance(np.array(order.counts) if order.counts else class_counts(labels), recipe.balance)
        partly = order.local_epochs < 1  # parts of one epoch come from one order of the images
        drawn = recipe.model_copy(update={"seed": _seed(order, 0, self.data.name)}) if partly else recipe
        feed = memory_feed(self.data.pixels("train", *size), labels, rule, drawn)
        if partly:
            feed = part_of_epoch(feed, order)
        kept = self.memory.recall("moments") if order.keep_moments else None
        correction = Correction(network, layouts.weights, order, model.control, self.memory)
        run = Run(
            recipe, feed, rule, class_counts(labels) / len(labels), self.data.data_hash, pick_device(),
            correct=correction, moments={name: torch.from_numpy(array) for name, array in (kept or {}).items()},
        )  # fmt: skip
        network, history = fit(network, run)
        if order.keep_moments:
            self.memory.keep("moments", **{name: tensor.numpy() for name, tensor in run.moments.items()})
        delta = pack(network.state_dict(), layouts.weights) - model.weights
        norm = pack(network.state_dict(), layouts.norm)
        if order.norm == "local":
            own = {name: t for name, t in network.state_dict().items() if name in _own_names(network)}
            self.memory.keep("norm", **{name: tensor.numpy() for name, tensor in own.items()})
        steps = feed.steps * len(history)
        if order.weigh == "steps":
            delta /= steps
        figures = {"images": float(len(labels)), "steps": float(steps), "loss": history[-1]["loss"]}
        figures["seconds"] = sum(entry["seconds"] for entry in history)
        return Update(delta, norm, correction.finish(), figures, seen)

    def network(self, order: Order, model: Model) -> Network:
        """The received model, whole, with the site's own normalisation where that is the order.

        Raises:
            DataError: A part that is sent once never came here.
        """
        layouts = Layouts.of(order)
        if layouts.rest.size and model.rest is not None:
            self.memory.keep("rest", rest=model.rest)
        rest = self.memory.recall("rest")
        if layouts.rest.size and (rest is None or rest["rest"].shape != (layouts.rest.size,)):
            raise DataError("the part of the model that is not trained never came", where=self.data.name)
        tensors = unpack(model.weights, layouts.weights) | unpack(model.norm, layouts.norm)
        if rest is not None and layouts.rest.size:
            tensors |= unpack(rest["rest"], layouts.rest)
        if order.norm == "local" and (own := self.memory.recall("norm")):
            tensors |= {name: torch.from_numpy(array) for name, array in own.items()}
        network = empty_network(order.recipe.backbone)
        for name in network.state_dict():
            if name.endswith("num_batches_tracked"):
                tensors[name] = torch.zeros((), dtype=torch.int64)
        network.load_state_dict(tensors, assign=True)
        return network

    def class_sums(self, order: Order, model: Model) -> ClassSums:
        """Sums of the features of the training split."""
        _, features = self._predict(self.network(order, model), order, "train")
        return class_sums(features, self.data.labels("train"))

    def scale_losses(self, order: Order, model: Model) -> np.ndarray:
        """Sums of the log loss of the calibration split, for the scale of a head from sums."""
        logits, _ = self._predict(self.network(order, model), order, "calibration")
        return scale_losses(logits, self.data.labels("calibration"))

    def evaluate(self, order: Order, model: Model) -> dict[str, np.ndarray]:
        """Counts of the final model on the test split; it and what it says of the calibration split are kept here.

        Returns:
            ``confusion`` int64 [7, 7], truth by prediction; ``hits`` and ``totals`` int64 [R, 7] in each resample of
            the site's lesions; ``lesions`` int64 [7].
        """
        network = self.network(order, model)
        self.memory.keep("model", weights=model.weights, norm=model.norm)
        logits, features = self._predict(network, order, "calibration", views=order.recipe.input.views)
        self.memory.keep("final", logits=logits, features=features)
        logits, _ = self._predict(network, order, "test", views=order.recipe.input.views)
        self.memory.keep("test", logits=logits)
        return vars(count_test(predicted=logits.argmax(1), **self._test(order)))

    def final_model(self) -> Model:
        """The model that was evaluated; raises DataError if none was."""
        final = self._final("model")
        return Model(final["weights"], final["norm"])

    def reliability(self, order: Order, parameters: np.ndarray) -> Reliability:
        """How well the final model is calibrated on the test split, at log temperature and bias [8] of all sites."""
        logits = self._final("test")["logits"]
        p = softmax(logits.astype(np.float64) / np.exp(parameters[0]) + parameters[1:], axis=1)
        return reliability_of(p, **self._test(order))

    def _test(self, order: Order) -> dict[str, Any]:
        return {
            "labels": self.data.labels("test"), "lesions": self.data.metadata("test")["lesion_id"].to_numpy(),
            "seed": order.seed, "resamples": order.resamples,
        }  # fmt: skip

    def scaling_sums(self, parameters: np.ndarray) -> ScalingSums:
        """Sums of the final model's log loss on the calibration split, at a temperature and bias."""
        return scaling_sums(self._final()["logits"], self.data.labels("calibration"), parameters)

    def calibration_counts(
        self, order: Order, parameters: np.ndarray, priors: np.ndarray, mean: np.ndarray, whitener: np.ndarray
    ) -> CalibrationCounts:
        """Histograms of the final model on the calibration split.

        Args:
            order: For its seed.
            parameters: [8], log temperature and bias of all sites.
            priors: [7], class frequencies of all sites' calibration splits.
            mean: float32 [D], of the features of all sites' training splits.
            whitener: float32 [D, D], see `Reference`.
        """
        final = self._final()
        reference = Reference(np.zeros((0, len(mean)), np.float16), mean, whitener, (), (), ())
        return calibration_counts(
            final["logits"], self.data.labels("calibration"), self.data.metadata("calibration")["lesion_id"].to_numpy(),
            float(np.exp(parameters[0])), parameters[1:], priors.tolist(), ood_score(final["features"], reference),
            seed=order.seed,
        )  # fmt: skip

    def _final(self, place: str = "final") -> dict[str, np.ndarray]:
        final = self.memory.recall(place)
        if final is None:
            raise DataError("the final model never came", where=self.data.name)
        return final

    def _confusion(self, network: Network, order: Order, split: Split) -> np.ndarray:
        logits, _ = self._predict(network, order, split)
        counts = np.zeros((7, 7), np.int64)
        np.add.at(counts, (self.data.labels(split), logits.argmax(1)), 1)
        return counts

    def _predict(self, network: Network, order: Order, split: Split, views: int = 1) -> tuple[np.ndarray, np.ndarray]:
        spec = order.recipe.input_spec.model_copy(update={"views": views})
        pixels = self.data.pixels(split, spec.height, spec.width)
        if not len(pixels):
            return np.zeros((0, 7), np.float32), np.zeros((0, network.head.in_features), np.float32)
        device = pick_device()
        network = network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return predict(network, pixels, spec)


class Correction:
    """Changes local gradients: FedProx's pull to the received weights, SCAFFOLD's control variates.

    FedProx: Li et al., MLSys 2020 (arXiv 1812.06127). SCAFFOLD: Karimireddy et al., ICML 2020 (arXiv 1910.06378). There
    a site's new variate is, in option II, ``c_i - c + (x - y) / (K lr)``. With plain gradient descent that is the mean
    of the gradients that the site saw, and so it is computed here: it then means the same under every optimiser.
    """

    def __init__(
        self, network: Network, layout: Layout, order: Order, control: np.ndarray | None, memory: Memory
    ) -> None:
        self._memory, self._layout, self._mu = memory, layout, order.mu
        self._place = f"control-{order.scope}"
        self._steps = 0
        self._received: dict[str, torch.Tensor] = {}
        self._shift: dict[str, torch.Tensor] | None = None
        self._seen: dict[str, torch.Tensor] = {}
        if order.mu:
            self._received = {name: tensor.detach().clone() for name, tensor in network.named_parameters()}
        if control is not None:
            kept = memory.recall(self._place)
            self._own = np.zeros_like(control) if kept is None else kept["control"]
            self._shift = unpack(control - self._own, layout)

    def __call__(self, network: Network) -> None:
        if not self._mu and self._shift is None:
            return
        self._steps += 1
        for name, parameter in network.named_parameters():
            if parameter.grad is None:
                continue
            if self._mu:
                self._received[name] = self._received[name].to(parameter.device)
                parameter.grad.add_(parameter.detach() - self._received[name], alpha=self._mu)
            if self._shift is not None and name in self._shift:
                if self._shift[name].device != parameter.device:
                    self._shift[name] = self._shift[name].to(parameter.device)
                if name in self._seen:
                    self._seen[name].add_(parameter.grad)
                else:
                    self._seen[name] = parameter.grad.detach().clone()
                parameter.grad.add_(self._shift[name])

    def finish(self) -> np.ndarray | None:
        """Change of the site's control variate, which it keeps from now on."""
        if self._shift is None:
            return None
        mean = {name: seen / self._steps for name, seen in self._seen.items()}
        new = pack(mean, self._layout)
        self._memory.keep(self._place, control=new)
        change: np.ndarray = new - self._own
        return change


def part_of_epoch(feed: Feed, order: Order) -> Feed:
    """The batches of a round that is less than an epoch: rounds follow each other through the epochs."""
    steps = max(1, round(feed.steps * order.local_epochs))
    start = (order.round - 1) * steps

    def batches(_: int) -> Iterator[Batch]:
        done = start
        while done < start + steps:
            epoch, step = divmod(done, feed.steps)
            part = list(islice(feed.epoch(epoch), step, step + start + steps - done))
            done += len(part)
            yield from part

    return Feed(steps, batches)


def local_recipe(order: Order, site: str) -> Recipe:
    """The recipe of a site's own epochs in a round: a constant rate, and a seed of this site and round."""
    recipe = order.recipe
    head, epochs = order.scope == "head", math.ceil(order.local_epochs)
    optim = recipe.optim.model_copy(
        update={
            "head_epochs": epochs if head else 0,
            "epochs": 0 if head else epochs,
            "freeze_norm": order.norm == "frozen",
            "trained": "all" if head else order.scope,
            "lr": recipe.optim.lr * order.rate,
            "head_lr": recipe.optim.head_lr * order.rate,
            "schedule": "constant",
            "ema": 0.0,
            "patience": None,
        }
    )
    loss = recipe.loss
    weights = recipe.balance
    if order.adjusted:
        loss = loss.model_copy(update={"name": "logit_adjusted", "tau": 1.0})
        weights = weights.model_copy(update={"strategy": "none"})
    return recipe.model_copy(
        update={
            "optim": optim, "loss": loss, "balance": weights, "validation_fold": None,
            "seed": _seed(order, order.round, site),
            "input": recipe.input.model_copy(update={"small_epochs": 0}),
        }
    )  # fmt: skip


def _own_names(network: Network) -> set[str]:
    """Parameters and statistics of normalisation layers that keep statistics."""
    statistics = {name for name in network.state_dict() if name.endswith((".running_mean", ".running_var"))}
    return norm_parameters(network) | statistics


def _seed(order: Order, round_: int, site: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{order.seed}/{round_}/{site}".encode()).digest()[:4], "big")
