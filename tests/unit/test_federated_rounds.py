"""A federated run in this process: what is trained, merged, refused, remembered and resumed."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation_here import SITES, a_plan, a_recipe, run_here, weights
from flwr.app import Array, Message
from safetensors.numpy import load_file
from tiny_data import draw, encode, image_files, noise, prepare_here, tiny_shards

from clients.coordinator import network_of_result
from clients.memory import Memory
from clients.partition import site_of_lesions
from clients.plan import Order, Plan
from clients.result import make_plan, save_model
from clients.rounds import SiteRounds
from clients.simulation import claim
from clients.site import Correction, Layouts, Model, Site, local_recipe, part_of_epoch
from clients.site_data import SiteData, simulated_sites
from clients.wire import layout_of, pack
from dermaflow.bundles.bundle import load_bundle
from dermaflow.errors import CheckpointError, RecipeError
from dermaflow.learning.backbones import build
from dermaflow.learning.inference import predict
from dermaflow.learning.linear_head import SCALES, discriminant_head
from dermaflow.learning.local import memory_feed
from dermaflow.preparation.balancing import BalanceConfig, balance
from dermaflow.schemas.bundle import Copies
from dermaflow.taxonomy import CODES
from dermaflow.trust.ood import ood_score
from dermaflow.trust.temperature import fit_temperature_and_bias

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("federation"), seed=1)


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray], tolerance: float = 0.0) -> bool:
    return all(np.allclose(a[name], b[name], rtol=0, atol=tolerance) for name in a)


def test_natural_sites_have_every_image_once(shards: Path) -> None:
    assert simulated_sites(str(shards), "natural") == SITES
    parts = [SiteData(name, str(shards), "natural") for name in SITES]
    whole = SiteData("all", str(shards))
    for split in ("train", "calibration", "test"):
        ids = [i for part in parts for i in part.metadata(split)["image_id"]]
        assert sorted(ids) == sorted(whole.metadata(split)["image_id"])
        labels = np.concatenate([part.labels(split) for part in parts])
        assert np.bincount(labels, minlength=7).tolist() == whole.counts()[split]
    part = parts[2]
    assert len(part.pixels("train", 24, 32)) == len(part.labels("train")) > 0


@pytest.mark.parametrize("partition", ["iid:3", "dirichlet:0.3:5"])
def test_drawn_sites_keep_lesions_together(shards: Path, partition: str) -> None:
    frame = SiteData("all", str(shards)).metadata("train")
    sites = site_of_lesions(partition, frame, 0)
    assert sites.groupby(frame["lesion_id"]).nunique().max() == 1
    assert (
        sites.tolist() == site_of_lesions(partition, frame, 0).tolist() != site_of_lesions(partition, frame, 1).tolist()
    )


def test_the_app_that_travels_knows_every_key_of_a_plan() -> None:
    app = tomllib.loads(Path("clients/app/pyproject.toml").read_text())
    config = app["tool"]["flwr"]["app"]["config"]
    plan = Plan(recipe="", out="")
    assert config == plan.run_config()
    assert Plan.from_run_config(config) == plan
    assert all(type(config[key]) is type(value) for key, value in plan.run_config().items())


def test_one_site_is_plain_training(shards: Path, tmp_path: Path) -> None:
    """The model after a round of one site is the network that the site trained, buffers and all."""
    plan = a_plan(shards, tmp_path / "out", rounds=1, only="vidir_modern", decay="none")
    run_here(plan)
    order = Order(
        run="x", round=1, rounds=1, strategy="fedavg", scope="all", seed=0,
        recipe=a_recipe().model_copy(update={"seed": 0}),
    )  # fmt: skip
    torch.manual_seed(0)
    start = build(a_recipe().backbone)
    tensors, layouts = start.state_dict(), Layouts.of(order)
    model = Model(*(pack(tensors, layout) for layout in (layouts.weights, layouts.norm, layouts.rest)))
    site = Site(SiteData("vidir_modern", str(shards), "natural"), Memory(tmp_path / "m", "x"))
    update = site.train(order, model)
    assert np.abs(update.delta).max() > 0
    after = weights(tmp_path / "out")
    assert np.array_equal(pack({k: torch.from_numpy(v) for k, v in after.items()}, layouts.norm), update.norm)
    moved = pack({k: torch.from_numpy(v) for k, v in after.items()}, layouts.weights)
    assert np.allclose(moved, model.weights + update.delta, atol=1e-7)
    assert not np.allclose(after["head.weight"], tensors["head.weight"].numpy(), atol=1e-6)


def test_averaging_weighs_sites_by_their_images(shards: Path, tmp_path: Path) -> None:
    updates: dict[str, tuple[np.ndarray, float]] = {}

    def watch(node: str, asked: Message, reply: Message) -> Message:
        if asked.metadata.message_type == "train":
            images = float(reply.content.metric_records["metrics"]["images"])  # type: ignore[arg-type]
            updates[node] = reply.content.array_records["arrays"]["delta"].numpy(), images
        return reply

    result, _ = run_here(a_plan(shards, tmp_path, rounds=1), spoil=watch)
    torch.manual_seed(0)
    start = build(a_recipe().backbone)
    layout = layout_of(start, "all")
    mean = sum(delta * images for delta, images in updates.values()) / sum(images for _, images in updates.values())
    found = pack({k: torch.from_numpy(v) for k, v in weights(tmp_path).items()}, layout)
    assert np.allclose(found, pack(start.state_dict(), layout) + mean, atol=1e-6)
    assert result["training_sites"] == SITES == sorted(result["rounds"][0]["sites"])
    test = SiteData("all", str(shards)).counts()["test"]
    confusion = sum(np.array(site["confusion"]) for site in result["sites"].values())
    assert confusion.sum(1).tolist() == test
    hits = sum(np.array(site["hits"]) for site in result["sites"].values())
    totals = sum(np.array(site["totals"]) for site in result["sites"].values())
    assert hits.shape == (20, 7) and (hits <= totals).all() and totals.sum() > 0


@pytest.mark.parametrize("secure", [False, True])
def test_each_step_can_count_the_same_whichever_site_takes_it(shards: Path, tmp_path: Path, secure: bool) -> None:
    """With tau_i steps and a share p_i of the images, the model moves by sum(p tau) * sum(p_i delta_i / tau_i)."""
    run_here(a_plan(shards, tmp_path / "out", rounds=1, weigh="steps", secure=secure, decay="none"))
    recipe = a_recipe().model_copy(update={"seed": 0})
    torch.manual_seed(0)
    start = build(recipe.backbone)
    counts = sum(np.array(SiteData(site, str(shards), "natural").counts()["train"]) for site in SITES).tolist()
    order = Order(run="x", round=1, rounds=1, strategy="fedavg", scope="all", seed=0, recipe=recipe, counts=counts)
    layouts = Layouts.of(order)
    model = Model(*(pack(start.state_dict(), part) for part in (layouts.weights, layouts.norm, layouts.rest)))
    images, steps, deltas = [], [], []
    for site in SITES:
        data = SiteData(site, str(shards), "natural")
        images.append(len(data.labels("train")))
        steps.append(max(1, images[-1] // recipe.optim.batch_size))
        deltas.append(Site(data, Memory(tmp_path / site, "x")).train(order, model).delta)
    share = np.array(images) / sum(images)
    assert len(set(steps)) > 2
    wanted = share @ steps * sum(p * delta / tau for p, delta, tau in zip(share, deltas, steps, strict=True))
    moved = (
        pack({k: torch.from_numpy(v) for k, v in weights(tmp_path / "out").items()}, layouts.weights) - model.weights
    )
    assert np.allclose(moved, wanted, rtol=1e-4, atol=1e-6)
    by_images = sum(p * delta for p, delta in zip(share, deltas, strict=True))
    assert not np.allclose(moved, by_images, rtol=1e-2, atol=1e-4)


def test_the_head_of_all_sites_is_the_pooled_head(shards: Path, tmp_path: Path) -> None:
    """Class sums of four sites give, in one exchange, the head that all images together give."""
    plan = a_plan(shards, tmp_path / "a", rounds=1, head="statistics", scope="head")
    plan = plan.model_copy(update={"recipe": a_recipe(head_lr=1e-12).model_dump_json()})
    _, grid = run_here(plan)
    kinds = [kind for kind, _, _ in grid.sent]
    assert kinds[: kinds.index("train")].count("query.class_sums") == 4
    order = Order(run="x", round=0, rounds=1, strategy="fedavg", scope="head", recipe=a_recipe())
    torch.manual_seed(0)
    start = build(a_recipe().backbone)
    layouts = Layouts.of(order)
    model = Model(*(pack(start.state_dict(), layout) for layout in (layouts.weights, layouts.norm, layouts.rest)))
    whole = Site(SiteData("all", str(shards)), Memory(tmp_path / "m", "x"))
    weight, bias = discriminant_head(whole.class_sums(order, model))
    head = {"head.weight": torch.from_numpy(weight), "head.bias": torch.from_numpy(bias)}
    model.weights[:] = pack(head, layouts.weights)
    weight = weight * SCALES[whole.scale_losses(order, model).argmin()]
    found = weights(tmp_path / "a")["head.weight"]
    assert np.abs(found - weight).max() < 1e-5 * np.abs(weight).max()


def test_scaffold_is_the_paper_under_plain_gradient_descent(shards: Path, tmp_path: Path) -> None:
    """The mean gradient that a site saw is option II's c_i - c + (x - y) / (K lr)."""
    recipe = a_recipe()
    torch.manual_seed(0)
    network = build(recipe.backbone)
    layout = layout_of(network, "head")
    order = Order(run="x", round=1, rounds=1, strategy="scaffold", scope="head", recipe=recipe)
    rng, rate, steps = np.random.default_rng(0), 0.1, 4
    control = rng.normal(size=layout.size).astype(np.float32)
    own = rng.normal(size=layout.size).astype(np.float32)
    memory = Memory(tmp_path, "x")
    memory.keep("control-head", control=own)
    correction = Correction(network, layout, order, control, memory)
    parameters = [network.head.weight, network.head.bias]
    before = pack(network.state_dict(), layout)
    for _ in range(steps):
        network.head(torch.randn(5, 1280)).square().sum().backward()
        correction(network)
        with torch.no_grad():
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.sub_(rate * parameter.grad)
                parameter.grad = None
    after = pack(network.state_dict(), layout)
    change = correction.finish()
    assert change is not None
    assert np.allclose(own + change, own - control + (before - after) / (steps * rate), atol=1e-3, rtol=1e-4)
    kept = memory.recall("control-head")
    assert kept is not None and np.allclose(kept["control"], own + change, rtol=1e-5, atol=1e-3)


