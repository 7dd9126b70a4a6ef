"""Differential privacy in federated runs: what is cut, what is noised, what is written down, what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_here import a_plan, a_recipe, run_here
from flwr.app import Message
from scipy.stats import norm
from tiny_data import tiny_shards

from clients.accountant import NAME, Ledger, LedgerError, Release, epsilon, noise_for
from clients.plan import Order, Plan
from clients.policy import Refused
from clients.privacy import (
    PRODUCTS,
    Budget,
    lesion_noise,
    next_clip,
    noised_mean,
    noisy_sums,
    projection,
    repaired,
)
from clients.result import save_model
from clients.simulation import _own_name, claim
from clients.site import Update
from clients.site_data import SiteData
from dermaflow.bundles.bundle import load_bundle
from dermaflow.errors import FederationError
from dermaflow.learning.backbones import BackboneConfig
from dermaflow.learning.linear_head import class_sums, discriminant_head
from dermaflow.learning.recipe import Recipe
from dermaflow.preparation.reading import labels_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("private"), seed=1)


def small(**optim: Any) -> Recipe:
    return a_recipe(**optim).model_copy(update={"backbone": BackboneConfig(name="seed_cnn", dropout=0.0)})


def release(**changes: Any) -> Release:
    return Release(**{"run": "a", "what": "sums", "unit": "lesion", "noise": 4.0} | changes)


def test_epsilon_holds_against_the_exact_trade_off_of_gaussian_noise() -> None:
    """Balle and Wang, ICML 2018, theorem 8; the Rényi bound may be above it, a little, and never below."""
    for noise in (1.0, 4.0, 10.0):
        found = epsilon([release(noise=noise)], 1e-5)
        exact = norm.cdf(0.5 / noise - found * noise) - np.exp(found) * norm.cdf(-0.5 / noise - found * noise)
        assert exact <= 1e-5
        lower = 0.85 * found
        assert norm.cdf(0.5 / noise - lower * noise) - np.exp(lower) * norm.cdf(-0.5 / noise - lower * noise) > 1e-5
    assert epsilon([release(noise=4.0, steps=16)], 1e-5) == pytest.approx(epsilon([release(noise=1.0)], 1e-5))


def test_noise_is_just_enough_for_an_epsilon() -> None:
    noise = noise_for(2.0, 1e-5, (4.0, 1.0))
    both = [release(noise=4 * noise), release(noise=noise)]
    assert 1.9 < epsilon(both, 1e-5) <= 2.0
    noise = lesion_noise(2.0, 1e-5)
    assert 1.9 < epsilon([release(noise=n * noise) for n in (4, 4, 1)], 1e-5) <= 2.0


def test_what_is_spent_survives_restarts_adds_up_over_runs_and_stops_at_the_limit(tmp_path: Path) -> None:
    one = epsilon([release()], 1e-5)
    assert Ledger(tmp_path).spend(release(), 1e-5, 1.5) == one
    before = (tmp_path / NAME).read_bytes()
    with pytest.raises(Refused, match=r"epsilon would be 1\.\d\d at delta 1e-05, over all runs; expected at most 1.2"):
        Ledger(tmp_path).spend(release(run="b"), 1e-5, 1.2)
    assert (tmp_path / NAME).read_bytes() == before
    both = Ledger(tmp_path).spend(release(run="b"), 1e-5, 1.5)
    assert one < both < 2 * one and [item.run for item in Ledger(tmp_path).releases()] == ["a", "b"]
    (tmp_path / NAME).write_bytes(before[:-9])
    with pytest.raises(LedgerError, match="cannot be read"):
        Ledger(tmp_path).spend(release(), 1e-5, None)


def test_noise_on_sums_covers_what_one_lesion_changes() -> None:
    """Length of a lesion's part of sums and products together, in units of their noise, is 1 / noise at most."""
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(50, 12)) * 3, rng.integers(0, 7, 50)
    clip, directions, noise = 2.0, 4, 1.5
    drawn = [noisy_sums(features, labels, clip, directions, noise, 0) for _ in range(400)]
    onto = projection(12, directions, 0)
    short = features @ onto.T
    clip *= np.sqrt(directions / 12)
    short *= np.minimum(1, clip / np.linalg.norm(short, axis=1, keepdims=True))
    exact = class_sums(short, labels)
    of_sums = np.array([d.sums @ onto.T for d in drawn]) - exact.sums
    of_products = np.array([onto @ d.products @ onto.T for d in drawn]) - exact.products
    off = np.triu_indices(directions, 1)
    sd = of_sums.std(), np.diagonal(of_products, axis1=1, axis2=2).std(), of_products[:, off[0], off[1]].std()
    assert sd[2] == pytest.approx(sd[1] / np.sqrt(2), rel=0.1)
    # the most that one lesion changes: its feature `clip` long, its outer product `clip` squared
    assert 1 / np.hypot(clip / sd[0], clip**2 / sd[1]) == pytest.approx(noise, rel=0.05)
    assert abs(of_sums.mean()) < 0.2 and np.allclose(of_products, of_products.transpose(0, 2, 1))
    assert sd[1] / sd[0] == pytest.approx(clip / PRODUCTS, rel=0.1)


