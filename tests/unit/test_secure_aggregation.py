"""Secure sums: exact, also without a site that was lost, and nothing to be seen in what one site sends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_here import SITES, a_plan, a_recipe, run_here, weights
from flwr.app import Array, ConfigRecord, Message
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from tiny_data import tiny_shards

from clients.masking import (
    Keys,
    Party,
    add_masks,
    from_fixed,
    is_mask_key,
    more_than_half,
    recover,
    step,
    to_fixed,
    unmask,
)
from clients.plan import Plan
from clients.policy import Policy, Refused, refusal
from dermaflow.errors import FederationError, RecipeError
from dermaflow.learning.backbones import BackboneConfig
from dermaflow.learning.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("secure"), seed=1)


def begun(sites: int, threshold: int | None = None) -> tuple[dict[int, Party], dict[int, Keys]]:
    """Parties that have each other's shares."""
    nodes = [7 * number + 2**40 for number in range(1, sites + 1)]
    made = {node: Party.new("a sum", node) for node in nodes}
    parties, keys = {n: p for n, (p, _) in made.items()}, {n: k for n, (_, k) in made.items()}
    sealed = {n: p.make_shares(keys, threshold or more_than_half(sites)) for n, p in parties.items()}
    for node, party in parties.items():
        party.take_shares({source: texts[node] for source, texts in sealed.items() if source != node})
    return parties, keys


def some(seed: int, size: int = 500) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"delta": rng.normal(size=size), "norm": rng.exponential(1e4, size=(3, 4))}


def whole(arrays: dict[str, np.ndarray], sites: int) -> dict[str, np.ndarray]:
    return {name: to_fixed(array, sites, 8.0 if name == "delta" else 0.0) for name, array in arrays.items()}


@pytest.mark.parametrize(("sites", "lost"), [(2, []), (5, []), (5, [1, 4]), (4, [0])])
def test_the_sum_is_exact_without_the_sites_that_were_lost(sites: int, lost: list[int]) -> None:
    parties, keys = begun(sites)
    numbers = {node: some(number) for number, node in enumerate(parties)}
    gone = {list(parties)[number] for number in lost}
    active = set(parties) - gone
    masked = {node: parties[node].mask(whole(numbers[node], sites)) for node in active}
    totals = {
        name: np.sum([m[name] for m in masked.values()], axis=0, dtype=d)
        for name, d in (("delta", np.uint32), ("norm", np.uint64))
    }
    revealed = {node: parties[node].reveal(active, gone) for node in active}
    secrets = {n: combine_shares([shares[n] for shares in revealed.values()][: more_than_half(sites)]) for n in parties}
    found = unmask(totals, active, gone, keys, secrets)
    for name, limit in (("delta", 8.0), ("norm", 0.0)):
        exact = sum(numbers[node][name] for node in active)
        off = np.abs(from_fixed(found[name], sites, limit) - exact).max()
        assert off <= (len(active) * step(sites, limit) / 2 if limit else 1e-10)
    assert step(sites, 8.0) < 1e-7


def test_a_masked_answer_is_uniform_and_tells_nothing_of_the_update() -> None:
    """Of one update under two maskings, and of two updates under one, nothing alike is left."""
    size = 40_000
    update = {"delta": np.full(size, 0.25)}
    sent = [next(iter(begun(3)[0].values())).mask(whole(update, 3))["delta"] for _ in range(2)]
    other = next(iter(begun(3)[0].values())).mask(whole({"delta": np.full(size, -7.0)}, 3))["delta"]
    for numbers in (*sent, other, sent[0] - sent[1], sent[0] - other):
        counts = np.histogram(numbers, bins=64, range=(0, 2**32))[0]
        assert ((counts - size / 64) ** 2 / (size / 64)).sum() < 130  # chi-square of 63 degrees: 1 in 10^6 is above
        assert len(np.unique(numbers)) > 0.99 * size
    noise = np.random.default_rng(0).normal(size=size)
    varied = next(iter(begun(3)[0].values())).mask(whole({"delta": noise}, 3))["delta"]
    assert abs(np.corrcoef(varied.view(np.int32), noise)[0, 1]) < 0.03


