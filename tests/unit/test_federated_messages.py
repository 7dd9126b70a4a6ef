"""Who gets what in a round, who is waited for, and who is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
from federation_here import SITES, a_plan, a_recipe, run_here
from flwr.app import Message
from tiny_data import tiny_shards

from dermaflow.learning.backbones import BackboneConfig
from dermaflow.learning.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("messages"), seed=1)


def a_small_recipe() -> Recipe:
    return a_recipe().model_copy(update={"backbone": BackboneConfig(name="seed_cnn", dropout=0.0)})


def test_what_is_not_trained_is_sent_once_and_again_to_who_failed(shards: Path, tmp_path: Path) -> None:
    """And the final model is sent once, for the test split and for the calibration."""
    whole: list[tuple[str, str]] = []
    weights_sent: list[str] = []

    def watch(node: str, asked: Message, reply: Message) -> Message:
        kind, arrays = asked.metadata.message_type, asked.content.array_records.get("arrays", {})
        if "rest" in arrays:
            whole.append((node, kind))
        if "weights" in arrays:
            weights_sent.append(kind)
        if (node, kind, asked.metadata.group_id) == ("101", "train", "1"):
            raise RuntimeError("power cut")
        return reply

    result, _ = run_here(a_plan(shards, tmp_path, rounds=2, scope="head", head="statistics"), spoil=watch)
    others = [(node, "query.class_sums") for node in ("100", "101", "102", "103")]
    assert sorted(whole) == sorted([*others, ("101", "train")])
    assert set(result["rounds"][1]["sites"]) == set(SITES) and not result["unanswered"]
    assert weights_sent.count("query.evaluate") == 4 and weights_sent.count("query.class_sums") == 4


def test_a_site_that_is_late_is_named_and_takes_part_in_the_next_round(shards: Path, tmp_path: Path) -> None:
    def late(node: str, asked: Message, reply: Message) -> Message | None:
        return None if (node, asked.metadata.message_type, asked.metadata.group_id) == ("101", "train", "1") else reply

    result, _ = run_here(a_plan(shards, tmp_path, rounds=2, timeout=2.0, recipe=a_small_recipe()), spoil=late)  # type: ignore[arg-type]
    first, second = result["rounds"]
    assert first["failed"] == {SITES[1]: "no answer in time"} and first["seconds"] >= 2
    assert not second["failed"] and sorted(second["sites"]) == SITES


def test_a_quorum_waits_for_nobody_beyond_its_grace(shards: Path, tmp_path: Path) -> None:
    def silent(node: str, asked: Message, reply: Message) -> Message | None:
        return None if (node, asked.metadata.message_type) == ("101", "train") else reply

    plan = a_plan(shards, tmp_path, rounds=1, timeout=600.0, quorum=0.75, grace=0.5, recipe=a_small_recipe())
    result, _ = run_here(plan, spoil=silent)  # type: ignore[arg-type]
    assert result["rounds"][0]["failed"] == {SITES[1]: "no answer in time"} and result["rounds"][0]["seconds"] < 60


def test_a_fraction_of_the_sites_is_drawn_by_seed_and_round(shards: Path, tmp_path: Path) -> None:
    drawn = []
    for name, seed in (("a", 0), ("b", 0), ("c", 5)):
        plan = a_plan(shards, tmp_path / name, rounds=4, fraction=0.5, seed=seed, recipe=a_small_recipe())
        result, _ = run_here(plan)
        drawn.append([tuple(sorted(record["sites"])) for record in result["rounds"]])
        assert all(len(sites) == 2 for sites in drawn[-1]) and len(set(drawn[-1])) > 1
    assert drawn[0] == drawn[1] != drawn[2]
