"""Small synthetic archives and shards, for the tests of preparation and learning."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from PIL import Image

from dermaflow import storage
from dermaflow.datasets.synthetic.generate import generate
from dermaflow.preparation.layout import read_manifest
from dermaflow.preparation.prepare import Prepared, prepare

METADATA = "HAM10000_metadata.csv"


def draw(folder: Path, images: int = 120, seed: int = 0) -> Path:
    """A synthetic HAM10000 of 64 x 48 pixels."""
    generate(folder, images, seed, height=48, width=64)
    return folder


def metadata(folder: Path) -> pd.DataFrame:
    """The table of an archive, as text."""
    return pd.read_csv(folder / METADATA, dtype=str)


def add_image(folder: Path, row: Mapping[str, str], content: bytes) -> Path:
    """Put one more image and its row into an archive; what the row does not say is taken from the first row."""
    table = metadata(folder)
    new = table.iloc[[0]].assign(**row)
    pd.concat([table, new]).to_csv(folder / METADATA, index=False)
    path = folder / "HAM10000_images_part_1" / f"{row['image_id']}.jpg"
    path.write_bytes(content)
    return path


def image_files(folder: Path) -> dict[str, Path]:
    """Path of each image by its id."""
    return {path.stem: path for path in sorted(folder.glob("HAM10000_images_part_*/*.jpg"))}


def noise(seed: int, height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 [height, width, 3]: smooth noise, so that JPEG keeps it."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encode(picture: np.ndarray | Image.Image, kind: str = "JPEG", **choices: object) -> bytes:
    """A picture, uint8 [H, W, 3], as a file."""
    stream = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(stream, kind, **choices)
    return stream.getvalue()


def rows_of(out: Path) -> pd.DataFrame:
    """Every row of every shard that the manifest names."""
    tables = [pq.read_table(out / shard.path).to_pandas() for shard in read_manifest(out).shards]
    return pd.concat(tables).sort_values("image_id", ignore_index=True)


def content(out: Path, *, without: str = "inspection.parquet") -> dict[str, str]:
    """SHA-256 of every file; the times in the inspection table are those of the archive's files."""
    return {name: sha256 for name, (_, sha256) in snapshot(out).items() if name != without}


def prepare_here(data: Path, out: str | Path, **choices: object) -> Prepared:
    """`prepare` in this process, without Ray."""
    return prepare(data, out, use_ray=False, **choices)  # type: ignore[arg-type]


def tiny_shards(folder: Path, seed: int = 0) -> Path:
    """Shards of a small synthetic archive, both within a folder."""
    prepare_here(draw(folder / "data", seed=seed), folder / "shards")
    return folder / "shards"


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Time of change and SHA-256 of every file of a folder."""
    files = [Path(place, name) for place, _, names in os.walk(folder) for name in names]
    return {
        str(file.relative_to(folder)): (file.stat().st_mtime_ns, storage.sha256(file.read_bytes())) for file in files
    }