def test_masks_differ_from_sum_to_sum_and_need_every_bit_of_the_key() -> None:
    zeros = {"x": np.zeros(100, np.uint64)}
    key = bytes(range(32))
    first = add_masks(zeros, [key], [])["x"]
    # Flower's generator gives these two keys the same mask: it folds them into 32 bits
    folded = add_masks(zeros, [key[4:8] + key[:4] + key[8:]], [])["x"]
    assert not (first == folded).any()
    assert not add_masks({"x": first}, [], [key])["x"].any()


def test_a_site_reveals_only_what_cannot_show_one_site() -> None:
    parties, _ = begun(4)
    nodes = list(parties)
    party = parties[nodes[0]]
    party.mask(whole(some(0), 4))
    with pytest.raises(Refused, match="not at that point"):
        party.mask(whole(some(0), 4))  # the same masks twice would show the difference
    for active, lost in ((nodes, nodes[3:]), (nodes[:3], []), (nodes[1:], nodes[:1])):
        with pytest.raises(Refused, match="not those that began it"):
            party.reveal(active, lost)
    with pytest.raises(Refused, match="2 sites answered"):
        party.reveal(nodes[:2], nodes[2:])
    assert set(party.reveal(nodes[:3], nodes[3:])) == set(nodes)


@pytest.mark.parametrize("threshold", [1, 2, 5])
def test_a_site_refuses_a_threshold_that_half_of_the_sites_could_reach(threshold: int) -> None:
    with pytest.raises(Refused, match="threshold"):
        begun(4, threshold)


def test_a_site_refuses_keys_that_are_not_its_own_and_shares_that_were_changed() -> None:
    made = {node: Party.new("a sum", node) for node in (1, 2, 3)}
    keys = {node: pair for node, (_, pair) in made.items()}
    with pytest.raises(Refused, match="keys"):
        made[1][0].make_shares(keys | {1: Party.new("a sum", 1)[1]}, 2)
    sealed = {node: party.make_shares(keys, 2) for node, (party, _) in made.items()}
    with pytest.raises(Refused, match="cannot be opened"):
        made[1][0].take_shares({2: sealed[2][1][:-9] + b"AAAAAAAA="})
    with pytest.raises(Refused, match="cannot be opened"):
        made[1][0].take_shares({2: sealed[2][3]})


def test_a_forged_share_is_found_out_where_enough_others_fit() -> None:
    parties, keys = begun(5)
    nodes = list(parties)
    for party in parties.values():
        party.mask(whole(some(0), 5))
    revealed = {node: parties[node].reveal(nodes[:4], nodes[4:]) for node in nodes[:4]}
    for lost, fits in (
        (nodes[0], lambda s: s == parties[nodes[0]].seed),
        (nodes[4], lambda s: is_mask_key(s, keys[nodes[4]][0])),
    ):
        shares = {node: found[lost] for node, found in revealed.items()}
        secret, liars = recover(shares, 3, fits)
        assert secret is not None and not liars
        forged = shares | {nodes[1]: bytes(len(shares[nodes[1]]))}
        assert recover(forged, 3, fits) == (secret, {nodes[1]})
        assert recover(forged | {nodes[2]: b"none"}, 3, fits) == (None, set())


def test_numbers_that_do_not_fit_are_refused_and_not_clipped() -> None:
    for bad in (9.0, -8.0, np.nan, np.inf):
        with pytest.raises(Refused, match="secure_range"):
            to_fixed(np.array([0.0, bad]), 4, 8.0)


