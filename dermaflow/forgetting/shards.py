"""Shards: the rows go, the shards they were in are written anew under the name of their new content, the manifest last.

What remains is what `dermaflow prepare` would write from an archive that never held the images.
"""

from __future__ import annotations

from collections import Counter
from pathlib import PurePath

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from dermaflow import storage
from dermaflow.forgetting.places import Ids, Link
from dermaflow.preparation import layout
from dermaflow.preparation.prepare import INSPECTION_NAME
from dermaflow.preparation.reading import ShardFolder, read_shard
from dermaflow.schemas.shard import LESIONS_NAME, MANIFEST_NAME, QUARANTINE_NAME, SHARD_SCHEMA, ShardFile

_METADATA = [name for name in SHARD_SCHEMA.names if name != "image"]


class Shards:
    """A shard folder, local or s3://.

    Raises:
        ShardError: It is none, or is damaged.
    """

    def __init__(self, uri: str) -> None:
        self.name = uri
        self._folder = ShardFolder(uri)

    @property
    def data_hash(self) -> str:
        """By which models name what they were trained on."""
        return self._folder.manifest.data_hash

    def links(self) -> list[Link]:
        """Lesions and images; shards know no people."""
        found = []
        for shard in self._folder.manifest.shards:
            rows = self._read(shard, ["lesion_id", "image_id"]).to_pylist()
            found += [Link(None, row["lesion_id"], row["image_id"]) for row in rows]
        return found

    def holds(self, ids: Ids) -> dict[str, int]:
        """Images and lesions, and bad images that were set apart."""
        links = [link for link in self.links() if link.image in ids.images or link.lesion in ids.lesions]
        counts = {
            "images": len(links),
            "lesions": len({link.lesion for link in links} & ids.lesions),
            "quarantined": int(_named(self._quarantine(), ids).sum()),
            "inspected": int(_inspected(self._inspection(), ids).sum()),
        }
        return {kind: count for kind, count in counts.items() if count}

    def remove(self, ids: Ids) -> None:
        """Shards first, then the small tables, then the manifest, then the files that it names no more."""
        manifest = self._folder.manifest
        shards = [kept for shard in manifest.shards if (kept := self._without(shard, ids)) is not None]
        rows = [self._read(shard, ["dx", "lesion_id"]).to_pandas().assign(split=shard.split) for shard in shards]
        left = pd.concat(rows) if rows else pd.DataFrame(columns=["dx", "lesion_id", "split"])
        counts = {s: dict(sorted(Counter(left.loc[left["split"] == s, "dx"]).items())) for s in manifest.counts}
        lesions = layout.read_lesions(self.name)
        images = left["lesion_id"].value_counts()
        lesions = lesions[lesions["lesion_id"].isin(images.index)].copy()
        lesions["images"] = lesions["lesion_id"].map(images).astype("int64")
        quarantine, inspection = self._quarantine(), self._inspection()
        layout.write_table(self.name, LESIONS_NAME, pa.Table.from_pandas(lesions, preserve_index=False))
        if (bad := _named(quarantine, ids)).any():
            content = quarantine[~bad].to_csv(index=False).encode()
            storage.write_bytes(storage.join(self.name, QUARANTINE_NAME), content)
        if (seen := _inspected(inspection, ids)).any():
            layout.write_table(
                self.name, INSPECTION_NAME, pa.Table.from_pandas(inspection[~seen], preserve_index=False)
            )
        new = manifest.model_copy(
            update={
                "shards": shards, "counts": counts, "quarantined": manifest.quarantined - int(bad.sum()),
                "lesions": {s: int((lesions["split"] == s).sum()) for s in manifest.lesions},
                "data_hash": layout.data_hash(shards),
            }
        )  # fmt: skip
        storage.write_bytes(storage.join(self.name, MANIFEST_NAME), new.model_dump_json(indent=1).encode())
        layout.remove_unnamed(self.name, new)
        self._folder = ShardFolder(self.name)

    def _without(self, shard: ShardFile, ids: Ids) -> ShardFile | None:
        """The shard without the rows that go, written if it is another one; None if no row is left."""
        mask = _rows(self._read(shard, ["lesion_id", "image_id"]), ids)
        if not pc.any(mask).as_py():
            return shard
        table = self._read(shard, SHARD_SCHEMA.names).filter(pc.invert(mask))
        if not table.num_rows:
            return None
        key = layout.content_key(table.select(_METADATA).to_pandas())
        path = layout.shard_path(shard.split, int(PurePath(shard.path).stem.split("-")[1]), key)
        size = layout.write_shard(table, storage.join(self.name, path))
        return ShardFile(path=path, split=shard.split, rows=table.num_rows, bytes=size, content_key=key)

    def _read(self, shard: ShardFile, columns: list[str]) -> pa.Table:
        return read_shard(storage.join(self.name, shard.path), columns)

    def _quarantine(self) -> pd.DataFrame:
        content = storage.read_bytes(storage.join(self.name, QUARANTINE_NAME))
        return pd.read_csv(pa.BufferReader(content), dtype=str, keep_default_na=False)

    def _inspection(self) -> pd.DataFrame:
        return layout.read_table(self.name, INSPECTION_NAME).to_pandas()


def _rows(table: pa.Table, ids: Ids) -> pa.ChunkedArray:
    images = pc.is_in(table["image_id"], pa.array(sorted(ids.images), pa.string()))
    return pc.or_(images, pc.is_in(table["lesion_id"], pa.array(sorted(ids.lesions), pa.string())))


def _named(quarantine: pd.DataFrame, ids: Ids) -> pd.Series:
    stems = quarantine["path"].map(lambda path: PurePath(path).stem)
    return quarantine["image_id"].isin(ids.images) | stems.isin(ids.images)


def _inspected(inspection: pd.DataFrame, ids: Ids) -> pd.Series:
    return inspection["name"].map(lambda name: PurePath(name).stem).isin(ids.images)
