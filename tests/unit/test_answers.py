"""Answers to questions beside the rounds that cannot be: the site is named and left out, the others go on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_here import SITES, Spoil, a_plan, run_here, weights
from flwr.app import Array, ConfigRecord, Message
from tiny_data import tiny_shards

from clients.grid import _said
from clients.result import left_out, save_model
from clients.site_data import SiteData
from dermaflow.bundles.bundle import load_bundle
from dermaflow.errors import FederationError

pytestmark = pytest.mark.usefixtures("one_thread")
BAD = SITES[1]
"""The site with node id 101."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("answers"), seed=1)


BAD_ANSWERS: list[tuple[str, str, np.ndarray | None, str]] = [
    ("describe", "copies", np.array([48, 64, 101]), "there are no copies of 48x64 pixels and JPEG quality 101"),
    ("class_sums", "sums", np.full((7, 1280), np.nan), "sums holds NaN or infinity"),
    ("scale_losses", "losses", None, "the answer holds no losses"),
    ("scaling_sums", "gradient", np.full(8, np.inf), "gradient holds NaN or infinity"),
    ("calibration_counts", "right", np.ones(7), "right is of shape [7]; expected [31, 7]"),
    ("evaluate", "hits", np.ones(7, np.int64), "hits is of shape [7]; expected [any, 7]"),
    ("reliability", "bins", -np.ones((15, 3)), "bins is negative; expected numbers from 0"),
]
"""To each question: an array that is not what was asked for, or None for none, and what is said of it."""


def answering(bad: list[tuple[str, str, np.ndarray | None, str]]) -> Spoil:
    """Site 101 answers so."""

    def spoil(node: str, asked: Message, reply: Message) -> Message:
        for question, name, array, _ in bad:
            if node == "101" and asked.metadata.message_type == f"query.{question}":
                arrays = reply.content.array_records["arrays"]
                if array is None:
                    del arrays[name]
                else:
                    arrays[name] = Array(array)
        return reply

    return spoil


def test_a_site_whose_answers_cannot_be_is_named_and_the_others_go_on(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = a_plan(shards, tmp_path, rounds=1, head="statistics")
    plan = plan.model_copy(update={"sites": ",".join(f"{name}={100 + i}" for i, name in enumerate(SITES))})
    with caplog.at_level(logging.WARNING, "clients.coordinator"):
        result, _ = run_here(plan, spoil=answering(BAD_ANSWERS))
    assert {question: set(found) for question, found in result["unanswered"].items()} == {
        question: {BAD} for question, *_ in BAD_ANSWERS
    }
    for question, _, _, reason in BAD_ANSWERS:
        assert result["unanswered"][question][BAD].startswith(f"refused: {reason}")
        assert f"{question}: {BAD} left out: refused: {reason}" in caplog.text
    good = set(SITES) - {BAD}
    assert set(result["counts"]) == set(result["sites"]) == good
    assert set(result["rounds"][0]["sites"]) == set(SITES)  # its training was as it should be
    assert all(np.isfinite(array).all() for array in weights(tmp_path).values())
    calibration = load_bundle(save_model(plan)).bundle.calibration
    parts = [SiteData(name, str(shards), "natural").labels("calibration") for name in good]
    assert calibration is not None and calibration.images == sum(map(len, parts))


def test_a_reason_is_said_once_with_where_it_held() -> None:
    rounds: list[dict[str, Any]] = [
        {"round": n, "failed": {"west": "no"} if n != 3 else {"east": "late"}} for n in range(1, 7)
    ]
    result = {"rounds": rounds, "unanswered": {"describe": {"west": "no"}, "evaluate": {"west": "no", "east": "away"}}}
    assert left_out(result) == {
        "east": {"late": "round 3", "away": "evaluate"},
        "west": {"no": "round 1 to 2, 4 to 6, describe, evaluate"},
    }
    assert left_out({"rounds": [{"round": 1, "failed": {}}]}) == {}  # an older run


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("<class 'clients.policy.Refused'>:<'strategy krum; expected 'fedavg'>'>", "strategy krum; expected 'fedavg'>"),
        ("<class 'dermaflow.errors.DataError'>:<'no image\nat all'>", "DataError: no image\nat all"),
        ("Error: Node Unavailable", "Error: Node Unavailable"),
        (None, None),
    ],
)
def test_an_error_of_a_site_is_put_plainly(reason: str | None, said: str | None) -> None:
    assert _said(reason) == said


def test_too_few_sites_that_can_be_believed_end_the_run(shards: Path, tmp_path: Path) -> None:
    plan = a_plan(shards, tmp_path, rounds=1, min_sites=4)
    with pytest.raises(FederationError, match=r"3 sites answered describe; expected at least 4"):
        run_here(plan, spoil=answering([("describe", "train", np.ones(6, np.int64), "")]))


def test_a_site_cannot_answer_in_the_name_of_another(shards: Path, tmp_path: Path) -> None:
    def lies(node: str, asked: Message, reply: Message) -> Message:
        if node == "102":
            config = reply.content.config_records["config"]
            reply.content["config"] = ConfigRecord({**config, "site": "a"})
        return reply

    result, _ = run_here(a_plan(shards, tmp_path, rounds=1, sites="a=100,b=102"), spoil=lies)
    assert set(result["counts"]) == set(result["sites"]) == {"a", "b"}
    assert result["counts"]["a"] != result["counts"]["b"]
