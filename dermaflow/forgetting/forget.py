"""The whole of it: look, say what would go, do it, and leave an entry that says so and names nobody.

Before anything is changed, the order is written down with the ids that each place is to lose; after a kill the same
command finds it and goes on, although half of the places no longer say who belongs to whom. The order is deleted at the
end, so the ids are then nowhere. What stays is a line in a chained log, with pseudonyms: HMAC-SHA-256 of an id under a
key of this log. Who has the key and an id can show that it was forgotten; delete the key, and nobody can.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from dermaflow import storage
from dermaflow.audit import AuditLog, entries
from dermaflow.errors import DataError
from dermaflow.forgetting.batches import Batch, find_batches
from dermaflow.forgetting.lineage import models_trained_on
from dermaflow.forgetting.pathways import Pathways
from dermaflow.forgetting.places import Ids, Place, meaning
from dermaflow.forgetting.reports import Report
from dermaflow.forgetting.scored import ScoredRun
from dermaflow.forgetting.shards import Shards

LOG_NAME, KEY_NAME = "audit.jsonl", "pseudonyms.key"
_EVENT = "forgotten"


class Places(BaseModel):
    """Where to look: addresses and folders by what they are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shards: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()
    reports: tuple[str, ...] = ()
    pathways: tuple[str, ...] = ()
    states: tuple[str, ...] = ()


class Order(BaseModel):
    """What is to go from where; the only file with ids in the clear, readable by its owner, gone when it is done."""

    model_config = ConfigDict(extra="forbid")

    format: str = "dermaflow-forgetting/1"
    id: str
    asked: Ids
    places: Places
    ids: dict[str, Ids]
    counts: dict[str, dict[str, int]]
    models: dict[str, str]
    by: str


@dataclass(frozen=True)
class Found:
    """What a look has given.

    Attributes:
        order: What would go.
        unfinished: Batches of a service that have not ended, and were not looked at.
        resumed: Whether the order was begun by an earlier run.
    """

    order: Order
    unfinished: list[str]
    resumed: bool

    @property
    def empty(self) -> bool:
        return not any(self.order.counts.values())


class Records:
    """The folder with log, key and orders.

    Args:
        folder: Local; made when the first order is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def pseudonym(self, name: str) -> str:
        """What stands for an id. Without a key yet, of a key that is thrown away."""
        path = self.folder / KEY_NAME
        key = bytes.fromhex(path.read_text()) if path.exists() else secrets.token_bytes(32)
        return "forgotten-" + hmac.digest(key, name.encode(), hashlib.sha256).hex()[:24]

    def begin(self, order: Order) -> None:
        """Make the key if there is none, and write the order down."""
        if not (self.folder / KEY_NAME).exists():
            _write_private(self.folder / KEY_NAME, secrets.token_bytes(32).hex().encode())
        _write_private(self._place(order), order.model_dump_json(indent=1).encode())

    def pending(self, asked: Ids, places: Places) -> Order | None:
        """An order for the same that was not done to its end."""
        for path in sorted(self.folder.glob("order-*.json")):
            try:
                order = Order.model_validate_json(path.read_bytes())
            except ValidationError as error:
                raise DataError("no order of this version", where=path, todo="finish it with that version") from error
            if (order.asked, order.places) == (asked, places):
                return order
        return None

    def end(self, order: Order) -> str:
        """Write the entry, once, and delete the order; the hash of the entry."""
        path, known = self.folder / LOG_NAME, None
        if path.exists():
            known = next((str(e["hash"]) for e in entries(path) if e.get("order") == order.id), None)
        asked = {kind: sorted(map(self.pseudonym, getattr(order.asked, kind))) for kind in Ids.model_fields}
        done = known or AuditLog(path).append(
            _EVENT, order=order.id, by=order.by, asked={kind: names for kind, names in asked.items() if names},
            removed=order.counts, models=order.models,
        )  # fmt: skip
        self._place(order).unlink(missing_ok=True)
        return done

    def _place(self, order: Order) -> Path:
        return self.folder / f"order-{order.id}.json"


def _write_private(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    storage.write_bytes(path, content)
    path.chmod(0o600)


def look(asked: Ids, places: Places, records: Records, *, registry: str, by: str) -> Found:
    """Find what would go; nothing is changed.

    Args:
        asked: Ids of people, lesions, images.
        places: Where to look.
        records: Log and key.
        registry: Whose models are looked at.
        by: Who has it done.

    Raises:
        DataError: No id, no place, or a place is not what it should be.
        ShardError: Shards are damaged.
        SignOffError: A folder of pathways was changed, or its log tampered with.
    """
    if not asked:
        raise DataError("nobody to forget", expected="--patient, --lesion or --image")
    if not any(getattr(places, kind) for kind in Places.model_fields):
        raise DataError("nowhere to look", expected="--shards, --run, --report, --pathways or --state")
    by = " ".join(by.split())
    if not by:
        raise DataError("nobody named who has it done", where="--by", expected="a name, for the log")
    unfinished = [str(path) for state in places.states for path in find_batches(Path(state))[1]]
    if (order := records.pending(asked, places)) is not None:
        return Found(order, unfinished, resumed=True)
    opened = _open(places, records.pseudonym, by)
    ids = meaning(asked, (place.links() for place in opened))
    hashes = {place.data_hash for place in opened if isinstance(place, Shards)}
    everything = asked
    for own in ids:
        everything |= own
    order = Order(
        id=secrets.token_hex(8), asked=asked, places=places, by=by,
        ids={place.name: own for place, own in zip(opened, ids, strict=True)},
        counts={place.name: place.holds(own) for place, own in zip(opened, ids, strict=True)},
        models=models_trained_on(registry, everything, hashes),
    )  # fmt: skip
    return Found(order, unfinished, resumed=False)


def forget(found: Found, records: Records, progress: Callable[[str], None] = lambda place: None) -> str:
    """Do what a look has found; the same again after a kill does the rest.

    Returns:
        Hash of the entry in the log.

    Raises:
        StorageError: A file could not be written; what is done is done, and the same command goes on.
    """
    order = found.order
    records.begin(order)
    for place in _open(order.places, records.pseudonym, order.by):
        if own := order.ids.get(place.name):
            place.remove(own)
        progress(place.name)
    return records.end(order)


def _open(places: Places, pseudonym: Callable[[str], str], by: str) -> Sequence[Place]:
    found: list[Place] = [Shards(uri) for uri in places.shards]
    found += [ScoredRun(uri, pseudonym, by) for uri in places.runs]
    found += [Report(uri) for uri in places.reports]
    found += [Pathways(folder, pseudonym, by) for folder in places.pathways]
    for state in places.states:
        found += [Batch(folder, pseudonym, by) for folder in find_batches(Path(state))[0]]
    return found