def test_fedprox_pulls_to_the_received_weights(shards: Path, tmp_path: Path) -> None:
    lengths = []
    for mu in (0.0, 10.0):
        out = tmp_path / str(mu)
        run_here(a_plan(shards, out, rounds=1, only=SITES[1], strategy="fedprox", proximal_mu=mu))
        torch.manual_seed(0)
        start = build(a_recipe().backbone).state_dict()
        lengths.append(
            sum(np.square(v - start[k].numpy()).sum() for k, v in weights(out).items() if "running" not in k)
        )
    assert lengths[1] < lengths[0]


@pytest.mark.parametrize(
    "choices",
    [{"strategy": "scaffold"}, {"strategy": "fedadam", "average": 0.5}, {"strategy": "fedavgm"}, {"norm": "local"}],
    ids=lambda choices: "-".join(map(str, choices.values())),
)
def test_a_run_that_was_cut_off_goes_on_as_if_nothing_had_been(
    shards: Path, tmp_path: Path, choices: dict[str, Any]
) -> None:
    choices = {"rounds": 3, "head_rounds": 1, "only": f"{SITES[0]},{SITES[3]}"} | choices  # the smallest two
    whole, cut = (a_plan(shards, tmp_path / name, **choices) for name in ("whole", "cut"))
    run_here(whole)
    original = SiteRounds.configure_train

    def dies(self: SiteRounds, server_round: int, *rest: Any) -> Any:
        if self.first + server_round - 1 == 3:
            raise KeyboardInterrupt
        return original(self, server_round, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SiteRounds, "configure_train", dies)
        with pytest.raises(KeyboardInterrupt):
            run_here(cut)
    assert len((tmp_path / "cut" / "rounds.jsonl").read_text().splitlines()) == 2
    result, grid = run_here(cut)
    assert [kind for kind, _, _ in grid.sent].count("train") == 2 and len(result["rounds"]) == 3
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"), 1e-5)


