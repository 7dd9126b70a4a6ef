"""The matrix of every model on every site's test lesions: from finished runs, and from bundles where the shards are.

A run says by itself how its model does at each site: the sites counted, and only counts came back. So training each
site alone is a run over one site whose model all sites look at, in a simulation and among hospitals alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from clients.coordinator import RESULT, network_of_result
from clients.memory import Memory
from clients.partition import POOLED
from clients.plan import Plan
from clients.result import figure, tests_of
from clients.site_data import SiteData, simulated_sites
from dermaflow.bundles.bundle import load_bundle
from dermaflow.errors import DataError, FederationError
from dermaflow.evaluation.crosssite import Matrix, Row, TestCounts, count_test, row_of
from dermaflow.evaluation.figures import Counts, Estimate
from dermaflow.evaluation.wording import interval
from dermaflow.learning.backbones import Network
from dermaflow.learning.inference import network_of, predict
from dermaflow.learning.optimisation import pick_device
from dermaflow.schemas.bundle import InputSpec

COMPARED = "compare"
"""Folder, within that of a run, of the runs it is compared with."""

FIGURES = ("balanced_accuracy", "accuracy", "melanoma_sensitivity")


@dataclass(frozen=True)
class FinishedRun:
    """A federated run that has ended.

    Attributes:
        folder: Of the run.
        plan: What was done.
        result: The content of `result.json`.
    """

    folder: Path
    plan: Plan
    result: dict[str, Any]

    @cached_property
    def tests(self) -> dict[str, TestCounts]:
        """The model on the test split of each site, by site; a pooled site, which is all the others, apart."""
        return {site: test for site, test in tests_of(self.result).items() if site != POOLED}

    @property
    def trained_on(self) -> list[str]:
        """Sites whose images trained the model."""
        trained: list[str] = self.result["training_sites"]
        return sorted(self.tests) if trained == [POOLED] else trained

    @property
    def title(self) -> str:
        """Name of its model in a matrix."""
        trained = self.result["training_sites"]
        if trained == [POOLED]:
            return POOLED
        if len(trained) == 1:
            return f"{trained[0]} alone"
        return f"federated, {self.plan.strategy}" + (", own normalisation" if self.plan.norm == "local" else "")


def read_run(folder: Path) -> FinishedRun:
    """A finished run; raises FederationError where there is none."""
    place = folder / RESULT
    if not place.exists():
        raise FederationError(
            "no finished run", where=folder, expected=f"a folder with {RESULT}",
            todo="run the same `dermaflow federate` again: it goes on where it stopped",
        )  # fmt: skip
    result = json.loads(place.read_text())
    plan = result["plan"] | {"recipe": json.dumps(result["plan"]["recipe"])}
    return FinishedRun(folder, Plan.model_validate(plan), result)


def runs_with_compared(folders: Sequence[Path]) -> list[FinishedRun]:
    """The runs of these folders, each followed by the finished ones it is compared with."""
    found = []
    for folder in folders:
        beside = sorted(place.parent for place in folder.glob(f"{COMPARED}/*/{RESULT}"))
        found += [read_run(place) for place in (folder, *beside)]
    return found


def matrix_of(
    runs: Sequence[FinishedRun],
    bundles: dict[str, str],
    shards: str | None,
    partition: str | None = None,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> Matrix:
    """Every model on every site's test lesions.

    Args:
        runs: Finished runs, of the same sites.
        bundles: Further models by name, run on the shards here.
        shards: Shard folder that a simulation divides, for the bundles and for personal models; by default that of the
            first run.
        partition: How it is divided; by default as in the first run.
        progress: Called with a label, models done and in all.

    Raises:
        DataError: Nothing to compare, runs of other sites, or a bundle without shards.
    """
    if not runs and not bundles:
        raise DataError("no model", expected="folders of runs, or bundles: --model NAME=BUNDLE with --shards")
    first = runs[0] if runs else None
    shards = shards or (first.plan.shards if first else "") or None
    partition = (partition or (first.plan.partition if first else "natural")).removesuffix(f"+{POOLED}")
    if bundles and not shards:
        raise DataError(
            "bundles can be measured here only on shards that are here", where="--model", expected="--shards DIR"
        )
    seed, resamples = (first.plan.seed, first.plan.resamples) if first else (0, 1000)
    rows = [row_of(title, run.tests, run.trained_on) for title, run in _named(runs).items()]
    sites = sorted(first.tests) if first else simulated_sites(str(shards), partition)
    for row, run in zip(rows, runs, strict=True):
        if sorted(row.cells) != sites or run.plan.resamples != resamples:
            raise DataError(
                f"sites {', '.join(sorted(row.cells))}, {run.plan.resamples} resamples", where=run.folder,
                expected=f"{', '.join(sites)}, {resamples} resamples, as in {runs[0].folder}",
                todo="compare runs over the same sites",
            )  # fmt: skip
    work = _Work(sites, str(shards), partition, seed, resamples) if shards else None
    personal = [run for run in runs if work and run.plan.norm == "local" and len(run.result["training_sites"]) > 1]
    total, done = len(bundles) + sum(len(run.result["training_sites"]) for run in personal), 0
    if work:
        for run in personal:
            for site, network in personal_networks(run).items():
                progress("models", done, total)
                rows.append(
                    work.row(f"federated, normalisation of {site}", network, run.plan.parsed_recipe.input_spec, [site])
                )
                done += 1
        for name, bundle in bundles.items():
            progress("models", done, total)
            loaded = load_bundle(bundle)
            record = loaded.bundle.training.federation
            rows.append(work.row(name, network_of(loaded), loaded.bundle.input, record.sites if record else []))
            done += 1
        progress("models", done, total)
    return Matrix(resamples=resamples, sites=sites, rows=rows)


def personal_networks(run: FinishedRun) -> dict[str, Network]:
    """Of a simulated run whose normalisation stays at the sites: the model as each training site has it."""
    found = {}
    for site in run.result["training_sites"]:
        own = Memory(run.folder / "sites" / site, run.plan.name).recall("norm")
        if own is None:
            continue
        network = network_of_result(run.plan, run.folder)
        network.load_state_dict({name: torch.from_numpy(array) for name, array in own.items()}, strict=False)
        found[site] = network
    return found


def _named(runs: Sequence[FinishedRun]) -> dict[str, FinishedRun]:
    """The runs by title; where two would have one name, with that of their folder."""
    titles = [run.title for run in runs]
    named = {
        title if titles.count(title) == 1 else f"{title} ({run.folder.name})": run
        for title, run in zip(titles, runs, strict=True)
    }
    if len(named) < len(runs):
        raise DataError("a run is named twice", where="RUN", todo="name each folder once")
    return named


@dataclass(frozen=True)
class _Work:
    """Models run here, counted as the sites of a simulation count."""

    sites: list[str]
    shards: str
    partition: str
    seed: int
    resamples: int

    def row(self, name: str, network: Network, spec: InputSpec, trained_on: Sequence[str]) -> Row:
        network = network.to(pick_device())
        tests = {}
        for site in self.sites:
            data = SiteData(site, self.shards, self.partition)
            pixels, labels = data.pixels("test", spec.height, spec.width, spec.copies), data.labels("test")
            found = predict(network, pixels, spec)[0].argmax(1) if len(labels) else labels
            tests[site] = count_test(
                labels, found, data.metadata("test")["lesion_id"].to_numpy(), seed=self.seed, resamples=self.resamples
            )
        return row_of(name, tests, trained_on)


def comparisons(plan: Plan, sites: Sequence[str]) -> dict[str, Plan]:
    """What a simulation is compared with: each of its sites alone and, first, all their images in one place.

    Each trains by the same recipe for the same rounds and local epochs, in a folder within the run's. Of one place
    there is nothing to bring together and nobody to hide from, so the strategy is plain averaging without masks or
    noise, and normalisation is never kept apart.
    """
    partition = plan.partition.removesuffix(f"+{POOLED}")
    norm = "shared" if plan.norm == "local" else plan.norm
    plain = {"strategy": "fedavg", "norm": norm, "fraction": 1.0, "min_sites": 1, "name": ""}
    plain |= {"secure": False, "dp": "none"}
    wanted = {POOLED: {"only": POOLED, "partition": f"{partition}+{POOLED}"}} | {
        f"{site} alone": {"only": site, "partition": partition} for site in sites if site != POOLED
    }
    return {
        title: plan.model_copy(
            update=plain | changes | {"out": str(Path(plan.out) / COMPARED / title.replace(" ", "-"))}
        )
        for title, changes in wanted.items()
    }


def table(matrix: Matrix, name: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows for the terminal: one of `FIGURES` of each model at each site, with its interval."""

    def cell(found: Estimate) -> str:
        return f"{figure(found)[0]}\n{interval(found, percentage=False)}".strip()

    more = ["mean of sites"] if name == "balanced_accuracy" else []
    header = ["model", *matrix.sites, "all", *more]
    first = matrix.rows[0]
    parts = [*(first.cells[site] for site in matrix.sites), first.everything]
    rows = [["images / lesions", *(counted(part.counts, name) for part in parts), *("" for _ in more)]]
    for row in matrix.rows:
        cells = [getattr(part, name) for part in (*(row.cells[site] for site in matrix.sites), row.everything)]
        rows.append([row.model, *map(cell, cells), *(cell(row.mean_of_sites) for _ in more)])
    return header, rows


def counted(counts: Counts, name: str) -> str:
    """Images and lesions that one of `FIGURES` rests on."""
    if name == "melanoma_sensitivity":
        return f"{counts.images_by_class.get('mel', 0):,} / {counts.lesions_by_class.get('mel', 0):,}"
    return f"{counts.images:,} / {counts.lesions:,}"


def notes(matrix: Matrix) -> list[str]:
    """Which classes are counted where a site lacks some."""
    return [
        f"{site}: over {', '.join(cell.counts.images_by_class) or 'nothing'}; its test split holds no "
        f"{', '.join(cell.absent)}"
        for site, cell in matrix.rows[0].cells.items()
        if cell.absent
    ]