def test_sums_without_noise_give_the_head_of_the_projected_features() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 7, 400)
    features = rng.normal(size=(7, 10))[labels] * 2 + rng.normal(size=(400, 10))
    sums = noisy_sums(features, labels, 1e3, 10, 1e-9, 0)
    weight, bias = discriminant_head(repaired(sums))
    plain, plain_bias = discriminant_head(class_sums(features, labels))
    assert np.allclose(weight, plain, atol=1e-4) and np.allclose(bias, plain_bias, atol=1e-3)


def test_no_direction_of_repaired_sums_has_a_negative_variance() -> None:
    rng = np.random.default_rng(2)
    found = repaired(noisy_sums(rng.normal(size=(30, 12)), rng.integers(0, 7, 30), 1.0, 6, 5.0, 0))
    means = found.sums / found.counts[:, None]
    within = found.products - (means * found.counts[:, None]).T @ means
    assert (
        np.linalg.eigvalsh(within).min() > -1e-6 * np.abs(within).max() - 1e-12
    )  # rounding of sums that are all but zero


def an_update(length: float, size: int = 10_000) -> Update:
    delta = np.zeros(size, np.float32)
    delta[0] = length
    return Update(delta, np.zeros(0, np.float32), None, {"images": 9.0, "loss": 1.0, "seconds": 2.0}, None)


def an_order(**changes: Any) -> Order:
    start: dict[str, Any] = {
        "run": "x", "round": 1, "rounds": 2, "strategy": "fedavg", "recipe": a_recipe(), "scope": "head",
    }  # fmt: skip
    return Order(**start | changes)


def test_updates_are_cut_and_noised_and_the_length_follows_them() -> None:
    order = an_order(noise=0.5, clip=2.0)
    found = noised_mean([an_update(100.0), an_update(1.0), an_update(-100.0), an_update(1.5)], order)
    of_updates = (0.5**-2 - (2 * 0.5) ** -2) ** -0.5  # the count's share of the budget is theirs no more
    assert found.delta[1:].std() == pytest.approx(of_updates * 2.0 / 4, rel=0.05)
    assert abs(found.delta[0] - 2.5 / 4) < 5 * of_updates * 2.0 / 4
    assert set(found.figures) == {"images", "seconds", "clipped"} and found.figures["images"] == 1.0
    clip, lengths = 0.01, np.array([1.0, 2.0, 4.0, 8.0])
    for _ in range(200):
        clip = next_clip(clip, float((lengths > clip).mean()))
    assert 2.0 <= clip <= 4.0


def test_a_head_from_noised_sums_is_paid_once_and_nothing_exact_leaves(shards: Path, tmp_path: Path) -> None:
    exact: list[Message] = []

    def watch(node: str, asked: Message, reply: Message) -> Message:
        if asked.metadata.message_type not in ("query.describe", "query.centre", "query.class_sums", "query.evaluate"):
            exact.append(asked)
        return reply

    choices = {"rounds": 0, "scope": "head", "head": "statistics", "dp": "lesion", "epsilon": 3.0, "recipe": small()}
    plan = a_plan(shards, tmp_path, **choices)
    result, _ = run_here(plan, spoil=watch)
    assert not exact and result["calibration"] is None
    assert result["privacy"]["epsilon"] == 3.0 and result["privacy"]["unit"] == "one lesion of one site"
    ledgers = [Ledger(tmp_path / "sites" / name).releases() for name in result["training_sites"]]
    for releases in ledgers:
        assert [item.what for item in releases] == ["counts", "centre", "sums of features"]
        assert 2.9 < epsilon(releases, 1e-5) <= 3.0
    first = (tmp_path / "weights.safetensors").read_bytes()
    (tmp_path / "result.json").unlink()
    again, _ = run_here(plan)  # cut off and repeated: what was released is given again, and costs nothing
    assert (tmp_path / "weights.safetensors").read_bytes() == first and again["counts"] == result["counts"]
    assert [Ledger(tmp_path / "sites" / name).releases() for name in result["training_sites"]] == ledgers
    bundle = load_bundle(save_model(plan)).bundle
    assert bundle.calibration is None and sum(bundle.train_priors) == pytest.approx(1)
    assert "epsilon 3.00 at delta 1e-05" in (tmp_path / "model/card.md").read_text()


