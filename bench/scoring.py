"""Bulk scoring of 600x450 JPEGs: `dermaflow score` against a DataLoader with the eager network, and the limits.

    python bench/scoring.py [--images 2000] [--rounds 5] [--networks mobilenet_v2 resnet18]
    python bench/scoring.py --memory

Every way reads the same files at 224x224 on the same cores. `dermaflow score` judges quality and distance, calibrates,
merges and writes findings as well; the plain script writes the seven probabilities. The limits are the compiled network
over pixels in memory and the decoding alone, each over all cores; together they are the least the work can take.
`--memory` shows that peak memory does not grow with the archive: 1,000 and 20,000 images.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from preparation import Files, make_images, private_memory
from rounds import compare, in_process, machine
from torch.utils.data import DataLoader

from dermaflow.bundles.bundle import load_bundle
from dermaflow.datasets.synthetic import generate
from dermaflow.learning.inference import network_of
from dermaflow.learning.recipe import Recipe
from dermaflow.learning.train import train
from dermaflow.preparation.prepare import prepare
from dermaflow.preparation.transforms import normalise, pixels
from dermaflow.scoring.bulk import score
from dermaflow.scoring.plan import Options
from dermaflow.scoring.runtime import make_runtime
from dermaflow.settings import settings

SIZE, BATCH = 224, 32
CORES = os.cpu_count() or 1


def make_model(folder: Path, network: str) -> Path:
    """A bundle of the network at 224x224; what it says is worth nothing, how long it takes is what counts."""
    data, shards, model = folder / "small", folder / "shards", folder / network
    if not data.exists():
        generate(data, 150, 0, height=150, width=200, workers=CORES)
        prepare(data, shards, use_ray=False)
    recipe = Recipe.model_validate(
        {
            "name": network,
            "input": {"height": SIZE, "width": SIZE},
            "backbone": {"name": network},
            "optim": {"head_epochs": 1, "epochs": 0},
        }
    )
    train(str(shards), recipe, model)
    return model


def as_shipped(images: Path, out: Path, model: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    score(str(images), str(out), model=str(model), options=Options(workers=CORES))


def plain(images: Path, out: Path, model: Path) -> None:
    torch.set_num_threads(CORES)
    loaded = load_bundle(model)
    network, spec = network_of(loaded), loaded.bundle.input
    paths = sorted(map(str, images.iterdir()))
    files = Files(paths, "with_torchvision", SIZE, SIZE)
    found = []
    with torch.inference_mode():
        for batch in DataLoader(files, BATCH, num_workers=CORES, multiprocessing_context="fork"):
            found.append(network(normalise(batch, spec)).softmax(1))
    table = pa.table({"image": paths, "p": list(torch.cat(found).numpy())})
    out.mkdir(exist_ok=True)
    pq.write_table(table, out / "plain.parquet")


def network_alone(images: Path, out: Path, model: Path) -> None:
    """As many images as there are, in as many processes as cores, from pixels in memory."""
    count = sum(1 for _ in images.iterdir())
    with get_context("fork").Pool(CORES) as pool:
        pool.map(partial(_run, model), [count // CORES] * CORES)


def _run(model: Path, count: int) -> None:
    os.environ["DERMAFLOW_THREADS"] = "1"
    settings.cache_clear()
    torch.set_num_threads(1)
    loaded = load_bundle(model)
    run = make_runtime(network_of(loaded), loaded.bundle.input, torch.device("cpu"))
    batch = np.random.default_rng(0).integers(0, 256, (BATCH, SIZE, SIZE, 3), dtype=np.uint8)
    for _ in range(count // BATCH):
        run(batch)


def decode_alone(images: Path, out: Path, model: Path) -> None:
    with get_context("fork").Pool(CORES) as pool:
        for _ in pool.imap_unordered(_decode, sorted(images.iterdir()), chunksize=100):
            pass


def _decode(path: Path) -> int:
    torch.set_num_threads(1)
    return pixels(path.read_bytes(), SIZE, SIZE).size


WAYS: dict[str, Callable[[Path, Path, Path], None]] = {
    "dermaflow score": as_shipped,
    "DataLoader + eager network": plain,
    "limit: network alone, OpenVINO": network_alone,
    "limit: decode alone": decode_alone,
}


def steady_rate(out: Path) -> float:
    """Images a second between the first commit and the last: without the start of the processes."""
    commits = [json.loads(path.read_text()) for path in (out / "log").glob("*.json")]
    times = sorted(commit["finished"] for commit in commits)
    return sum(commit["rows"] for commit in commits) * (1 - 1 / len(commits)) / (times[-1] - times[0])


def speed(images: int, rounds: int, networks: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_images(folder, images)
        warm = folder / "warm"
        warm.mkdir()
        for path in sorted((folder / "many").iterdir())[: 4 * BATCH]:
            shutil.copy(path, warm)
        print(f"{machine()}\n{images} JPEGs of 600x450, network at {SIZE}x{SIZE}, {CORES} cores", flush=True)
        for network in networks:
            model = make_model(folder, network)
            with ExitStack() as stack:

                def prepared(way: Callable[..., None], stack: ExitStack = stack, model: Path = model):
                    job = in_process(stack, way)

                    def run() -> float:
                        job(warm, folder / "out", model)  # not counted: starts Ray, and brings back idle memory
                        return job(folder / "many", folder / "out", model)

                    return run

                print(f"\n{network}", flush=True)
                found = compare({name: prepared(way) for name, way in WAYS.items()}, rounds, "way", images)
            ours, _, net, decode = found.values()
            steady = steady_rate(folder / "out")
            print(f"of the limit, network and decode on the same cores: {(net + decode) / ours:.2f};", end=" ")
            print(
                f"from the first part to the last {steady:.0f} images/s, {steady * (net + decode) / images:.2f} of it"
            )


def memory() -> None:
    import psutil

    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder, "mobilenet_v2")
        for images in (1000, 20_000):
            place = folder / str(images)
            place.mkdir()
            make_images(place, images)
            command = [sys.executable, "-m", "dermaflow.cli.main", "score", str(place / "many"), "--model", str(model)]
            start = time.perf_counter()
            process = subprocess.Popen(
                [*command, "--out", str(place / "out")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            top, tree = 0, psutil.Process(process.pid)
            while process.poll() is None:
                top = max(top, private_memory(tree))
                time.sleep(0.5)
            assert process.returncode == 0, "score failed"
            took = time.perf_counter() - start
            print(f"{images} images: {took:.1f} s, {steady_rate(place / 'out'):.0f} images/s from first to last part")
            print(f"    peak {top / 1e6:.0f} MB over all processes of score", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--networks", nargs="+", default=["mobilenet_v2", "resnet18"])
    parser.add_argument("--memory", action="store_true")
    chosen = parser.parse_args()
    memory() if chosen.memory else speed(chosen.images, chosen.rounds, chosen.networks)
