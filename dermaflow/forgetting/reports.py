"""A report of `dermaflow evaluate`: its tables lose the rows, and a page that shows the images goes."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dermaflow import storage
from dermaflow.errors import DataError
from dermaflow.evaluation.report import REPORT_NAME
from dermaflow.evaluation.run import FINDINGS_NAME, PREDICTIONS_NAME
from dermaflow.forgetting.places import Ids, Link

_TABLES = (PREDICTIONS_NAME, FINDINGS_NAME)


class Report:
    """A folder of a report, whose figures are aggregates and stay.

    Raises:
        DataError: It is none.
    """

    def __init__(self, folder: str) -> None:
        self.name = folder
        if not storage.exists(storage.join(folder, PREDICTIONS_NAME)):
            raise DataError("no report", where=folder, expected=f"{PREDICTIONS_NAME}, as dermaflow evaluate writes it")

    def _table(self, name: str) -> pa.Table:
        place = storage.join(self.name, name)
        empty = pa.table({"image_id": pa.array([], pa.string()), "lesion_id": pa.array([], pa.string())})
        return pq.read_table(pa.BufferReader(storage.read_bytes(place))) if storage.exists(place) else empty

    def links(self) -> list[Link]:
        table = self._table(PREDICTIONS_NAME)
        pairs = zip(table["lesion_id"].to_pylist(), table["image_id"].to_pylist(), strict=True)
        return [Link(None, lesion, image) for lesion, image in pairs]

    def holds(self, ids: Ids) -> dict[str, int]:
        rows = int(sum(pc.sum(_rows(self._table(name), ids)).as_py() or 0 for name in _TABLES))
        counts = {"rows": rows, "page": int(self._shown(ids))}
        return {kind: count for kind, count in counts.items() if count}

    def _shown(self, ids: Ids) -> bool:
        place = storage.join(self.name, REPORT_NAME)
        page = storage.read_bytes(place).decode(errors="replace") if storage.exists(place) else ""
        return any(name in page for name in ids.images | ids.lesions)

    def remove(self, ids: Ids) -> None:
        """The page first: it shows pictures. `dermaflow evaluate` makes it anew."""
        if self._shown(ids):
            storage.delete(storage.join(self.name, REPORT_NAME))
        for name in _TABLES:
            table = self._table(name)
            if pc.any(mask := _rows(table, ids)).as_py():
                with storage.open_atomic(storage.join(self.name, name)) as stream:
                    pq.write_table(table.filter(pc.invert(mask)), stream)


def _rows(table: pa.Table, ids: Ids) -> pa.ChunkedArray:
    images = pc.is_in(table["image_id"], pa.array(sorted(ids.images), pa.string()))
    return pc.or_(images, pc.is_in(table["lesion_id"], pa.array(sorted(ids.lesions), pa.string())))
