"""A federated run in this process whose sites send nonsense, or push the other way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_here import SITES, a_plan, run_here, weights
from flwr.app import Array, Message
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from tiny_data import tiny_shards

from clients.rounds import trimmed_share
from dermaflow.errors import FederationError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("faults"), seed=1)


def spoil_one(change: Callable[[Message], None]) -> Any:
    def spoil(node: str, asked: Message, reply: Message) -> Message:
        if node == "101" and asked.metadata.message_type == "train":
            change(reply)
        return reply

    return spoil


def _nan(reply: Message) -> None:
    arrays = reply.content.array_records["arrays"]
    bad = arrays["delta"].numpy().copy()
    bad[5] = np.nan
    arrays["delta"] = Array(bad)


def _short(reply: Message) -> None:
    arrays = reply.content.array_records["arrays"]
    arrays["delta"] = Array(arrays["delta"].numpy()[:-1])


def _giant(reply: Message) -> None:
    arrays = reply.content.array_records["arrays"]
    arrays["delta"] = Array(arrays["delta"].numpy() * 100)


def _negative_variance(reply: Message) -> None:
    arrays = reply.content.array_records["arrays"]
    arrays["norm"] = Array(-np.abs(arrays["norm"].numpy()))


def _boast(reply: Message) -> None:
    reply.content.metric_records["metrics"]["images"] = float("inf")


def _multiply(reply: Message) -> None:
    reply.content.metric_records["metrics"]["images"] = 1e9


def _nothing(reply: Message) -> None:
    del reply.content.array_records["arrays"]["delta"]


def _no_steps(reply: Message) -> None:
    del reply.content.metric_records["metrics"]["steps"]


def _many_steps(reply: Message) -> None:
    reply.content.metric_records["metrics"]["steps"] = 1e9


@pytest.mark.parametrize(
    ("change", "says"),
    [(_nan, "NaN"), (_short, "shape"), (_giant, "times as long"), (_negative_variance, "variance"), (_boast, "figures"),
     (_multiply, "it counts 1e+09 images"), (_nothing, "incomplete")],
)  # fmt: skip
def test_a_site_that_sends_nonsense_is_named_and_left_out(
    shards: Path, tmp_path: Path, change: Callable[[Message], None], says: str
) -> None:
    result, _ = run_here(a_plan(shards, tmp_path, rounds=1), spoil=spoil_one(change))
    record = result["rounds"][0]
    assert list(record["failed"]) == ["vidir_modern"] and says in record["failed"]["vidir_modern"]
    assert sorted(record["sites"]) == [SITES[0], *SITES[2:]]
    assert all(np.isfinite(array).all() for array in weights(tmp_path).values())


def test_a_site_that_claims_more_steps_than_it_took_is_left_out(shards: Path, tmp_path: Path) -> None:
    """Its steps would carry everybody's update far away."""
    result, _ = run_here(a_plan(shards, tmp_path, rounds=1, weigh="steps"), spoil=spoil_one(_many_steps))
    assert "times as long" in result["rounds"][0]["failed"]["vidir_modern"]


@pytest.mark.parametrize("secure", [False, True])
def test_a_site_that_does_not_say_its_steps_ends_no_run(shards: Path, tmp_path: Path, secure: bool) -> None:
    result, _ = run_here(a_plan(shards, tmp_path, rounds=1, weigh="steps", secure=secure), spoil=spoil_one(_no_steps))
    assert len(result["rounds"]) == 1 and result["rounds"][0]["failed"].keys() <= {"vidir_modern"}


def test_too_few_answers_stop_the_run_and_say_who_failed(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="vidir_modern"):
        run_here(a_plan(shards, tmp_path, rounds=1, min_sites=4), spoil=spoil_one(_nan))


def _against(reply: Message) -> None:
    arrays = reply.content.array_records["arrays"]
    arrays["delta"] = Array(arrays["delta"].numpy() * -8)


def _moved(shards: Path, out: Path, spoil: Any = None, **choices: Any) -> np.ndarray:
    """Where a round ends, float32 [size], normalisation statistics left out."""
    run_here(a_plan(shards, out, rounds=1, **choices), spoil=spoil)
    return np.concatenate([array.ravel() for name, array in sorted(weights(out).items()) if "running" not in name])


@pytest.fixture(scope="module")
def clean_and_pushed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, float]:
    """Where honest sites lead, and how far one that pushes the other way leads plain averaging from there."""
    folder = tmp_path_factory.mktemp("pushed")
    clean = _moved(shards, folder / "clean")
    return clean, float(np.square(_moved(shards, folder / "pushed", spoil_one(_against)) - clean).sum())


@pytest.mark.parametrize("strategy", ["krum", "median", "trimmed_mean"])
def test_a_robust_strategy_holds_against_a_site_that_pushes_the_other_way(
    shards: Path, tmp_path: Path, clean_and_pushed: tuple[np.ndarray, float], strategy: str
) -> None:
    clean, pushed = clean_and_pushed
    assert np.square(_moved(shards, tmp_path, spoil_one(_against), strategy=strategy) - clean).sum() < pushed / 4


def test_a_trimmed_mean_holds_without_a_site_that_failed(
    shards: Path, tmp_path: Path, clean_and_pushed: tuple[np.ndarray, float]
) -> None:
    """Of three answers one is left out at each end, as of four."""

    def spoil(node: str, asked: Message, reply: Message) -> Message:
        if node == "102" and asked.metadata.message_type == "train":
            raise RuntimeError("power cut")
        return spoil_one(_against)(node, asked, reply)

    clean, pushed = clean_and_pushed
    assert np.square(_moved(shards, tmp_path, spoil, strategy="trimmed_mean") - clean).sum() < pushed / 4


def test_a_trimmed_mean_of_which_nothing_would_be_left_ends_the_run(shards: Path, tmp_path: Path) -> None:
    plan = a_plan(shards, tmp_path, rounds=1, strategy="trimmed_mean", malicious=2)
    with pytest.raises(FederationError, match=r"4 sites answered.*expected at least 5"):
        run_here(plan)


@pytest.mark.parametrize(("answers", "malicious"), [(3, 1), (4, 1), (5, 2), (49, 1), (49, 24), (1000, 499)])
def test_as_many_are_trimmed_as_may_lie(answers: int, malicious: int) -> None:
    numbers = np.arange(float(answers))
    numbers[answers - malicious :] = 1e9
    assert trim_mean(numbers, trimmed_share(answers, malicious)) < answers


@pytest.mark.parametrize("strategy", ["krum", "median", "trimmed_mean"])
def test_a_robust_strategy_holds_for_running_statistics(shards: Path, tmp_path: Path, strategy: str) -> None:
    def far(reply: Message) -> None:
        arrays = reply.content.array_records["arrays"]
        arrays["norm"] = Array(arrays["norm"].numpy() + np.float32(1e6))

    run_here(a_plan(shards, tmp_path, rounds=1, strategy=strategy), spoil=spoil_one(far))
    assert all(np.abs(array).max() < 1e4 for name, array in weights(tmp_path).items() if "running" in name)
