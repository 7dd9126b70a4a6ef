"""SCAFFOLD as a strategy on Flower's Message API (Karimireddy et al., ICML 2020, arXiv 1910.06378)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

CONTROL = "control"


class Scaffold(FedAvg):
    """FedAvg that sends a control variate along, by which each site corrects its gradients for its own drift.

    With x the model, c the variate, y_i and c_i those of site i after its steps, S the sites that answered of N:

        x <- x + rate * sum_S p_i (y_i - x)
        c <- c + |S| / N * sum_S p_i (c_i_new - c_i)

    The paper weights sites equally (p_i = 1 / |S|); here p_i is the share of the images, as in FedAvg, so that the
    fixed point is that of all images pooled. A site receives arrays ``weights`` and ``control``; it answers its new
    ``weights``, and in ``control`` the change of its own variate, which it keeps.

    Args:
        sites: N, all sites that may be drawn.
        rate: Step of the server; the paper's eta_g.
    """

    def __init__(self, *, sites: int, rate: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.sites, self.rate = sites, rate
        self.control: np.ndarray | None = None
        self._model: np.ndarray | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send model and control variate."""
        self._model = arrays["weights"].numpy()
        if self.control is None:
            self.control = np.zeros_like(self._model)
        both = ArrayRecord({"weights": arrays["weights"], CONTROL: Array(self.control)})
        return super().configure_train(server_round, both, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Move model and control variate."""
        replies = list(replies)
        answered = sum(not reply.has_error() for reply in replies)
        found, metrics = super().aggregate_train(server_round, replies)
        if found is None or self.control is None or self._model is None:
            return found, metrics
        moved = self._model + self.rate * (found["weights"].numpy() - self._model)
        self.control = (self.control + answered / self.sites * found[CONTROL].numpy()).astype(np.float32)
        return ArrayRecord({"weights": Array(moved.astype(np.float32))}), metrics
