"""A hospital site: answers what it is asked, from images that never leave it."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients import privacy, secure
from clients.accountant import Ledger, Release, epsilon
from clients.memory import Memory
from clients.messages import ARRAYS, CONFIG, METRICS, array_of, read_model, read_order, update_record
from clients.plan import Order, Plan
from clients.policy import Refused, load_policy, refusal
from clients.site import Layouts, Model, Site
from clients.site_config import load_site
from clients.site_data import SiteData, simulated_sites
from clients.wire import WireError
from dermaflow.settings import start_logging
from dermaflow.taxonomy import CODES

app = ClientApp()
FOLDER = "site-folder"
"""Key of a real SuperNode's configuration: the site's folder, with its configuration, policy and memory."""


@app.train()
def train(message: Message, context: Context) -> Message:
    """A round: new weights less the old, from the site's training split."""
    order, site, model, layouts = _read(message, context)
    if order.dp == "lesion":
        raise Refused("rounds do not go with dp=lesion")
    update = site.train(order, model)
    if order.dp == "site":
        update = privacy.noised_update(update, order, _budget(site, context))
    if secure.is_secure(message):
        arrays = secure.update_sums(update, order, layouts)
        figures = {name: update.figures[name] for name in ("images", "steps", "seconds") if name in update.figures}
        return _masked_answer(message, context, order, site, arrays, figures)
    return Message(update_record(update, order, layouts, site.data.name), reply_to=message)


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """The site's name, how many images of each class each split has, and how they are stored."""
    order, site = _asked(message, context)
    counts = {name: np.array(value, np.int64) for name, value in site.data.counts().items()}
    if order.dp == "lesion":
        counts["train"] = privacy.lesion_counts(site, order, _budget(site, context)).astype(np.int64)
    counts["copies"] = site.data.copies()
    return _answer(message, site, {name: Array(value) for name, value in counts.items()})


@app.query("class_sums")
def class_sums(message: Message, context: Context) -> Message:
    """Class-wise sums of the backbone's features over the training split; without a model, of the evaluated one."""
    if ARRAYS in message.content.array_records:
        order, site, model, _ = _read(message, context)
    else:
        order, site = _asked(message, context)
        model = site.final_model()
    if order.dp == "lesion":
        known = array_of(message, "centre")
        sums = privacy.private_sums(site, order, model, known, _budget(site, context))
        return _answer_sums(message, context, order, site, _arrays(sums))
    _exact(order)
    return _answer_sums(message, context, order, site, _arrays(site.class_sums(order, model)))


@app.query("scale_losses")
def scale_losses(message: Message, context: Context) -> Message:
    """Sums of the log loss on the calibration split at several scales of the head."""
    order, site, model, _ = _read(message, context)
    _exact(order)
    return _answer_sums(message, context, order, site, {"losses": site.scale_losses(order, model)})


@app.query("centre")
def centre(message: Message, context: Context) -> Message:
    """Sum of all lesions' features under noise, by which those of `class_sums` are centred."""
    order, site, model, _ = _read(message, context)
    if order.dp != "lesion":
        raise Refused("a centre is for dp=lesion")
    arrays = {"sum": privacy.centre_sum(site, order, model, _budget(site, context))}
    if secure.is_secure(message):
        return _masked_answer(message, context, order, site, arrays, {})
    return _answer(message, site, {name: Array(array) for name, array in arrays.items()})


@app.query("scaling_sums")
def scaling_sums(message: Message, context: Context) -> Message:
    """Sums of the final model's log loss on the calibration split, at a temperature and bias."""
    order, site = _asked(message, context)
    _exact(order)
    return _answer_sums(message, context, order, site, _arrays(site.scaling_sums(array_of(message, "parameters"))))


@app.query("calibration_counts")
def calibration_counts(message: Message, context: Context) -> Message:
    """Histograms of the final model on the calibration split."""
    order, site = _asked(message, context)
    _exact(order)
    sent = (array_of(message, name) for name in ("parameters", "priors", "mean", "whitener"))
    return _answer_sums(message, context, order, site, _arrays(site.calibration_counts(order, *sent)))


@app.query("evaluate")
def evaluate(message: Message, context: Context) -> Message:
    """Counts of a model on the site's test split, with their lesion resamples."""
    order, site, model, _ = _read(message, context)
    found = site.evaluate(order, model)
    return _answer(message, site, {name: Array(value) for name, value in found.items()})


@app.query("reliability")
def reliability(message: Message, context: Context) -> Message:
    """How well the calibrated final model is calibrated on the site's test split: counts by bin, its own interval."""
    order, site = _asked(message, context)
    _exact(order)
    found = site.reliability(order, array_of(message, "parameters"))
    return _answer(message, site, {name: Array(array) for name, array in _arrays(found).items()})


@app.query("secure_keys")
def secure_keys(message: Message, context: Context) -> Message:
    """Public keys for a sum that nobody can take apart."""
    _asked(message, context)
    return _leg(message, secure.offer_keys(message, context))