def test_half_the_bytes_in_bfloat16_and_the_rest_is_sent_once(shards: Path, tmp_path: Path) -> None:
    choices = {"scope": "last_block", "only": SITES[0]}
    full, _ = run_here(a_plan(shards, tmp_path / "full", **choices))
    half, _ = run_here(a_plan(shards, tmp_path / "half", precision="bfloat16", **choices))
    first, second = (record["sites"]["rosendahl"] for record in full["rounds"])
    assert second["received"] < 0.8 * first["received"]  # a quarter of the tensors is more than that of the bytes
    third, fourth = (record["sites"]["rosendahl"] for record in half["rounds"])
    assert third["sent"] < 0.6 * first["sent"] and fourth["received"] < 0.6 * second["received"]
    assert third["received"] == first["received"] - second["received"] + fourth["received"]  # the rest is float32
    # What a round adds may be less than bfloat16 can say of a weight: the coordinator's model stays in float32.
    torch.manual_seed(0)
    start = build(a_recipe().backbone).head.weight.detach().numpy()
    whole, rounded = (weights(tmp_path / run)["head.weight"] for run in ("full", "half"))
    assert (rounded.view(np.uint32) & 0xFFFF).any()
    assert np.linalg.norm(rounded - whole) < 0.3 * np.linalg.norm(whole - start)