def nearest(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    return max(float(np.abs(a[name] - b[name]).max()) for name in a if a[name].dtype == np.float32)


def small(**optim: Any) -> Recipe:
    """Without normalisation layers, and quick."""
    return a_recipe(**optim).model_copy(update={"backbone": BackboneConfig(name="seed_cnn", dropout=0.0)})


def losing(site: str, kind: str) -> Callable[[str, Message, Message], Message]:
    """The site falls silent at a kind of message."""

    def spoil(node: str, asked: Message, reply: Message) -> Message:
        if node == site and asked.metadata.message_type == kind:
            raise RuntimeError("power cut")
        return reply

    return spoil


def test_a_secure_run_is_the_plain_run_and_shows_no_site_alone(shards: Path, tmp_path: Path) -> None:
    """Weights, statistics of normalisation layers with their variances, calibration: all of it."""
    sent: list[np.ndarray] = []

    def watch(node: str, asked: Message, reply: Message) -> Message:
        kind = asked.metadata.message_type
        if kind in ("train", "query.class_sums", "query.scaling_sums", "query.calibration_counts"):
            for array in reply.content.array_records["arrays"].values():
                assert array.numpy().dtype in (np.uint32, np.uint64)
                sent.append(array.numpy())
            assert "loss" not in reply.content.metric_records["metrics"]
        return reply

    choices = {"rounds": 1, "only": "rosendahl,vienna_dias"}
    plain, _ = run_here(a_plan(shards, tmp_path / "plain", **choices))
    secure, grid = run_here(a_plan(shards, tmp_path / "secure", secure=True, **choices), spoil=watch)
    before, after = weights(tmp_path / "plain"), weights(tmp_path / "secure")
    largest = max(float(np.abs(array).max()) for name, array in after.items() if "running" not in name)
    rounding = 2 * step(2, 8.0) + 4 * largest * np.finfo(np.float32).eps
    for name, array in after.items():
        assert np.allclose(array, before[name], rtol=1e-5, atol=rounding), name
    assert sent
    assert secure["calibration"]["temperature"] == pytest.approx(plain["calibration"]["temperature"], rel=1e-2)
    for a, b in zip(plain["rounds"], secure["rounds"], strict=True):
        images = {name: site["images"] for name, site in a["sites"].items()}
        assert images == {name: site["images"] for name, site in b["sites"].items()}
        mean = sum(site["loss"] * site["images"] for site in a["sites"].values()) / sum(images.values())
        assert b["sites"]["rosendahl"]["loss"] == pytest.approx(mean, rel=1e-3)
        assert np.sum(a["confusion"]) == np.sum(b["confusion"])
    assert [kind for kind, _, _ in grid.sent].count("query.secure_reveal") >= 2 * 4
    assert len(secure["rounds"]) == 1 and "loss" in secure["rounds"][0]["sites"]["vienna_dias"]


def test_the_head_from_secure_sums_is_that_from_plain_sums(shards: Path, tmp_path: Path) -> None:
    """Exact whatever the scale of the features; these are of random weights, and small."""
    choices = {"rounds": 1, "scope": "head", "head": "statistics", "recipe": small(head_lr=1e-12)}
    for secure in (False, True):
        run_here(a_plan(shards, tmp_path / str(secure), secure=secure, **choices))
    plain, secure_head = (weights(tmp_path / str(secure))["head.weight"] for secure in (False, True))
    assert np.abs(plain - secure_head).max() < 1e-5 * np.abs(plain).max() > 0


@pytest.mark.parametrize("kind", ["query.secure_shares", "train", "query.secure_reveal"])
def test_a_site_that_is_lost_in_a_leg_leaves_the_sum_of_the_others(shards: Path, tmp_path: Path, kind: str) -> None:
    others = "" if kind.endswith("reveal") else "rosendahl,vidir_molemax,vienna_dias"
    choices = {"rounds": 1, "recipe": small()}
    run_here(a_plan(shards, tmp_path / "plain", only=others, **choices))
    result, _ = run_here(a_plan(shards, tmp_path / "secure", secure=True, **choices), spoil=losing("101", kind))
    assert nearest(weights(tmp_path / "plain"), weights(tmp_path / "secure")) < 1e-6
    record = result["rounds"][0]
    if kind.endswith("reveal"):  # its update is in the sum
        assert sorted(record["sites"]) == SITES and not record["failed"]
    else:
        assert "power cut" in record["failed"]["vidir_modern"] and "vidir_modern" not in record["sites"]


def _no_keys(reply: Message) -> None:
    reply.content.config_records["secure"]["keys"] = [b"none", b"at all"]


def _one_key(reply: Message) -> None:
    reply.content.config_records["secure"] = ConfigRecord(
        {"keys": [reply.content.config_records["secure"]["keys"][0]] * 2}
    )


def _few_shares(reply: Message) -> None:
    record = reply.content.config_records["secure"]
    record["nodes"], record["sealed"] = record["nodes"][:1], record["sealed"][:1]


def _nothing(reply: Message) -> None:
    del reply.content.config_records["secure"]


def _short(reply: Message) -> None:
    reply.content.array_records["arrays"]["delta"] = Array(np.zeros(3, np.uint32))


def _many_images(reply: Message) -> None:
    reply.content.metric_records["metrics"]["images"] = 1e9


def _no_images(reply: Message) -> None:
    del reply.content.metric_records["metrics"]["images"]


def _forged(reply: Message) -> None:
    record = reply.content.config_records["secure"]
    record["shares"] = [bytes(len(share)) for share in record["shares"]]


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("query.secure_keys", _no_keys, "refused: what it calls keys are none"),
        ("query.secure_keys", _one_key, "refused: another site offered the same key"),
        ("query.secure_shares", _few_shares, "refused: its sealed are not one for each site"),
        ("query.secure_shares", _nothing, "refused: 'secure'"),
        ("train", _short, "refused: its arrays differ from the others'"),
        ("train", _many_images, "refused: it counts 1e+09 images"),
        ("train", _no_images, "refused: the answer does not say how many images it counts for"),
        ("query.secure_reveal", _forged, "its shares are forged; its answer is in the sum"),
    ],
)
def test_a_site_that_sends_nonsense_in_a_leg_is_named_and_the_others_go_on(
    shards: Path, tmp_path: Path, kind: str, change: Callable[[Message], None], says: str
) -> None:
    def spoil(node: str, asked: Message, reply: Message) -> Message:
        if node == "100" and asked.metadata.message_type == kind and asked.metadata.group_id == "1":
            change(reply)
        return reply

    others = "" if kind.endswith("reveal") else ",".join(SITES[1:])
    choices = {"rounds": 1, "recipe": small()}
    run_here(a_plan(shards, tmp_path / "plain", only=others, **choices))
    result, _ = run_here(a_plan(shards, tmp_path / "secure", secure=True, **choices), spoil=spoil)
    assert nearest(weights(tmp_path / "plain"), weights(tmp_path / "secure")) < 1e-6
    assert result["rounds"][0]["failed"][SITES[0]].startswith(says)