@app.query("secure_shares")
def secure_shares(message: Message, context: Context) -> Message:
    """Shares of this site's secrets, each sealed for one other site."""
    _asked(message, context)
    return _leg(message, secure.share_secrets(message, context))


@app.query("secure_reveal")
def secure_reveal(message: Message, context: Context) -> Message:
    """Shares that take the masks off the sum."""
    _asked(message, context)
    return _leg(message, secure.reveal(message, context))


def _leg(message: Message, record: ConfigRecord) -> Message:
    return Message(RecordDict({secure.SECURE: record}), reply_to=message)


def _read(message: Message, context: Context) -> tuple[Order, Site, Model, Layouts]:
    order, site = _asked(message, context)
    try:
        return order, site, read_model(message.content, order), Layouts.of(order)
    except WireError as error:
        raise Refused(str(error)) from error


def _asked(message: Message, context: Context) -> tuple[Order, Site]:
    """What is asked, and the site that the policy lets answer; a refusal goes to the coordinator as it reads."""
    start_logging()
    try:
        order = read_order(message.content)
    except WireError as error:
        raise Refused(str(error)) from error
    if FOLDER not in context.node_config:  # a simulated site, known by its number
        plan = Plan.from_run_config(dict(context.run_config))
        name = simulated_sites(plan.shards, plan.partition)[int(context.node_config["partition-id"])]
        memory = Memory(Path(plan.out) / "sites" / name, order.run)
        return order, _of_this_run(order, Site(SiteData(name, plan.shards, plan.partition), memory))
    folder = Path(str(context.node_config[FOLDER]))
    config = load_site(folder)
    site = Site(SiteData(config.name, str(config.shards)), Memory(folder / "state", order.run))
    reason = refusal(
        load_policy(folder), strategy=order.strategy, scope=order.scope, round=order.round, rounds=order.rounds,
        epsilon=_promised(order),
        secure=secure.is_secure(message) or message.metadata.message_type not in secure.SUMMED,
        class_counts=dict(zip(CODES, site.data.counts()["train"], strict=True)), now=datetime.now(),
    )  # fmt: skip
    if reason:
        raise Refused(reason)
    return order, _of_this_run(order, site)


def _of_this_run(order: Order, site: Site) -> Site:
    """The site, if the run is the one that it remembers: noise that was paid for stands for one epsilon only."""
    if not site.memory.begin(hashlib.sha256(f"{order.digest} {site.data.data_hash}".encode()).hexdigest()):
        raise Refused(
            f"the run {order.run} began here with other choices or other images", expected="the same until its end",
            todo="start it anew in an empty --out, under no name or another",
        )  # fmt: skip
    return site


def _exact(order: Order) -> None:
    """Refuse exact sums where the run promises noise."""
    if order.dp in ("lesion", "site"):
        raise Refused(f"exact sums do not go with dp={order.dp}")


def _budget(site: Site, context: Context) -> privacy.Budget:
    ledger = Ledger(site.memory.site_folder)
    if FOLDER not in context.node_config:
        return privacy.Budget(ledger, Plan.from_run_config(dict(context.run_config)).delta, None)
    policy = load_policy(Path(str(context.node_config[FOLDER])))
    return privacy.Budget(ledger, policy.delta, policy.max_epsilon)


def _promised(order: Order) -> float | None:
    """Epsilon of the noise that the site adds in the whole run; None if it adds none."""
    if order.dp == "lesion":
        return order.epsilon
    if order.dp == "site" and order.rounds:
        every = Release(run="", what="", unit="site", noise=order.noise, steps=order.rounds)
        return epsilon([every], order.delta)
    return None


def _arrays(sums: Any) -> dict[str, np.ndarray]:
    return {item.name: np.asarray(getattr(sums, item.name), np.float64) for item in fields(sums)}


def _answer_sums(
    message: Message, context: Context, order: Order, site: Site, arrays: dict[str, np.ndarray]
) -> Message:
    """Sums as they are, or under masks where the coordinator is to see only those of all sites."""
    if secure.is_secure(message):
        return _masked_answer(message, context, order, site, arrays, {})
    return _answer(message, site, {name: Array(array) for name, array in arrays.items()})


def _masked_answer(
    message: Message, context: Context, order: Order, site: Site, arrays: dict[str, np.ndarray],
    figures: dict[str, float],
) -> Message:  # fmt: skip
    content = RecordDict({ARRAYS: secure.masked(message, context, arrays, order.secure_range)})
    content[METRICS], content[CONFIG] = MetricRecord(dict(figures)), ConfigRecord({"site": site.data.name})
    return Message(content, reply_to=message)


def _answer(message: Message, site: Site, arrays: dict[str, Array]) -> Message:
    content = RecordDict(
        {ARRAYS: ArrayRecord(arrays), CONFIG: ConfigRecord({"site": site.data.name, "data": site.data.data_hash})}
    )
    return Message(content, reply_to=message)
