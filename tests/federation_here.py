"""A grid that runs the site's app in this process: the real apps and messages, without Flower's servers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from safetensors.numpy import load_file

from clients.client_app import app
from clients.coordinator import Coordinator
from clients.plan import Plan
from dermaflow.learning.recipe import Recipe

SITES = ["rosendahl", "vidir_modern", "vidir_molemax", "vienna_dias"]
Spoil = Callable[[str, Message, Message], Message]
"""Changes the answer of a site: its number, what it was asked, what it would answer."""


class GridHere(Grid):
    """Sites 0 to `sites` - 1 have node ids from 100."""

    def __init__(self, plan: Plan, sites: int, spoil: Spoil | None = None) -> None:
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
        self.sent: list[tuple[str, int, int]] = []  # type, node, bytes
        self._replies: dict[str, Message] = {}
        self._spoil = spoil
        self._contexts = {
            100 + number: Context(
                run_id=1, node_id=100 + number, state=RecordDict(), run_config=plan.run_config(),
                node_config={"partition-id": number, "num-partitions": sites},
            )
            for number in range(sites)
        }  # fmt: skip

    def set_run(self, run: Run) -> None: ...

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def get_nodes(self) -> Iterable[Any]:
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for number, message in enumerate(messages):
            node = message.metadata.dst_node_id
            name = f"m{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = name
            message.metadata.__dict__["_src_node_id"] = 1
            size = sum(len(a.data) for r in message.content.array_records.values() for a in r.values())
            self.sent.append((message.metadata.message_type, node, size))
            try:
                reply = app(message, self._contexts[node])
                if self._spoil:
                    reply = self._spoil(str(node), message, reply)
            except Exception as error:
                reply = Message(Error(code=1, reason=str(error)), reply_to=message)
            if reply is not None:
                self._replies[name] = reply
            ids.append(name)
            assert number < 100
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(number) for number in list(message_ids) if number in self._replies]


def a_recipe(**optim: Any) -> Recipe:
    """Small and quick, with normalisation layers."""
    content = {
        "name": "toy", "input": {"height": 32, "width": 32}, "backbone": {"name": "mobilenet_v2", "dropout": 0.0},
        "optim": {"batch_size": 8, "lr": 0.001, "layer_decay": 1.0} | optim,
    }  # fmt: skip
    return Recipe.model_validate(content)


def a_plan(shards: Path | str, out: Path, **choices: Any) -> Plan:
    """Two rounds over the natural sites."""
    recipe = choices.pop("recipe", None) or a_recipe()
    settings = {"rounds": 2, "resamples": 20, "grace": 0.0} | choices
    return Plan(recipe=recipe.model_dump_json(), shards=str(shards), out=str(out), **settings)


def run_here(plan: Plan, sites: int = 4, spoil: Spoil | None = None) -> tuple[dict[str, Any], GridHere]:
    """Run a plan; the result as it lies on disk, and the grid with what was sent."""
    grid = GridHere(plan, sites, spoil)
    Coordinator(plan, grid, plan.name or "run").run()
    return json.loads((Path(plan.out) / "result.json").read_text()), grid


def weights(out: Path) -> dict[str, np.ndarray]:
    """Of the network that a run ended with."""
    found: dict[str, np.ndarray] = load_file(out / "weights.safetensors")
    return found