def test_shares_that_do_not_bring_a_secret_back_end_the_run(shards: Path, tmp_path: Path) -> None:
    """And never give a model out of noise."""

    def spoil(node: str, asked: Message, reply: Message) -> Message:
        if node in ("100", "101") and asked.metadata.message_type == "query.secure_reveal":
            _forged(reply)
        return reply

    plan = a_plan(shards, tmp_path, rounds=1, recipe=small(), secure=True)
    with pytest.raises(FederationError, match="shares of the secret of rosendahl from 4 sites too many are forged"):
        run_here(plan, spoil=spoil)


def test_too_few_sites_for_the_threshold_stop_the_run(shards: Path, tmp_path: Path) -> None:
    plan = a_plan(shards, tmp_path, rounds=1, recipe=small(), secure=True, secure_threshold=4)
    with pytest.raises(FederationError, match=r"3 of 4 sites answered.*vidir_modern.*power cut"):
        run_here(plan, spoil=losing("101", "train"))


def test_secure_aggregation_goes_with_strategies_that_need_sums_only() -> None:
    for strategy in ("krum", "median", "trimmed_mean", "scaffold"):
        with pytest.raises(ValueError, match="needs each site's update"):
            Plan(recipe="", out="", secure=True, strategy=strategy)
    with pytest.raises(ValueError, match="precision"):
        Plan(recipe="", out="", secure=True, precision="bfloat16")


def test_a_site_can_insist_on_secure_aggregation() -> None:
    from datetime import datetime

    policy = Policy(allowed_strategies=["fedavg"], allowed_scopes=["head"], max_rounds=9, secure_only=True)
    asked: dict[str, Any] = {
        "strategy": "fedavg", "scope": "head", "round": 1, "rounds": 2, "epsilon": None, "class_counts": {},
        "now": datetime(2026, 1, 1),
    }  # fmt: skip
    assert "secure=true" in str(refusal(policy, secure=False, **asked))
    assert refusal(policy, secure=True, **asked) is None


def test_choices_that_do_not_go_together_are_told_in_one_sentence(shards: Path) -> None:
    from clients.result import make_plan

    choices = {"shards": str(shards), "out": "x", "strategy": "krum"}
    with pytest.raises(RecipeError, match=r"^--set: strategy krum needs each site's update"):
        make_plan(choices, "demo", None, ["secure=true"], [], real=False)
