"""A hospital site: answers what it is asked, from images that never leave it."""

from __future__ import annotations

from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.memory import Memory
from clients.messages import ARRAYS, CONFIG, array_of, read_model, read_order, update_record
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
    update = site.train(order, model)
    return Message(update_record(update, order, layouts, site.data.name), reply_to=message)


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """The site's name, and how many images of each class each split has."""
    _, site = _asked(message, context)
    counts = {name: Array(np.array(value, np.int64)) for name, value in site.data.counts().items()}
    return _answer(message, site, counts)


@app.query("class_sums")
def class_sums(message: Message, context: Context) -> Message:
    """Class-wise sums of the frozen backbone's features over the training split."""
    order, site, model, _ = _read(message, context)
    sums = site.class_sums(order, model)
    return _answer(message, site, _arrays(sums))


@app.query("scale_losses")
def scale_losses(message: Message, context: Context) -> Message:
    """Sums of the log loss on the calibration split at several scales of the head."""
    order, site, model, _ = _read(message, context)
    return _answer(message, site, {"losses": Array(site.scale_losses(order, model))})


@app.query("scaling_sums")
def scaling_sums(message: Message, context: Context) -> Message:
    """Sums of the final model's log loss on the calibration split, at a temperature and bias."""
    _, site = _asked(message, context)
    sums = site.scaling_sums(array_of(message, "parameters"))
    return _answer(message, site, _arrays(sums))


@app.query("calibration_counts")
def calibration_counts(message: Message, context: Context) -> Message:
    """Histograms of the final model on the calibration split."""
    order, site = _asked(message, context)
    sent = (array_of(message, name) for name in ("parameters", "priors", "mean", "whitener"))
    return _answer(message, site, _arrays(site.calibration_counts(order, *sent)))


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
    return _answer(message, site, _arrays(site.reliability(order, array_of(message, "parameters"))))


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
        return order, Site(SiteData(name, plan.shards, plan.partition), memory)
    folder = Path(str(context.node_config[FOLDER]))
    config = load_site(folder)
    site = Site(SiteData(config.name, str(config.shards)), Memory(folder / "state", order.run))
    reason = refusal(
        load_policy(folder), strategy=order.strategy, scope=order.scope, round=order.round, rounds=order.rounds,
        epsilon=None, class_counts=dict(zip(CODES, site.data.counts()["train"], strict=True)), now=datetime.now(),
    )  # fmt: skip
    if reason:
        raise Refused(reason)
    return order, site


def _arrays(sums: Any) -> dict[str, Array]:
    return {item.name: Array(np.asarray(getattr(sums, item.name), np.float64)) for item in fields(sums)}


def _answer(message: Message, site: Site, arrays: dict[str, Array]) -> Message:
    content = RecordDict(
        {ARRAYS: ArrayRecord(arrays), CONFIG: ConfigRecord({"site": site.data.name, "data": site.data.data_hash})}
    )
    return Message(content, reply_to=message)
