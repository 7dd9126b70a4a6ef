"""The deployment that owns the network: one copy of the weights a replica, images of several requests scored at once.

Whole requests come in, single images wait for a batch. Batches run in threads of their own, so the replica's loop stays
free to take requests: on a CPU one batch a core, because the cores of one batch would wait for each other whenever
another process needs one of them; on a GPU one at a time.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from ray import serve

from serve.models import choose

if TYPE_CHECKING:
    from dermaflow.scoring.predictor import Predictor

log = logging.getLogger(__name__)

STUCK = 120  # seconds after which a batch that has not come back makes the replica unhealthy


class Model(NamedTuple):
    """A loaded model, and what is said of it."""

    predictor: Predictor
    facts: dict[str, Any]

    @property
    def name(self) -> dict[str, str]:
        return {key: self.facts[key] for key in ("name", "version", "sha256")}


class _Item(NamedTuple):
    """One image that waits. It keeps the model its request began with: one answer never mixes two models."""

    model: Model
    image: bytes
    image_id: str
    lesion_id: str | None


class _Scored(NamedTuple):
    finding: bytes  # JSON
    status: str
    together: int  # images of its batch


class Classifier:
    """Images to findings.

    Args:
        threads: Of the network; by default ``DERMAFLOW_THREADS``.
    """

    def __init__(self, threads: int | None = None) -> None:
        import torch

        from dermaflow.learning.optimisation import pick_device
        from dermaflow.scoring.runtime import is_compiled
        from dermaflow.settings import settings, start_logging

        start_logging()
        # Ray allows a replica as many threads as CPUs it reserves, which says nothing of the machine
        threads = threads or settings().threads
        torch.set_num_threads(threads)
        self._at_once = threads if is_compiled(pick_device()) else 1
        self._threads = ThreadPoolExecutor(self._at_once, "network")
        self._explaining = asyncio.Lock()  # a heat map hooks into the network of PyTorch
        self._score = serve.batch(max_concurrent_batches=self._at_once)(self._score_batch)
        self._model: Model | None = None
        self._loading: asyncio.Task[None] | None = None
        self._wanted = ""
        self._problem: str | None = None
        self._since: dict[int, float] = {}  # when the batches under way began, by thread

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Take another model or batch size. Serve calls it at the start and when the user config changes.

        The first model is waited for. Later ones load beside the one in use, which answers until they are there: Serve
        sends nothing to a replica while this runs. One that cannot be loaded is left, and `describe` says why.

        Args:
            config: ``uri``, ``version`` and ``sha256``, or ``model`` as in `serve.models.choose`; ``batch`` (images),
                ``wait_ms``.
        """
        self._score.set_max_batch_size(config.get("batch", 16))
        self._score.set_batch_wait_timeout_s(config.get("wait_ms", 4.0) / 1000)
        if "uri" not in config:
            config = (await asyncio.to_thread(choose, config["model"])).user_config()
        if self._model is not None and config["sha256"] == self._model.facts["sha256"]:
            return
        self._wanted = config["sha256"]
        if self._model is None:
            self._model = await asyncio.to_thread(load, config, self._at_once)
        else:
            self._loading = asyncio.create_task(self._swap(config))

    async def _swap(self, config: dict[str, Any]) -> None:
        try:
            model = await asyncio.to_thread(load, config, self._at_once)
        except Exception as error:
            self._problem = f"{config['version']} could not be loaded: {type(error).__name__}"
            log.exception("%s could not be loaded; the model before stays", config["version"])
            return
        if config["sha256"] == self._wanted:  # not overtaken by a later change
            self._model, self._problem = model, None
            log.info("the model is now %s", config["version"])

    async def classify(self, images: list[bytes], image_ids: list[str], lesion_ids: list[str | None]) -> dict[str, Any]:
        """Findings of the images of one request.

        Returns:
            ``model`` (name, version, sha256), ``thresholds``, ``findings`` (JSON, a list), ``statuses``, ``together``
            (images in the largest batch they were part of).
        """
        model = self._ready()
        waiting = (self._score(_Item(model, *row)) for row in zip(images, image_ids, lesion_ids, strict=True))
        scored: list[_Scored] = await asyncio.gather(*waiting)
        return {
            "model": model.name,
            "thresholds": model.facts["thresholds"],
            "findings": b"[" + b",".join(one.finding for one in scored) + b"]",
            "statuses": [one.status for one in scored],
            "together": max(one.together for one in scored),
        }

    async def _score_batch(self, items: list[_Item]) -> list[_Scored]:
        scored: dict[int, _Scored] = {}
        for sha256 in dict.fromkeys(item.model.facts["sha256"] for item in items):
            places = [i for i, item in enumerate(items) if item.model.facts["sha256"] == sha256]
            chosen = [items[i] for i in places]
            found = await self._run(
                chosen[0].model.predictor.predict,
                [item.image for item in chosen],
                [item.image_id for item in chosen],
                [item.lesion_id for item in chosen],
            )  # fmt: skip
            for i, finding in zip(places, found, strict=True):
                scored[i] = _Scored(finding.model_dump_json().encode(), finding.status, len(chosen))
        return [scored[i] for i in range(len(items))]

    async def explain(self, image: bytes, image_id: str, diagnosis: str | None) -> dict[str, Any]:
        """Heat map and neighbours of an image: ``model``, ``finding`` (JSON), ``diagnosis``, ``overlay`` (PNG or None),
        ``neighbours``."""
        from dermaflow.trust.explain import explain

        model = self._ready()
        async with self._explaining:
            found = await self._run(lambda: explain(model.predictor, image, image_id, diagnosis=diagnosis))
        return {
            "model": model.name,
            "finding": found.finding.model_dump_json().encode(),
            "diagnosis": found.diagnosis,
            "overlay": found.overlay,
            "neighbours": [vars(neighbour) for neighbour in found.neighbours],
        }

    async def describe(self) -> dict[str, Any]:
        """The model in use: all of ``GET /v1/model``, its ``uri``, and ``problem`` of one that could not be loaded."""
        return {**self._ready().facts, "problem": self._problem}

    async def process(self) -> int:
        """The id of this replica's process."""
        import os

        return os.getpid()

    def check_health(self) -> None:
        """Unhealthy once a batch has not come back for long."""
        if any(time.monotonic() - since > STUCK for since in self._since.copy().values()):
            raise RuntimeError("a batch does not come back")

    async def _run(self, function: Any, *arguments: Any) -> Any:
        def timed() -> Any:
            self._since[threading.get_ident()] = time.monotonic()
            try:
                return function(*arguments)
            finally:
                del self._since[threading.get_ident()]

        return await asyncio.get_running_loop().run_in_executor(self._threads, timed)

    def _ready(self) -> Model:
        if self._model is None:
            raise RuntimeError("no model yet")
        return self._model


