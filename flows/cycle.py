"""A turn of the lifecycle is a folder: what was there, what was measured, what was decided, and why.

    frozen.parquet                 the test on which every champion and challenger is measured
    archive/                       the first archive and every labelled image that arrived (`dermaflow.datasets.growth`)
    cycles/0001/
        images.parquet labels.parquet   new images, and diagnoses nobody has learnt from: what the turn is about
        landed.parquet             all that lay in the landing area
        cycle.json                 champion and shards at its beginning; from here on a stopped turn is continued
        inputs.csv findings/       images scored by the champion in this turn
        measures.json              drift
        model/ report/ champion.parquet    the challenger, its report, the champion's predictions
        decision.json decision.md  written last: the turn is over

A turn that is cut off is continued by the next run with the same images, labels and champion.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from dermaflow import __version__, storage
from dermaflow.bundles.registry import Registry, Version
from dermaflow.datasets.growth import unlearnt
from dermaflow.errors import RegistryError, StorageError
from dermaflow.evaluation.challenge import Verdict
from dermaflow.locks import locked
from dermaflow.preparation.reading import ShardFolder
from dermaflow.schemas.finding import FINDING_SCHEMA
from dermaflow.scoring.landing import lesion_of, read_landing
from dermaflow.scoring.plan import FINDINGS
from dermaflow.trust.drift import Limits, Measures

Action = Literal["nothing", "retraining wanted", "promoted", "refused"]
_KEY = ["image_id", "bytes", "modified"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Cycle(_Record):
    """What stands at the beginning of a turn."""

    number: int
    begun: str  # ISO 8601, UTC
    landing: str
    champion: str
    champion_uri: str
    champion_sha256: str
    data_hash: str  # of the shards
    images: int  # new ones
    labels: int  # images with a diagnosis nobody has learnt from
    left_out: dict[str, int]


class Served(_Record):
    """Whether a running service took the new champion."""

    url: str
    version: str | None
    seconds: float | None
    problem: str | None


class Decision(_Record):
    """The content of ``decision.json``.

    Attributes:
        reasons: Why something was done, or not, a sentence each.
        data_hash: Of the shards that the challenger learnt from.
        frozen_sha256: Of the file that names the frozen test.
        arrived: The verdict on test lesions that arrived since it was frozen; it decides nothing.
        way_back: The command that makes the former champion the champion again.
    """

    format: Literal["dermaflow-decision/1"] = "dermaflow-decision/1"
    cycle: int
    at: str  # ISO 8601, UTC
    by: str
    action: Action
    reasons: list[str]
    champion: str
    champion_sha256: str
    challenger: str | None = None
    challenger_sha256: str | None = None
    data_hash: str | None = None
    landing: str
    left_out: dict[str, int]
    measures: Measures
    limits: Limits
    frozen_images: int
    frozen_sha256: str
    verdict: Verdict | None = None
    arrived: Verdict | None = None
    served: Served | None = None
    way_back: str | None = None
    dermaflow_version: str = __version__


class Turn:
    """One turn and its folder."""

    def __init__(self, out: Path, cycle: Cycle) -> None:
        self.out, self.cycle = out, cycle
        self.folder = _folder(out, cycle.number)

    def place(self, name: str) -> Path:
        """Where a file of the turn lies."""
        return self.folder / name

    def images(self) -> pd.DataFrame:
        """New images: ``image_id``, ``uri``, ``bytes``, ``modified``, ``lesion_id``."""
        return pq.read_table(self.place("images.parquet")).to_pandas()

    def landed(self) -> pd.DataFrame:
        """All images that lay in the landing area: `IMAGE_COLUMNS`."""
        return pq.read_table(self.place("landed.parquet")).to_pandas()

    def labels(self) -> pd.DataFrame:
        """Diagnoses nobody has learnt from: `METADATA_COLUMNS` and ``by``."""
        return pq.read_table(self.place("labels.parquet")).to_pandas()

    def findings(self) -> pd.DataFrame:
        """What this champion found on the new images, in this turn or an earlier one."""
        parts = []
        for turn in _turns(self.out):
            path = turn.place(f"findings/{FINDINGS}")
            if turn.cycle.champion_sha256 == self.cycle.champion_sha256 and path.exists():
                parts.append(pq.read_table(path).to_pandas().merge(turn.images()[_KEY], on="image_id"))
        images = self.images()
        if not parts or images.empty:
            return FINDING_SCHEMA.empty_table().to_pandas()
        columns = pd.concat(parts, ignore_index=True).drop(columns="lesion_id")  # it may be known by now
        return images[[*_KEY, "lesion_id"]].merge(columns, on=_KEY)

    def write_inputs(self) -> int:
        """Write ``inputs.csv``, the images that this champion has not scored; returns how many there are."""
        path = self.place("inputs.csv")
        if not path.exists():
            images = self.images()
            todo = images[~images["image_id"].isin(self.findings()["image_id"])]
            storage.write_bytes(path, todo[["uri", "image_id", "lesion_id"]].to_csv(index=False).encode())
        return len(pd.read_csv(path, dtype=str))

    def decide(self, decision: Decision, words: str) -> None:
        """Write the decision: the turn is over."""
        storage.write_bytes(self.place("decision.md"), words.encode())
        storage.write_bytes(self.place("decision.json"), decision.model_dump_json(indent=1).encode())

    @property
    def decision(self) -> Decision | None:
        """None while the turn is not over."""
        path = self.place("decision.json")
        return Decision.model_validate_json(path.read_bytes()) if path.exists() else None


def alone(out: Path) -> AbstractContextManager[None]:
    """Keep every other run out of the folder until the block ends.

    Raises:
        StorageError: Another run is at work in it.
    """
    busy = StorageError("another run is at work here", where=out, todo="wait until it ends; Prefect's page shows it")
    return locked(out / "lifecycle.lock", busy)


def take_turn(out: Path, landing: str, data: Path, shards: str, registry: str, site: str) -> Turn:
    """The turn that was cut off, or a new one.

    Args:
        out: Folder of the lifecycle.
        landing: See `read_landing`.
        data: The first archive.
        shards: Shard folder, which grows.
        registry: Folder or ``s3://``; it needs a champion.
        site: See `read_landing`.

    Raises:
        RegistryError: There is no champion.
    """
    turns = _turns(out)
    if turns and turns[-1].decision is None:
        return turns[-1]
    champion = champion_of(registry)
    found = read_landing(landing, site)
    learnt = next((turn for turn in reversed(turns) if turn.decision and turn.decision.verdict), None)
    images = found.images
    if learnt is not None:  # drift is measured on what came since the last challenger, whatever became of it
        images = images[~_keys(images).isin(_keys(learnt.landed()))]
    labels = unlearnt(out / "archive", data, found.labels)
    number = len(turns) + 1
    folder = _folder(out, number)
    images = images.assign(lesion_id=lesion_of(images["image_id"].tolist(), found.labels))
    _write(folder / "images.parquet", images)
    _write(folder / "landed.parquet", found.images)
    _write(folder / "labels.parquet", labels.astype({"age": float}))
    cycle = Cycle(
        number=number, begun=now(), landing=landing, champion=champion.id,
        champion_uri=storage.join(registry, "models", champion.id), champion_sha256=champion.sha256,
        data_hash=ShardFolder(shards).manifest.data_hash, images=len(images), labels=len(labels),
        left_out=found.left_out,
    )  # fmt: skip
    storage.write_bytes(folder / "cycle.json", cycle.model_dump_json(indent=1).encode())
    return Turn(out, cycle)


def champion_of(registry: str) -> Version:
    """The champion; raises RegistryError where there is none."""
    champion = Registry(registry).champion()
    if champion is None:
        raise RegistryError(
            "no champion yet", where=registry, expected="a model in use, which a challenger is compared with",
            todo="run the flow pipeline with this registry, or dermaflow models promote",
        )  # fmt: skip
    return champion


def known_hashes(out: Path) -> set[str]:
    """Hashes of all states of the shards since the test was frozen; each holds it in its test split."""
    turns = _turns(out)
    decided = (turn.decision for turn in turns)
    return {turn.cycle.data_hash for turn in turns} | {d.data_hash for d in decided if d is not None and d.data_hash}


def now() -> str:
    """ISO 8601, UTC, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _turns(out: Path) -> list[Turn]:
    places = sorted((out / "cycles").glob("[0-9]*/cycle.json"))
    return [Turn(out, Cycle.model_validate_json(place.read_bytes())) for place in places]


def _folder(out: Path, number: int) -> Path:
    return out / "cycles" / f"{number:04d}"


def _keys(images: pd.DataFrame) -> pd.Series:
    return images["image_id"] + "|" + images["bytes"].astype(str) + "|" + images["modified"].astype(str)


def _write(path: Path, table: pd.DataFrame) -> None:
    with storage.open_atomic(path) as stream:
        pq.write_table(pa.Table.from_pandas(table, preserve_index=False), stream)
