"""A coordinator after Flower's quickstart; it only notes when each round ended."""

import json
import time
from pathlib import Path

from flwr.app import ArrayRecord, Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from dermaflow.learning.backbones import build
from dermaflow.learning.recipe import Recipe

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    recipe = Recipe.model_validate(json.loads(str(config["recipe"])))
    slowest: list[float] = []

    def look(records: list[RecordDict], weighting: str) -> MetricRecord:
        slowest.append(max(float(record["metrics"]["seconds"]) for record in records))
        return MetricRecord({"seconds": slowest[-1]})

    def note(number: int, arrays: ArrayRecord) -> None:
        with Path(str(config["out"])).open("a") as stream:
            stream.write(json.dumps({"round": number, "at": time.time(), "site": slowest[-1] if number else 0}) + "\n")

    sites = int(config["sites"])
    strategy = FedAvg(
        fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites, train_metrics_aggr_fn=look
    )
    start = ArrayRecord(build(recipe.backbone).state_dict())
    strategy.start(grid, start, num_rounds=int(config["rounds"]), evaluate_fn=note)
