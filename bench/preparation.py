"""Decode, resize and write 600x450 JPEGs: DermaFlow on Ray Data, a multiprocessing pool, a torch DataLoader.

    python bench/preparation.py [--images 10000] [--rounds 5] [--memory]

Every contestant reads the same files, makes uint8 pixels of 144x192 and writes them as .npy blocks of 1,000 images, on
the same cores. The pool and the DataLoader appear twice: as a user would write them (decode at full size with Pillow or
torchvision, then resize), and with DermaFlow's own decoder, which lets libjpeg decode at a reduced size.
The physical limit printed is one core's pure decode-and-resize time, divided by the cores.

`--memory` shows instead that the peak memory of `prepare` does not grow with the archive: 1,000 and 10,000 images.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # one image a core at a time is the fastest; threads inside an image only cost

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from rounds import compare, in_process, machine, seconds
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import resize

from dermaflow.datasets.synthetic import generate
from dermaflow.preparation.cluster import map_tables
from dermaflow.preparation.transforms import pixels

HEIGHT, WIDTH, BLOCK = 144, 192, 1000
torch.set_num_threads(1)


def own(path: str, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return pixels(Path(path).read_bytes(), height, width)


def with_pillow(path: str, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    with Image.open(io.BytesIO(Path(path).read_bytes())) as image:
        return np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR))


def with_torchvision(path: str, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    image = resize(decode_image(path, mode=ImageReadMode.RGB), [height, width], antialias=True)
    return image.permute(1, 2, 0).numpy()


def write_block(job: tuple[list[str], str, str]) -> int:
    paths, out, how = job
    read = globals()[how]
    np.save(out, np.stack([read(path) for path in paths]))
    return len(paths)


class Files(Dataset):
    def __init__(self, paths: list[str], how: str, height: int = HEIGHT, width: int = WIDTH) -> None:
        self.paths, self.read = paths, partial(globals()[how], height=height, width=width)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.read(self.paths[index])))


def blocks(paths: list[str], out: Path) -> list[tuple[list[str], str]]:
    return [(paths[i : i + BLOCK], str(out / f"{i:06d}.npy")) for i in range(0, len(paths), BLOCK)]


def ray_data(paths: list[str], out: Path) -> None:
    def work(table: pa.Table) -> pa.Table:
        torch.set_num_threads(1)
        target = table["out"][0].as_py()
        np.save(target, np.stack([pixels(Path(p).read_bytes(), HEIGHT, WIDTH) for p in table["path"].to_pylist()]))
        return pa.table({"images": [len(table)]})

    tables = [pa.table({"path": part, "out": [target] * len(part)}) for part, target in blocks(paths, out)]
    assert sum(table["images"][0].as_py() for table in map_tables(tables, work)) == len(paths)


def pool(paths: list[str], out: Path, how: str, workers: int) -> None:
    with multiprocessing.get_context("fork").Pool(workers) as processes:
        jobs = [(part, target, how) for part, target in blocks(paths, out)]
        assert sum(processes.imap_unordered(write_block, jobs)) == len(paths)


def loader(paths: list[str], out: Path, how: str, workers: int) -> None:
    images = DataLoader(Files(paths, how), batch_size=BLOCK, num_workers=workers, multiprocessing_context="fork")
    for number, batch in enumerate(images):
        np.save(out / f"{number:06d}.npy", batch.numpy())


def make_images(folder: Path, count: int) -> list[str]:
    """200 drawn images, copied under new names with some bytes after their end, so that no two files are the same."""
    drawn = folder / "drawn"
    generate(drawn, 200, 0, workers=os.cpu_count() or 1)
    sources = [path.read_bytes() for path in sorted(drawn.rglob("*.jpg"))]
    many = folder / "many"
    many.mkdir()
    for i in range(count):
        (many / f"ISIC_{i:07d}.jpg").write_bytes(sources[i % len(sources)] + i.to_bytes(4, "big"))
    return sorted(str(path) for path in many.iterdir())


def speed(images: int, rounds: int) -> None:
    workers = os.cpu_count() or 1
    ways = {
        "Ray Data, DermaFlow's decoder": ray_data,
        "pool, Pillow": partial(pool, how="with_pillow", workers=workers),
        "pool, DermaFlow's decoder": partial(pool, how="own", workers=workers),
        "DataLoader, torchvision": partial(loader, how="with_torchvision", workers=workers),
        "DataLoader, DermaFlow's decoder": partial(loader, how="own", workers=workers),
    }
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        paths = make_images(folder, images)
        out = folder / "out"
        out.mkdir()

        def prepared(way: Callable[..., None]) -> Callable[[], float]:
            job = in_process(stack, way)

            def run() -> float:
                job(paths[: workers * BLOCK], out)  # not counted: starts Ray, and brings back idle memory
                shutil.rmtree(out)
                out.mkdir()
                return job(paths, out)

            return run

        alone = seconds(lambda: [own(path) for path in paths[:500]]) / 500
        print(f"{machine()}\n{images} JPEGs of 600x450 to {HEIGHT}x{WIDTH}, {workers} workers")
        limit = alone * images / workers
        print(f"limit: {alone * 1e3:.2f} ms an image and core for decode and resize, {limit:.2f} s in all", flush=True)
        compare({name: prepared(way) for name, way in ways.items()}, rounds, "way", images)


def memory() -> None:
    import psutil

    print(machine())
    for images in (1000, 10_000):
        with tempfile.TemporaryDirectory() as name:
            data = Path(name) / "data"
            data.mkdir()
            paths = make_images(Path(name), images)
            classes = ("nv", "mel", "bkl", "bcc", "akiec", "vasc", "df")
            rows = [f"HAM_{i},{Path(p).stem},{classes[i % 7]},histo,50,male,back" for i, p in enumerate(paths)]
            header = "lesion_id,image_id,dx,dx_type,age,sex,localization"
            (data / "HAM10000_metadata.csv").write_text("\n".join([header, *rows]))
            shutil.move(Path(name) / "many", data / "HAM10000_images_part_1")
            size = sum(path.stat().st_size for path in data.rglob("*.jpg"))
            command = [sys.executable, "-m", "dermaflow.cli.main", "prepare", "--data", str(data), "--out", f"{name}/s"]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            top, tree = 0, psutil.Process(process.pid)
            while process.poll() is None:
                top = max(top, private_memory(tree))
                time.sleep(0.2)
            assert process.returncode == 0, "prepare failed"
            print(
                f"{images} images, {size / 1e6:.0f} MB: peak {top / 1e6:.0f} MB over all processes of prepare",
                flush=True,
            )


def private_memory(tree) -> int:
    """Proportional set size of a process and its children, shared memory of Ray's object store included once."""
    import psutil

    total = 0
    for process in [tree, *tree.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true")
    chosen = parser.parse_args()
    memory() if chosen.memory else speed(chosen.images, chosen.rounds)
