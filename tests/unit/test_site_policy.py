"""A site's policy: each field refuses what it should, says why without naming the site's data, and survives edits."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from clients.policy import NAME, TEMPLATE, Policy, PolicyError, Scope, app_refusal, approve, load_policy, refusal
from dermaflow.learning import optimisation

APP = "ab" * 32
OPEN = Policy(
    approved_apps=[APP], allowed_strategies=["fedavg"], allowed_scopes=["head", "all"], max_rounds=20,
    min_images_per_class=5, max_epsilon=8,
)  # fmt: skip
RUN: dict[str, Any] = {
    "strategy": "fedavg", "scope": "head", "round": 3, "rounds": 20, "epsilon": 4.0,
    "class_counts": {"mel": 5, "df": 0}, "now": datetime(2026, 5, 4, 22, 30),
}  # fmt: skip


def test_scopes_are_those_of_training() -> None:
    assert get_args(Scope) == get_args(optimisation.Scope)


def test_what_is_allowed_is_not_refused() -> None:
    assert refusal(OPEN, **RUN) is None
    assert app_refusal(OPEN, APP) is None


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"strategy": "krum"}, "strategy krum"),
        ({"scope": "last_block"}, "scope last_block"),
        ({"rounds": 21}, "21 rounds"),
        ({"round": 30}, "30 rounds"),
        ({"epsilon": None}, "demands differential privacy"),
        ({"epsilon": 8.5}, "epsilon 8.5"),
        ({"class_counts": {"mel": 4, "nv": 100}}, "too few images of mel"),
    ],
)
def test_each_field_refuses(asked: dict[str, Any], reason: str) -> None:
    found = refusal(OPEN, **RUN | asked)
    assert found is not None and reason in found and "\n" not in found


def test_a_reason_names_no_count_of_the_site() -> None:
    found = refusal(OPEN, **RUN | {"class_counts": {"mel": 3}})
    assert found is not None and "3" not in found and "5" not in found


@pytest.mark.parametrize(
    ("hours", "at", "allowed"),
    [
        (("20:00", "06:00"), 22, True), (("20:00", "06:00"), 3, True), (("20:00", "06:00"), 6, False),
        (("20:00", "06:00"), 12, False), (("08:00", "18:00"), 8, True), (("08:00", "18:00"), 18, False),
    ],
)  # fmt: skip
def test_hours(hours: tuple[str, str], at: int, allowed: bool) -> None:
    policy = OPEN.model_copy(update={"hours": Policy(hours={"start": hours[0], "end": hours[1]}).hours})
    found = refusal(policy, **RUN | {"now": datetime(2026, 5, 4, at)})
    assert (found is None) == allowed


def test_the_defaults_let_nobody_do_anything() -> None:
    assert refusal(Policy(), **RUN) is not None
    assert app_refusal(Policy(), APP) is not None


def test_the_template_is_a_policy_that_approves_no_app(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(TEMPLATE)
    policy = load_policy(tmp_path)
    assert policy.approved_apps == [] and refusal(policy, **RUN) is None
    shown = yaml.safe_load(TEMPLATE.replace("# hours", "hours").replace("# max_epsilon", "max_epsilon"))
    assert Policy.model_validate(shown).max_epsilon == 8


def test_approving_keeps_comments_and_happens_once(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(TEMPLATE)
    assert approve(tmp_path, APP.upper(), "2026-05-04, by JD")
    assert approve(tmp_path, "cd" * 32, "")
    assert not approve(tmp_path, APP, "again")
    text = (tmp_path / NAME).read_text()
    assert load_policy(tmp_path).approved_apps == ["cd" * 32, APP]
    assert f"- {APP}  # 2026-05-04, by JD\n" in text and "# Most rounds of a run." in text


@pytest.mark.parametrize("text", [f"approved_apps: [{APP}]\n", "max_rounds: 3\n"])
def test_what_cannot_be_edited_safely_is_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / NAME).write_text(text)
    with pytest.raises(PolicyError, match="by hand"):
        approve(tmp_path, "cd" * 32, "")
    assert (tmp_path / NAME).read_text() == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_round: 3", "max_round"), ("max_rounds: -1", "max_rounds"), ("allowed_scopes: [tail]", "allowed_scopes"),
        ("approved_apps: [abc]", "approved_apps"), ("a: [", "no YAML"), ("- 1", "dictionary"),
    ],
)  # fmt: skip
def test_errors_name_the_field(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / NAME).write_text(text)
    with pytest.raises(PolicyError, match=said):
        load_policy(tmp_path)


def test_no_hash_and_no_policy(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="site init"):
        load_policy(tmp_path)
    (tmp_path / NAME).write_text(TEMPLATE)
    with pytest.raises(PolicyError, match="64 hexadecimal"):
        approve(tmp_path, "abc", "")
