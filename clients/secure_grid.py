"""The coordinator's side of secure sums: it hands keys and sealed shares on, and learns the sum and who is in it."""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from clients.grid import SiteGrid
from clients.masking import Keys, is_mask_key, is_public_key, more_than_half, recover, seed_digest, unmask
from clients.messages import ARRAYS, CONFIG, content_bytes, read_figures
from clients.secure import KEYS, REVEAL, SECURE, SHARES, SUMMED, totals_of
from clients.wire import WireError
from dermaflow.errors import FederationError

log = logging.getLogger(__name__)
T = TypeVar("T")


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

        def leg(
            kind: str, contents: dict[int, dict[str, object]], read: Callable[[int, ConfigRecord], T]
        ) -> dict[int, T]:
            legs = [self._leg(asked[node], kind, name, content) for node, content in contents.items()]
            answers, failed = self.exchange(legs, timeout)
            found = {}
            for answer in answers:
                node = answer.metadata.src_node_id
                try:
                    found[node] = read(node, answer.content.config_records[SECURE])
                except (WireError, KeyError) as error:
                    failed[self.names[node]] = f"refused: {error}"
            if kind != REVEAL:  # who fails there is in the sum all the same
                reasons.update(failed)
            return found

        def enough(count: int, doing: str) -> None:
            if count < max(threshold, 2):
                self._failed(reasons)
                raise FederationError(
                    f"{count} of {len(asked)} sites {doing}; {reasons or 'no site said why'}",
                    expected=f"at least {max(threshold, 2)}, the threshold of secure aggregation",
                    todo="look at the sites named, then submit the run again",
                )  # fmt: skip

        offered = leg(KEYS, {node: {} for node in asked}, lambda _, record: read_keys(record))
        for node in _not_alone(offered):
            reasons[self.names[node]] = "refused: another site offered the same key"
            del offered[node]
        enough(len(offered), "offered keys")
        keys = dict(sorted(offered.items()))
        flat = [key for pair in keys.values() for key in pair]
        terms: dict[str, object] = {"nodes": list(keys), "keys": flat, "threshold": threshold}
        shared = leg(SHARES, dict.fromkeys(keys, terms), lambda node, record: read_shares(record, set(keys) - {node}))
        enough(len(shared), "shared their secrets")
        for node, message in asked.items():
            if node in shared:
                self._attach(message, name, shared)
        answers, failed = self.exchange([asked[node] for node in shared], timeout)
        reasons.update(failed)
        totals, active = self._add(answers, reasons, counted=messages[0].metadata.message_type == "train")
        enough(len(active), "answered")
        lost = set(shared) - set(active)
        roll: dict[str, object] = {"active": sorted(active), "lost": sorted(lost)}
        revealed = leg(REVEAL, dict.fromkeys(active, roll), lambda _, record: read_revealed(record, set(shared)))
        enough(len(revealed), "helped to take off the masks")
        secrets_of = self._secrets(revealed, threshold, keys, {node: shared[node].seed for node in active}, reasons)
        sums = totals_of(unmask(totals, set(active), lost, keys, secrets_of), len(shared), self.limit)
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
    def _attach(message: Message, name: str, shared: dict[int, Shared]) -> None:
        node = message.metadata.dst_node_id
        sealed = {source: found.sealed[node] for source, found in shared.items() if node in found.sealed}
        message.content[SECURE] = ConfigRecord({"sum": name, "nodes": list(sealed), "sealed": list(sealed.values())})

    def _secrets(
        self, revealed: dict[int, dict[int, bytes]], threshold: int, keys: dict[int, Keys], seeds: dict[int, bytes],
        reasons: dict[str, str],
    ) -> dict[int, bytes]:  # fmt: skip
        """Seed of each site that answered, mask key of each that was lost.

        Raises:
            FederationError: So many shares are forged that one cannot be found.
        """
        found = {}
        for node in sorted({node for shares in revealed.values() for node in shares}):

            def fits(secret: bytes, node: int = node) -> bool:
                return seed_digest(secret) == seeds[node] if node in seeds else is_mask_key(secret, keys[node][0])

            secret, liars = recover({helper: shares[node] for helper, shares in revealed.items()}, threshold, fits)
            if secret is None:
                raise FederationError(
                    f"of the shares of the secret of {self.names[node]} from {len(revealed)} sites too many are forged",
                    expected=f"{threshold} as they were handed out", todo="leave sites out until the sum works",
                )  # fmt: skip
            found[node] = secret
            reasons |= {self.names[liar]: "its shares are forged; its answer is in the sum" for liar in liars}
        return found

    def _add(
        self, answers: list[Message], reasons: dict[str, str], *, counted: bool
    ) -> tuple[dict[str, np.ndarray], dict[int, Message]]:
        """Sums of the masked arrays; an answer of another form than most is as good as none.

        Args:
            answers: Under masks.
            reasons: Takes who is left out, and why.
            counted: Whether answers count by images, which must be those that the site described.
        """
        read: dict[int, tuple[Message, dict[str, np.ndarray], dict[str, float]]] = {}
        for answer in answers:
            site = self.names[answer.metadata.src_node_id]
            try:
                arrays, figures = _read(answer)
                if counted:
                    self.check_images(site, figures)
                read[answer.metadata.src_node_id] = answer, arrays, figures
            except (WireError, KeyError, TypeError, ValueError) as error:
                reasons[site] = f"refused: {error}"
        forms = {
            node: tuple((n, a.shape, a.dtype) for n, a in sorted(arrays.items()))
            for node, (_, arrays, _) in read.items()
        }
        [(usual, _)] = Counter(forms.values()).most_common(1) or [((), 0)]
        totals: dict[str, np.ndarray] = {}
        active: dict[int, Message] = {}
        self.figures = {}
        for node, (answer, arrays, figures) in read.items():
            if forms[node] != usual:
                reasons[self.names[node]] = "refused: its arrays differ from the others'"
                continue
            totals = {n: totals[n] + a for n, a in arrays.items()} if totals else arrays
            active[node] = answer
            self.figures[self.names[node]] = figures | {"sent": float(content_bytes(answer.content))}
        return totals, active


