"""A hospital site: answers what it is asked, from images that never leave it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.memory import Memory
from clients.messages import ARRAYS, CONFIG, read_model, read_order, update_record
from clients.plan import Order, Plan
from clients.site import Layouts, Model, Site
from clients.site_config import load_site
from clients.site_data import SiteData, simulated_sites
from dermaflow.settings import start_logging

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """A round: new weights less the old, from the site's training split."""
    order, site, model, layouts = _read(message, context)
    update = site.train(order, model)
    return Message(update_record(update, order, layouts, site.data.name), reply_to=message)


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """The site's name, and how many images of each class each split has."""
    order = read_order(message.content)
    site = _site(order, context)
    counts = {name: Array(np.array(value, np.int64)) for name, value in site.data.counts().items()}
    return _answer(message, site, counts)


@app.query("class_sums")
def class_sums(message: Message, context: Context) -> Message:
    """Class-wise sums of the frozen backbone's features over the training split."""
    order, site, model, _ = _read(message, context)
    sums = site.class_sums(order, model)
    return _answer(message, site, {name: Array(getattr(sums, name)) for name in ("counts", "sums", "products")})


@app.query("evaluate")
def evaluate(message: Message, context: Context) -> Message:
    """Counts of a model on the site's test split, with their lesion resamples."""
    order, site, model, _ = _read(message, context)
    found = site.evaluate(order, model)
    return _answer(message, site, {name: Array(value) for name, value in found.items()})


def _read(message: Message, context: Context) -> tuple[Order, Site, Model, Layouts]:
    start_logging()
    order = read_order(message.content)
    return order, _site(order, context), read_model(message.content, order), Layouts.of(order)


def _answer(message: Message, site: Site, arrays: dict[str, Array]) -> Message:
    content = RecordDict({ARRAYS: ArrayRecord(arrays), CONFIG: ConfigRecord({"site": site.data.name})})
    return Message(content, reply_to=message)


def _site(order: Order, context: Context) -> Site:
    """A real site is named by its SuperNode's configuration, a simulated one by its number."""
    if "site-folder" in context.node_config:
        folder = Path(str(context.node_config["site-folder"]))
        config = load_site(folder)
        return Site(SiteData(config.name, str(config.shards)), Memory(folder / "state", order.run))
    plan = Plan.from_run_config(dict(context.run_config))
    names = simulated_sites(plan.shards, plan.partition)
    name = names[int(context.node_config["partition-id"])]
    return Site(SiteData(name, plan.shards, plan.partition), Memory(Path(plan.out) / "sites" / name, order.run))
