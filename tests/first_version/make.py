"""Write what DermaFlow 0.1.0 leaves on a disk, in a few kilobytes: a bundle, shards, a finished run, a batches' table.

The files beside this script were written by that version and never change: `tests/unit/test_upgrade.py` reads them with
every later one. Run it only to see how they came about: python tests/first_version/make.py OUT
"""

from __future__ import annotations

import json
import sqlite3
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pyarrow as pa
import pyarrow.parquet as pq
from serve_parts import a_jpeg, save_servable
from tiny_bundle import REFERENCE, a_bundle, a_calibration, some_weights
from tiny_data import draw, prepare_here

from dermaflow import storage
from dermaflow.bundles.bundle import save_bundle
from dermaflow.scoring.bulk import score
from serve.jobs import JobStore

MODEL = {"name": "tiny", "version": "tiny-1", "sha256": "a" * 64, "uri": "/models/tiny"}


def make(out: Path) -> None:
    """Write `bundle/`, `shards/`, `scored/` and `jobs.sql`."""
    save_bundle(out / "bundle", a_bundle(a_calibration(), data_hash="d"), some_weights(), REFERENCE, "# Card\n")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare_here(draw(work / "data", images=10, seed=3), out / "shards")
        (work / "images").mkdir()
        for i in range(3):
            (work / f"images/i{i}.jpg").write_bytes(a_jpeg(i, 60, 80) if i else b"no image")
        (work / "patients.csv").write_text("patient_id,lesion_id,image_id\nP1,L1,i1\n")
        score(str(work / "images"), str(out / "scored"), model=str(save_servable(work / "model")), use_ray=False,
              patients=str(work / "patients.csv"))  # fmt: skip
        for name in ("fhir", "patients", "index.html", "audit.lock"):  # large, and never read back
            storage.delete(out / "scored/pathways" / name)
        storage.delete(out / "scored/summary.html")
        inputs = pq.read_table(out / "scored/inputs.parquet")
        places = [f"/data/images/{Path(uri).name}" for uri in inputs["uri"].to_pylist()]
        inputs = inputs.set_column(0, inputs.schema.field(0), pa.array(places))
        pq.write_table(inputs, out / "scored/inputs.parquet", compression="zstd")
        for name in ("plan.json", "summary.json"):
            path = out / "scored" / name
            path.write_text(path.read_text().replace(json.dumps(folder)[1:-1], "/data"))
        store = JobStore(f"sqlite:///{work / 'jobs.sqlite'}")
        for number in (1, 2):
            store.add(id=f"b{number}", name="a.zip", source="/in/a.zip", patients=None, out="/out", model=MODEL,
                      caller="clinic")  # fmt: skip
        store.begin("b1")
        store.finish("b1")
        with sqlite3.connect(work / "jobs.sqlite") as connection:
            lines = "\n".join(line for line in connection.iterdump() if "dermaflow_schema" not in line)
    (out / "jobs.sql").write_text(lines + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