def read_keys(record: ConfigRecord) -> Keys:
    """A site's answer to the first leg: its public keys."""
    found = record.get("keys")
    if not (isinstance(found, list) and len(found) == 2 and all(isinstance(key, bytes) for key in found)):
        raise WireError("its keys are not two")
    masks, channel = (bytes(key) for key in found)  # type: ignore[arg-type]
    if not (is_public_key(masks) and is_public_key(channel)):
        raise WireError("what it calls keys are none")
    return masks, channel


@dataclass(frozen=True)
class Shared:
    """A site's answer to the second leg.

    Attributes:
        sealed: A share for each other site.
        seed: SHA-256 of the seed of its own mask.
    """

    sealed: dict[int, bytes]
    seed: bytes


def read_shares(record: ConfigRecord, others: set[int]) -> Shared:
    """A site's answer to the second leg: one sealed share for each of the others."""
    seed = record.get("seed")
    if not isinstance(seed, bytes) or len(seed) != 32:
        raise WireError("it does not say the digest of its seed")
    return Shared(_by_node(record, "sealed", others), seed)


def read_revealed(record: ConfigRecord, sites: set[int]) -> dict[int, bytes]:
    """A site's answer to the last leg: a share of a secret of each site."""
    return _by_node(record, "shares", sites)


def _by_node(record: ConfigRecord, name: str, expected: set[int]) -> dict[int, bytes]:
    nodes, texts = record.get("nodes"), record.get(name)
    if not (isinstance(nodes, list) and isinstance(texts, list) and len(nodes) == len(texts)):
        raise WireError(f"it holds no {name}")
    found = {int(node): bytes(text) for node, text in zip(nodes, texts, strict=True) if isinstance(text, bytes)}
    if set(found) != expected or len(nodes) != len(expected):
        raise WireError(f"its {name} are not one for each site")
    return found


def _not_alone(offered: dict[int, Keys]) -> list[int]:
    """Sites with a key that another has as well, or the same twice: nobody would share a secret with them."""
    count = Counter(key for pair in offered.values() for key in pair)
    return [node for node, pair in offered.items() if any(count[key] > 1 for key in pair)]


def _read(answer: Message) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    arrays = {name: array.numpy() for name, array in answer.content.array_records[ARRAYS].items()}
    if not all(array.dtype in (np.uint32, np.uint64) for array in arrays.values()):
        raise WireError("the answer is not masked", expected="integers of 32 or 64 bits")
    figures = {}
    for record in answer.content.metric_records.values():
        figures |= read_figures(record)
    return arrays, figures
