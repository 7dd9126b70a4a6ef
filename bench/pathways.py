"""Recommend for many random patients on one core: the columnar engine, and a loop that makes every pathway in words.

    python bench/pathways.py [--cases 10000 100000] [--objects 200] [--rounds 5]

The columnar engine starts from pydantic objects and ends with a Parquet file of urgency, options and ids. The peers do
the same decision one patient at a time: a table of one row each, as a service without batches would, and the whole
`Pathway` with its lines and trace as JSON. CPU seconds are what one core needs, also on a machine that others use. The
last line says whether the time grows linearly.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rounds import machine, seconds

from dermaflow.pathways.engine import Thresholds, recommend
from dermaflow.pathways.knowledge import Knowledge, load_knowledge
from dermaflow.schemas.finding import LesionFinding
from dermaflow.schemas.patient import Lesion, Patient
from dermaflow.taxonomy import CODES, MALIGNANT

THRESHOLDS = Thresholds(mel=0.06, malignant=0.2, entropy=1.2)
KNOWN = 0.7  # share of the fields that somebody filled in
NUMBERS = {"age": (0, 100), "fitzpatrick": (1, 6), "inr": (1, 5), "frailty": (1, 9), "diameter_mm": (1, 40)}

Cases = tuple[list[Patient], list[Lesion], list[LesionFinding]]


def random_cases(count: int, seed: int) -> Cases:
    """People, lesions and findings, every field filled in at random or unknown."""
    rng = np.random.default_rng(seed)
    patients = [Patient(patient_id=f"p{i}", **fields) for i, fields in enumerate(_fields(Patient, count, rng))]
    lesions = [Lesion(lesion_id=f"l{i}", **fields) for i, fields in enumerate(_fields(Lesion, count, rng))]
    return patients, lesions, [_finding(f"l{i}", p) for i, p in enumerate(rng.dirichlet(np.full(7, 0.3), count))]


def _fields(schema: type[Patient] | type[Lesion], count: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    columns = {}
    for name, info in schema.model_fields.items():
        if name.endswith("_id"):
            continue
        if get_origin(info.annotation) is Literal:
            words = [word for word in get_args(info.annotation) if word != "unknown"]
            values = rng.choice(words, count).tolist()
        elif name == "allergies":
            values = [(word,) for word in rng.choice(["none", "peanut", "lidocaine", "nsaid"], count).tolist()]
        else:
            low, high = NUMBERS.get(name, (0, 5))
            values = rng.integers(low, high + 1, count).tolist()
        known = rng.random(count) < (0.1 if name == "histology" else KNOWN)
        columns[name] = [value if k else info.default for value, k in zip(values, known, strict=True)]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _finding(lesion_id: str, p: np.ndarray) -> LesionFinding:
    return LesionFinding(
        lesion_id=lesion_id, image_ids=(f"{lesion_id}-1",), p=tuple(p.tolist()), prediction=CODES[int(p.argmax())],
        conformal_set=tuple(code for code, value in zip(CODES, p.tolist(), strict=True) if value > 0.15),
        p_malignant=min(float(p[list(MALIGNANT)].sum()), 1.0), p_mel_max=float(p[CODES.index("mel")]), status="ok",
        model="bench", model_sha256="0" * 64,
    )  # fmt: skip


def columnar(cases: Cases, knowledge: Knowledge, out: Path) -> None:
    pq.write_table(recommend(*cases, knowledge, THRESHOLDS, site_calibrated=True).table(), out)


def row_by_row(cases: Cases, knowledge: Knowledge, out: Path) -> None:
    rows = [
        recommend([p], [x], [f], knowledge, THRESHOLDS, site_calibrated=True) for p, x, f in zip(*cases, strict=True)
    ]
    pq.write_table(pa.concat_tables([row.table() for row in rows]), out)


def in_words(cases: Cases, knowledge: Knowledge, out: Path) -> None:
    found = recommend(*cases, knowledge, THRESHOLDS, site_calibrated=True)
    out.write_text("\n".join(found.pathway(i).model_dump_json() for i in range(len(found))))


def run(sizes: list[int], objects: int, rounds: int) -> None:
    knowledge = load_knowledge()
    cases = random_cases(max(*sizes, objects), seed=0)
    print(f"{machine()}\n{knowledge.version}; {os.environ['OMP_NUM_THREADS']} thread")
    ways: list[tuple[str, int, Callable[[Cases, Knowledge, Path], None]]] = [
        *(("columns, to Parquet", size, columnar) for size in sizes),
        ("one patient at a time, to Parquet", objects, row_by_row),
        ("pathway in words, to JSON", objects, in_words),
    ]
    wall: list[list[float]] = [[] for _ in ways]
    core: list[list[float]] = [[] for _ in ways]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        columnar(first(cases, objects), knowledge, out)
        for number in range(rounds):
            for k, (_, size, way) in enumerate(ways):
                some, before = first(cases, size), time.process_time()
                wall[k].append(seconds(lambda way=way, some=some: way(some, knowledge, out)))
                core[k].append(time.process_time() - before)
            print(f"round {number + 1}: " + ", ".join(f"{times[-1]:.2f} s" for times in wall), flush=True)
    print("\n| way | cases | median s | min - max s | cases/s | median CPU s | cases per CPU s |")
    print("|---|---|---|---|---|---|---|")
    for (name, size, _), times, busy in zip(ways, wall, core, strict=True):
        middle, used = statistics.median(times), statistics.median(busy)
        spread = f"{min(times):.2f} - {max(times):.2f}"
        print(f"| {name} | {size} | {middle:.2f} | {spread} | {size / middle:.0f} | {used:.2f} | {size / used:.0f} |")
    each = [statistics.median(core[k]) / size for k, size in enumerate(sizes)]
    print(f"CPU time a case, largest against smallest table: {each[-1] / each[0]:.2f} (1.00 is linear)")


def first(cases: Cases, count: int) -> Cases:
    patients, lesions, findings = cases
    return patients[:count], lesions[:count], findings[:count]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--objects", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    run(sorted(chosen.cases), chosen.objects, chosen.rounds)
