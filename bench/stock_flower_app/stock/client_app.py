"""A site after Flower's quickstart: load the state dict, train an epoch, send the state dict back."""

import json
import time

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients.site_data import SiteData
from dermaflow.learning.backbones import build
from dermaflow.learning.local import class_counts, memory_feed
from dermaflow.learning.loop import Run, fit
from dermaflow.learning.optimisation import pick_device
from dermaflow.learning.recipe import Recipe
from dermaflow.preparation.balancing import balance
from dermaflow.settings import settings

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    torch.set_num_threads(settings().threads)
    recipe = Recipe.model_validate(json.loads(str(context.run_config["recipe"])))
    data = SiteData("site", str(context.node_config["shards"]))
    network = build(recipe.backbone.model_copy(update={"weights": None}))
    network.load_state_dict(message.content["arrays"].to_torch_state_dict())
    labels = data.labels("train")
    pixels = data.pixels("train", recipe.input.height, recipe.input.width)
    rule = balance(class_counts(labels), recipe.balance)
    run = Run(
        recipe, memory_feed(pixels, labels, rule, recipe), rule, class_counts(labels) / len(labels), data.data_hash,
        pick_device(),
    )  # fmt: skip
    began = time.perf_counter()
    network, _ = fit(network, run)
    metrics = {"num-examples": len(labels), "seconds": time.perf_counter() - began}
    content = {"arrays": ArrayRecord(network.state_dict()), "metrics": MetricRecord(metrics)}
    return Message(RecordDict(content), reply_to=message)