def load(config: dict[str, Any], at_once: int) -> Model:
    """Read a bundle, check every byte, make it ready for so many batches at once, and run it once.

    Raises:
        BundleError: It is damaged, not calibrated, or not the one that was meant.
    """
    import io

    from PIL import Image

    from dermaflow.bundles.bundle import load_bundle
    from dermaflow.errors import BundleError
    from dermaflow.scoring.predictor import Predictor

    loaded = load_bundle(config["uri"])
    if loaded.sha256 != config["sha256"]:
        raise BundleError(f"is {loaded.sha256[:12]} by now", where=config["uri"], expected=config["sha256"][:12],
                          todo="start again with the model that is meant")  # fmt: skip
    predictor = Predictor(loaded, at_once=at_once)
    picture = io.BytesIO()
    Image.new("RGB", (640, 480), "white").save(picture, "JPEG")
    predictor.predict([picture.getvalue()], ["warm-up"])  # the first call allocates; no user waits for it
    return Model(predictor, facts_of(config, loaded))


def facts_of(config: dict[str, Any], loaded: Any) -> dict[str, Any]:
    """What ``GET /v1/model`` says of a bundle."""
    from dermaflow.taxonomy import DIAGNOSES

    bundle, fitted = loaded.bundle, loaded.bundle.calibration
    policy = {f"policy_{k}": float(v) for k, v in fitted.policy.model_dump(exclude_none=True).items()}
    return {
        "name": bundle.name, "version": config["version"], "sha256": loaded.sha256, "uri": config["uri"],
        "backbone": bundle.backbone, "input": bundle.input.model_dump(mode="json"),
        "classes": [{"code": d.code, "name": d.name, "malignant": d.malignant} for d in DIAGNOSES],
        "metrics": bundle.metrics, "card": loaded.card,
        "thresholds": {"mel": fitted.mel_threshold, "malignant": fitted.malignant_threshold,
                       "entropy": fitted.entropy_threshold, **policy},
    }  # fmt: skip
