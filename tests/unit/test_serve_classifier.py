"""The classifier without Serve around it: batches, a new model while requests run, one that cannot be loaded."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from serve_parts import a_jpeg, save_servable

from serve.models import Chosen, choose

pytest.importorskip("ray.serve")

from serve.classifier import Classifier

IMAGES = [a_jpeg(seed) for seed in range(4)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Chosen]:
    root = tmp_path_factory.mktemp("models")
    return [choose(str(save_servable(root / f"m{seed}", seed))) for seed in range(2)]


@pytest.fixture(autouse=True)
def replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batching asks its replica how many requests it takes."""
    context = SimpleNamespace(_deployment_config=SimpleNamespace(max_ongoing_requests=100))
    monkeypatch.setattr("ray.serve.get_replica_context", lambda: context)


def config(model: Chosen, **changes: Any) -> dict[str, Any]:
    return model.user_config(batch=8, wait_ms=20.0) | changes


def ask(classifier: Classifier, count: int, start: int = 0) -> Any:
    ids = [f"I{start + i}" for i in range(count)]
    return classifier.classify([IMAGES[(start + i) % 4] for i in range(count)], ids, [None] * count)


@pytest.mark.parametrize("threads", [1, 2])  # as many batches at once, on a CPU
def test_images_of_several_requests_are_scored_together_and_go_back_to_whom_they_belong(
    models: list[Chosen], threads: int
) -> None:
    async def run() -> None:
        classifier = Classifier(threads)
        with pytest.raises(RuntimeError, match="no model"):
            await ask(classifier, 1)
        await classifier.reconfigure(config(models[0]))
        alone = [json.loads((await ask(classifier, 1, start))["findings"])[0] for start in range(4)]
        answers = await asyncio.gather(*(ask(classifier, 2, start) for start in range(0, 8, 2)))
        assert max(answer["together"] for answer in answers) > 2
        for start, answer in zip(range(0, 8, 2), answers, strict=True):
            found = json.loads(answer["findings"])
            assert [f["image_id"] for f in found] == [f"I{start}", f"I{start + 1}"]
            for place, finding in enumerate(found, start):
                assert finding["p_mel"] == pytest.approx(alone[place % 4]["p_mel"], abs=1e-5)

    asyncio.run(run())


def test_a_new_model_takes_over_and_no_answer_mixes_two(models: list[Chosen]) -> None:
    async def run() -> None:
        classifier = Classifier(1)
        await classifier.reconfigure(config(models[0]))
        waiting = [asyncio.create_task(ask(classifier, 4, start)) for start in range(0, 40, 4)]
        await asyncio.sleep(0)
        await classifier.reconfigure(config(models[1]))  # comes back at once: the old one answers meanwhile
        assert (await classifier.describe())["sha256"] == models[0].sha256
        answers = await asyncio.gather(*waiting)
        while (await classifier.describe())["sha256"] != models[1].sha256:
            answers.append(await ask(classifier, 2))
        answers.append(await ask(classifier, 2))
        for answer in answers:
            assert {f["model_sha256"] for f in json.loads(answer["findings"])} == {answer["model"]["sha256"]}
        assert answers[-1]["model"]["version"] == models[1].version

    asyncio.run(run())


def test_a_model_that_cannot_be_loaded_leaves_the_one_before(models: list[Chosen], tmp_path: Path) -> None:
    async def run() -> None:
        classifier = Classifier(1)
        await classifier.reconfigure(config(models[0]))
        await classifier.reconfigure(config(models[1], uri=str(tmp_path / "nothing")))
        assert classifier._loading is not None
        await classifier._loading
        described = await classifier.describe()
        assert described["sha256"] == models[0].sha256
        assert "could not be loaded" in described["problem"]
        assert (await ask(classifier, 1))["statuses"] == ["ok"]
        await classifier.reconfigure(config(models[1]))
        await classifier._loading
        assert (await classifier.describe())["problem"] is None

    asyncio.run(run())


def test_another_bundle_at_the_same_place_is_not_taken_for_the_one_that_was_meant(models: list[Chosen]) -> None:
    from dermaflow.errors import BundleError

    with pytest.raises(BundleError, match="by now"):
        asyncio.run(Classifier(1).reconfigure(config(models[0], sha256="0" * 64)))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_heat_map_does_not_disturb_the_answers(models: list[Chosen], threads: int) -> None:
    async def run() -> None:
        classifier = Classifier(threads)
        await classifier.reconfigure(config(models[0]))
        before = (await ask(classifier, 4))["findings"]
        explained, *answers = await asyncio.gather(
            classifier.explain(IMAGES[0], "I0", "mel"), *(ask(classifier, 4) for _ in range(3))
        )
        assert (explained["diagnosis"], explained["overlay"][:4]) == ("mel", b"\x89PNG")
        for answer in answers:
            for one, other in zip(json.loads(answer["findings"]), json.loads(before), strict=True):
                assert one["p_mel"] == pytest.approx(other["p_mel"], abs=1e-5)
        classifier.check_health()

    asyncio.run(run())
