"""The coordinator's side of secure sums: it hands keys and sealed shares on, and learns the sum and who is in it."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from clients.grid import SiteGrid
from clients.masking import Keys, more_than_half, unmask
from clients.messages import ARRAYS, CONFIG, read_figures
from clients.secure import KEYS, REVEAL, SECURE, SHARES, SUMMED, totals_of
from clients.wire import WireError
from dermaflow.errors import FederationError

log = logging.getLogger(__name__)


class SecureGrid(SiteGrid):
    """A grid whose answers to some questions are one: the sum over all sites that answered.

    The one answer looks like that of a site, with sums as float64 in its arrays. `answered` says who is in it, and
    `figures` what each said in the clear.
    """

    def __init__(self, *args: object, threshold: int, limit: float, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.threshold, self.limit = threshold, limit
        self.figures: dict[str, dict[str, float]] = {}

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """As any grid, but questions of `SUMMED` are answered by one message.

        Raises:
            FederationError: Fewer sites than the threshold stayed until the end.
        """
        messages = list(messages)
        if not messages or messages[0].metadata.message_type not in SUMMED:
            return super().send_and_receive(messages, timeout=timeout)
        asked = {message.metadata.dst_node_id: message for message in messages}
        threshold = self.threshold or more_than_half(len(asked))
        name = secrets.token_hex(8)
        reasons: dict[str, str] = {}

        def leg(kind: str, contents: dict[int, dict[str, object]]) -> dict[int, ConfigRecord]:
            legs = [self._leg(asked[node], kind, name, content) for node, content in contents.items()]
            answers, failed = self.exchange(legs, timeout)
            if kind != REVEAL:  # who fails there is in the sum all the same
                reasons.update(failed)
            return {answer.metadata.src_node_id: answer.content.config_records[SECURE] for answer in answers}

        def enough(count: int, doing: str) -> None:
            if count < max(threshold, 2):
                self._failed(reasons)
                raise FederationError(
                    f"{count} of {len(asked)} sites {doing}; {reasons or 'no site said why'}",
                    expected=f"at least {max(threshold, 2)}, the threshold of secure aggregation",
                    todo="look at the sites named, then submit the run again",
                )  # fmt: skip

        offered = {node: tuple(record["keys"]) for node, record in leg(KEYS, {node: {} for node in asked}).items()}
        enough(len(offered), "offered keys")
        keys: dict[int, Keys] = {node: (bytes(a), bytes(b)) for node, (a, b) in sorted(offered.items())}
        flat = [key for pair in keys.values() for key in pair]
        shared = leg(SHARES, {node: {"nodes": list(keys), "keys": flat, "threshold": threshold} for node in keys})
        enough(len(shared), "shared their secrets")
        for node, message in asked.items():
            if node in shared:
                self._attach(message, name, shared)
        answers, failed = self.exchange([asked[node] for node in shared], timeout)
        reasons.update(failed)
        totals, active = self._add(answers, reasons)
        enough(len(active), "answered")
        lost = set(shared) - set(active)
        roll: dict[str, object] = {"active": sorted(active), "lost": sorted(lost)}
        revealed = leg(REVEAL, dict.fromkeys(active, roll))
        enough(len(revealed), "helped to take off the masks")
        shares: dict[int, list[bytes]] = {node: [] for node in shared}
        for record in revealed.values():
            for node, share in zip(record["nodes"], record["shares"], strict=True):  # type: ignore[arg-type]
                shares[int(node)].append(bytes(share))
        shares = {node: found[:threshold] for node, found in shares.items()}
        sums = totals_of(unmask(totals, set(active), lost, keys, shares), len(shared), self.limit)
        if reasons:
            self._failed(reasons)
        self.answered = [self.names[node] for node in active]
        one = next(iter(active.values()))
        one.content[ARRAYS] = ArrayRecord({key: Array(np.asarray(value)) for key, value in sums.items()})
        return [one]

    def _leg(self, question: Message, kind: str, name: str, content: dict[str, object]) -> Message:
        order = {"order": question.content.config_records[CONFIG]["order"]}
        record = RecordDict({CONFIG: ConfigRecord(order), SECURE: ConfigRecord({"sum": name} | content)})
        return Message(
            record, dst_node_id=question.metadata.dst_node_id, message_type=kind, group_id=question.metadata.group_id
        )

    @staticmethod
    def _attach(message: Message, name: str, shared: dict[int, ConfigRecord]) -> None:
        node = message.metadata.dst_node_id
        sealed = {}
        for source, record in shared.items():
            for target, text in zip(record["nodes"], record["sealed"], strict=True):  # type: ignore[arg-type]
                if target == node:
                    sealed[source] = text
        message.content[SECURE] = ConfigRecord({"sum": name, "nodes": list(sealed), "sealed": list(sealed.values())})

    def _add(self, answers: list[Message], reasons: dict[str, str]) -> tuple[dict[str, np.ndarray], dict[int, Message]]:
        """Sums of the masked arrays; an answer of another form is as good as none."""
        totals: dict[str, np.ndarray] = {}
        active: dict[int, Message] = {}
        self.figures = {}
        for answer in answers:
            site = self.names[answer.metadata.src_node_id]
            try:
                arrays, figures = _read(answer)
                if totals and {n: (a.shape, a.dtype) for n, a in totals.items()} != {
                    n: (a.shape, a.dtype) for n, a in arrays.items()
                }:
                    raise WireError("its arrays differ from the others'")
            except (WireError, KeyError, TypeError, ValueError) as error:
                reasons[site] = f"refused: {error}"
                continue
            totals = {n: totals[n] + a for n, a in arrays.items()} if totals else arrays
            active[answer.metadata.src_node_id] = answer
            sent = sum(len(array.data) for array in answer.content.array_records[ARRAYS].values())
            self.figures[site] = {**figures, "sent": float(sent)}
        return totals, active


def _read(answer: Message) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    arrays = {name: array.numpy() for name, array in answer.content.array_records[ARRAYS].items()}
    if not all(array.dtype in (np.uint32, np.uint64) for array in arrays.values()):
        raise WireError("the answer is not masked", expected="integers of 32 or 64 bits")
    figures = {}
    for record in answer.content.metric_records.values():
        figures |= read_figures(record)
    return arrays, figures