def test_noised_sums_add_up_under_secure_aggregation(shards: Path, tmp_path: Path) -> None:
    """With next to no noise the counts are those of the lesions, not of the images."""
    choices = {
        "rounds": 0,
        "scope": "head",
        "head": "statistics",
        "recipe": small(),
        "resamples": 1,
        "loss": "adjusted",
    }
    private = {"dp": "lesion", "epsilon": 1e6, "clip": 1e3, "directions": 128, "secure": True}
    result, grid = run_here(a_plan(shards, tmp_path, **choices | private))
    assert [kind for kind, _, _ in grid.sent].count("query.secure_reveal") == 8  # centre and sums, four sites
    lesions = SiteData("all", str(shards)).metadata("train").drop_duplicates("lesion_id")
    counted = np.sum(list(result["counts"].values()), axis=0)
    assert counted.tolist() == np.bincount(labels_of(lesions["dx"]), minlength=7).tolist()


@pytest.mark.parametrize(("dp", "secure"), [("site", False), ("site", True), ("central", False)])
def test_a_whole_site_is_hidden_by_its_own_noise_or_the_coordinators(
    shards: Path, tmp_path: Path, dp: str, secure: bool
) -> None:
    choices = {"rounds": 2, "scope": "head", "dp": dp, "secure": secure, "noise": 2.0, "only": "rosendahl,vienna_dias"}
    result, _ = run_here(a_plan(shards, tmp_path, recipe=small(), **choices))
    every = epsilon([release(unit="site", noise=2.0, steps=2)], 1e-5)
    assert result["privacy"]["epsilon"] == every and result["privacy"]["unit"] == "all images of one site"
    assert (result["calibration"] is None) == (dp == "site")
    spent = Ledger(tmp_path / "sites" / "rosendahl").releases()
    assert [item.unit for item in spent] == (["site", "site"] if dp == "site" else [])


def test_a_limit_at_the_site_stops_a_run_that_would_pass_it(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import clients.client_app as site_app

    monkeypatch.setattr(site_app, "_budget", lambda site, _: Budget(Ledger(site.memory.site_folder), 1e-5, 4.2))
    choices = {"rounds": 0, "scope": "head", "head": "statistics", "dp": "lesion", "recipe": small(), "min_sites": 4}
    run_here(a_plan(shards, tmp_path, name="first", **choices))
    (tmp_path / "result.json").unlink()
    before = Ledger(tmp_path / "sites/rosendahl").releases()
    # another run over the same lesions: its counts still fit, its sums do not
    with pytest.raises(FederationError, match="0 sites answered"):
        run_here(a_plan(shards, tmp_path, name="second", **choices))
    after = Ledger(tmp_path / "sites/rosendahl").releases()
    assert after[: len(before)] == before and epsilon(after, 1e-5) <= 4.2
    assert "sums of features" not in [item.what for item in after if item.run == "second"]


def test_what_was_released_for_one_epsilon_is_not_given_for_another(shards: Path, tmp_path: Path) -> None:
    """The result would state the guarantee that was asked for, not the one that was paid."""
    choices = {"rounds": 0, "scope": "head", "head": "statistics", "dp": "lesion", "recipe": small()}
    run_here(a_plan(shards, tmp_path, epsilon=8.0, **choices))
    for name in ("plan.json", "result.json"):  # as someone does who begins anew, but the sites remember
        (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(FederationError, match="began here with other choices or other images"):
        run_here(a_plan(shards, tmp_path, epsilon=1.0, **choices))


def test_a_run_has_a_name_of_its_own_until_its_folder_is_removed(tmp_path: Path) -> None:
    """Sites would know a run in the same folder for the one before."""
    names = [_own_name(tmp_path) for _ in range(2)]
    assert names[0] != names[1]
    plan = Plan(recipe=small().model_dump_json(), out=str(tmp_path), name=names[0])
    claim(plan)
    assert _own_name(tmp_path) == names[0]


def test_runs_at_the_same_time_lose_no_release(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from clients.accountant import Ledger, Release\n"
        "for i in range(20): Ledger(Path(sys.argv[1])).spend("
        "Release(run=sys.argv[2], what=str(i), unit='lesion', noise=40.0), 1e-5, None)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program, tmp_path, name]) for name in "ab"]
    assert [process.wait(120) for process in processes] == [0, 0]
    found = [(release.run, release.what) for release in Ledger(tmp_path).releases()]
    assert sorted(found) == sorted((name, str(i)) for name in "ab" for i in range(20))


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"dp": "lesion"}, "scope=head"),
        ({"dp": "lesion", "scope": "head", "head": "statistics", "rounds": 3}, "rounds=0"),
        ({"dp": "lesion", "scope": "head", "head": "new"}, "head=statistics"),
        ({"dp": "site"}, "running statistics"),
        ({"dp": "central", "norm": "local"}, "running statistics"),
        ({"dp": "central", "scope": "head", "secure": True}, "each site's update"),
        ({"dp": "central", "scope": "head", "strategy": "krum"}, "fedavg"),
        ({"dp": "site", "scope": "head", "head": "statistics"}, "dp=lesion"),
        ({"rounds": 0}, "nothing is learnt"),
    ],
)
def test_a_plan_that_would_promise_too_much_is_refused(choices: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Plan(recipe="", out="", **choices)
