"""The server's optimisers: three rounds of one weight, worked out by hand from the papers' formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_here import GridHere, a_plan, a_recipe
from flwr.app import Array, ArrayRecord, ConfigRecord, Message

from clients.grid import SiteGrid
from clients.messages import Known, update_record
from clients.plan import Order, Plan
from clients.rounds import SiteRounds
from clients.site import Layouts, Model, Update
from clients.wire import Layout

IMAGES = {"north": 1.0, "south": 3.0}
UPDATES = [(4.0, 0.0), (1.0, -1.0), (-0.1, 0.1)]
"""Of north and south; south has three of four images, so their means are 1, -0.5 and 0.05."""
ONE = Layout(("weight",), ((1,),))
NONE = Layout((), ())


class Hub:
    """Two sites of `sites` answer what they are told to, without a network or images."""

    def __init__(self, folder: Path, sites: int = 2, **choices: Any) -> None:
        plan: Plan = a_plan(folder, folder, rounds=9, **choices)
        nothing = np.zeros(0, np.float32)
        self._order = Order(
            run="x", round=1, rounds=9, strategy=plan.strategy, scope="head", recipe=a_recipe(), weigh=plan.weigh
        )
        self._layouts = Layouts(ONE, NONE, NONE)
        self._grid = SiteGrid(GridHere(plan, 2), {100: "north", 101: "south"})
        self.rounds = SiteRounds(
            plan, self._order, self._layouts, Model(np.zeros(1, np.float32), nothing, nothing), 1, sites, Known()
        )
        self._round = 0
        self.sent_control = 0.0

    def after(self, deltas: tuple[float, float], controls: tuple[float, float] | None = None) -> float:
        """The weight after one more round."""
        self._round += 1
        now = ArrayRecord({"weights": Array(self.rounds.model.weights)})
        replies = []
        for message in self.rounds.configure_train(self._round, now, ConfigRecord(), self._grid):
            number = message.metadata.dst_node_id - 100
            name = self._grid.names[message.metadata.dst_node_id]
            arrays = message.content.array_records["arrays"]
            self.sent_control = float(arrays["control"].numpy()[0]) if "control" in arrays else 0.0
            control = None if controls is None else np.array([controls[number]], np.float32)
            delta = np.array([deltas[number]], np.float32)
            update = Update(delta, np.zeros(0, np.float32), control, {"images": IMAGES[name], "loss": 1.0})
            replies.append(Message(update_record(update, self._order, self._layouts, name), reply_to=message))
        self.rounds.aggregate_train(self._round, replies)
        return float(self.rounds.model.weights[0])


@pytest.mark.parametrize(
    ("strategy", "choices", "weight"),
    [
        # x <- x + mean
        ("fedavg", {}, [1.0, 0.5, 0.55]),
        # v <- 0.9 v + mean = 1, 0.4, 0.41; x <- x + v, or half of it (Hsu et al. 2019, arXiv 1909.06335)
        ("fedavgm", {}, [1.0, 1.4, 1.81]),
        ("fedavgm", {"server_rate": 0.5}, [0.5, 0.7, 0.905]),
        # m <- 0.9 m + 0.1 mean = 0.1, 0.04, 0.041; v <- v - 0.01 mean^2 sign(v - mean^2) = 0.01, 0.0125, 0.012475
        # x <- x + 0.1 m / (sqrt(v) + 0.001) (Reddi et al. 2021, arXiv 2003.00295, algorithm 2)
        ("fedyogi", {"server_rate": 0.1}, [0.0990099, 0.1344698, 0.1708523]),
        # The same m; v <- 0.99 v + 0.01 mean^2 = 0.01, 0.0124, 0.012301. The paper's rate is constant; Flower corrects
        # it as Adam does, counting from 2: 0.1 sqrt(1 - 0.99^n) / (1 - 0.9^n) = 0.0742460, 0.0635940, 0.0577215
        ("fedadam", {"server_rate": 0.1}, [0.0735109, 0.0961512, 0.1172984]),
    ],
)
def test_three_rounds_by_hand(tmp_path: Path, strategy: str, choices: dict[str, float], weight: list[float]) -> None:
    hub = Hub(tmp_path, strategy=strategy, **choices)
    assert [hub.after(deltas) for deltas in UPDATES] == pytest.approx(weight, rel=2e-6)


@pytest.mark.parametrize("strategy", ["fedyogi", "fedadam"])
def test_without_a_rate_the_step_is_a_hundredth(tmp_path: Path, strategy: str) -> None:
    hub, tenfold = Hub(tmp_path, strategy=strategy), Hub(tmp_path, strategy=strategy, server_rate=0.1)
    for deltas in UPDATES:
        assert hub.after(deltas) == pytest.approx(tenfold.after(deltas) / 10, rel=1e-5)


def test_scaffold_by_hand(tmp_path: Path) -> None:
    """x <- x + 0.5 mean; of four sites two answer: c <- c + 2/4 mean change (Karimireddy et al. 2020, algorithm 1)."""
    hub = Hub(tmp_path, sites=4, strategy="scaffold", server_rate=0.5)
    controls = [(2.0, 4.0), (-1.0, 1.0), (0.0, -4.0)]  # their means are 3.5, 0.5 and -3
    found, sent = [], []
    for deltas, changes in zip(UPDATES, controls, strict=True):
        found.append(hub.after(deltas, changes))
        sent.append(hub.sent_control)
    assert found == pytest.approx([0.5, 0.25, 0.275], rel=2e-6)
    assert sent == pytest.approx([0.0, 1.75, 2.0])
    assert hub.rounds.inner.control.tolist() == pytest.approx([0.5])  # type: ignore[attr-defined]
