"""The coordinator: runs a plan over the sites that it names."""

from __future__ import annotations

import logging

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from clients.coordinator import Coordinator
from clients.plan import Plan
from dermaflow.settings import start_logging

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the plan of the run's configuration; the result is in its folder `out`."""
    start_logging()
    logging.getLogger("flwr").propagate = False  # it has a handler of its own
    plan = Plan.from_run_config(dict(context.run_config))
    Coordinator(plan, grid, plan.name or str(context.run_id)).run()