def test_local_normalisation_stays_and_frozen_normalisation_does_not_move(shards: Path, tmp_path: Path) -> None:
    run_here(a_plan(shards, tmp_path / "frozen", norm="frozen", rounds=1, only=SITES[0]))
    torch.manual_seed(0)
    start = build(a_recipe().backbone).state_dict()
    found = weights(tmp_path / "frozen")
    assert all(np.array_equal(found[name], start[name].numpy()) for name in found if "running" in name)
    run_here(a_plan(shards, tmp_path / "local", norm="local", rounds=1))
    own = [load_file(tmp_path / "local" / "sites" / site / "run" / "norm.safetensors") for site in SITES[:3]]
    name = next(name for name in own[0] if name.endswith("weight"))
    assert not np.array_equal(own[0][name], own[1][name])
    assert np.array_equal(weights(tmp_path / "local")[name], start[name].numpy())


def test_parts_of_an_epoch_together_are_the_epoch(shards: Path) -> None:
    recipe = a_recipe()
    labels = np.repeat(np.arange(7), 12)
    pixels = np.arange(84, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    feed = memory_feed(pixels, labels, balance(np.full(7, 12), BalanceConfig()), recipe)
    order = Order(run="x", round=1, rounds=8, strategy="fedavg", scope="all", recipe=recipe, local_epochs=0.4)
    seen = []
    for number in range(1, 6):
        part = part_of_epoch(feed, order.model_copy(update={"round": number}))
        batches = list(part.epoch(0))
        assert len(batches) == part.steps == 4
        seen += [tuple(batch[0][:, 0, 0, 0].tolist()) for batch in batches]
    wanted = [tuple(b[0][:, 0, 0, 0].tolist()) for epoch in (0, 1) for b in feed.epoch(epoch)]
    assert seen == wanted[:20]


def test_the_local_loss_corrects_for_the_sites_own_classes() -> None:
    order = Order(
        run="x", round=2, rounds=4, strategy="fedavg", scope="head", recipe=a_recipe(), adjusted=True, rate=0.5
    )
    recipe = local_recipe(order, "a")
    assert recipe.loss.name == "logit_adjusted" and recipe.balance.strategy == "none"
    assert recipe.optim.head_epochs == 1 and recipe.optim.epochs == 0 and recipe.optim.lr == 0.0005
    assert recipe.seed != local_recipe(order, "b").seed


def test_a_plan_names_its_sites() -> None:
    plan = Plan(recipe="", out="", sites="north=12, south=34")
    assert plan.node_ids() == {12: "north", 34: "south"}
    with pytest.raises(Exception, match="north"):
        Plan(recipe="", out="", sites="north").node_ids()


def test_a_preset_holds_where_nothing_else_is_said(shards: Path, tmp_path: Path) -> None:
    choices = {"shards": str(shards), "out": str(tmp_path), "rounds": None, "local_epochs": None}
    pretrained = ["backbone.weights=imagenet"]
    plan = make_plan(choices, "demo", None, [], pretrained, real=False, preset="label-skew")
    assert (plan.rounds, plan.local_epochs, plan.norm, plan.weigh) == (96, 1 / 16, "frozen", "steps")
    assert (plan.parsed_recipe.optim.lr, plan.parsed_recipe.optim.clip) == (4e-4, 1e6)
    said = ["norm=shared"], [*pretrained, "optim.lr=0.01"]
    changed = make_plan(choices | {"rounds": 5}, "demo", None, *said, real=False, preset="label-skew")
    assert (changed.rounds, changed.norm, changed.parsed_recipe.optim.lr) == (5, "shared", 0.01)
    assert make_plan(choices, "demo", None, [], [], real=False).rounds == 20
    with pytest.raises(RecipeError, match=r"no first weights, whose normalisation label-skew keeps; .*--weights FILE"):
        make_plan(choices, "demo", None, [], [], real=False, preset="label-skew")


def test_a_folder_belongs_to_one_plan(tmp_path: Path) -> None:
    plan = a_plan("shards", tmp_path)
    claim(plan)
    claim(plan)
    with pytest.raises(CheckpointError, match="another rounds, seed"):
        claim(plan.model_copy(update={"rounds": 9, "seed": 9}))


def test_only_sites_of_the_plan_are_asked(shards: Path, tmp_path: Path) -> None:
    plan = a_plan(shards, tmp_path, rounds=1, sites="a=100,b=102")
    _, grid = run_here(plan)
    assert {node for _, node, _ in grid.sent} == {100, 102}


def test_a_result_says_what_was_done(shards: Path, tmp_path: Path) -> None:
    run_here(a_plan(shards, tmp_path, rounds=1))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["plan"]["strategy"] == "fedavg" and result["plan"]["recipe"]["name"] == "toy"
    assert len(result["sites"]["rosendahl"]["confusion"]) == len(CODES)


def test_the_bundle_is_calibrated_as_on_pooled_images(shards: Path, tmp_path: Path) -> None:
    """Temperature, bias and the distance from the training images come from sums, and are those of all images."""
    plan = a_plan(shards, tmp_path, rounds=1)
    run_here(plan)
    bundle = load_bundle(save_model(plan))
    calibration = bundle.bundle.calibration
    assert calibration is not None and calibration.ood is not None and bundle.reference is not None
    whole, network = SiteData("all", str(shards)), network_of_result(plan, tmp_path)
    spec = a_recipe().input_spec
    logits, features = predict(network, whole.pixels("calibration", spec.height, spec.width), spec)
    temperature, bias = fit_temperature_and_bias(logits, whole.labels("calibration"))
    assert calibration.temperature == pytest.approx(temperature, rel=1e-2)
    assert np.allclose(calibration.bias, bias, atol=1e-2)
    _, trained = predict(network, whole.pixels("train", spec.height, spec.width), spec)
    assert np.allclose(bundle.reference.mean, trained.mean(0), atol=1e-4)
    assert bundle.reference.image_ids == () and len(bundle.reference.features) == 0
    far = ood_score(features, bundle.reference)
    assert (far <= calibration.ood.threshold).mean() >= 0.97
    assert calibration.images == len(logits) and sum(calibration.priors) == pytest.approx(1)


@pytest.mark.parametrize("agree", [True, False])
def test_the_model_knows_the_copies_that_all_sites_learnt_from(tmp_path: Path, agree: bool) -> None:
    data = draw(tmp_path / "data")
    for seed, path in enumerate(image_files(data).values()):
        path.write_bytes(encode(noise(seed), quality=75))
    prepare_here(data, tmp_path / "shards")

    def another(node: str, asked: Message, reply: Message) -> Message:
        if asked.metadata.message_type == "query.describe" and node == "101" and not agree:
            other = Array(np.array([48, 64, 80], np.int64))
            reply.content.array_records["arrays"]["copies"] = other
        return reply

    plan = a_plan(tmp_path / "shards", tmp_path / "out", rounds=1)
    run_here(plan, spoil=another)
    copies = load_bundle(save_model(plan)).bundle.input.copies
    assert copies == (Copies(height=48, width=64, quality=75) if agree else None)


def test_a_run_finished_by_an_older_version_becomes_a_model(shards: Path, tmp_path: Path) -> None:
    plan = a_plan(shards, tmp_path, rounds=1)
    result, _ = run_here(plan)
    del result["copies"]
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert load_bundle(save_model(plan)).bundle.input.copies is None
