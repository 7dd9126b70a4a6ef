"""The loop learns, resumes to the bit, freezes what it should, stops when told and refuses what is not its own."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny_data import noise

from dermaflow.errors import CheckpointError, DermaflowError
from dermaflow.learning.backbones import BackboneConfig, Network, build
from dermaflow.learning.inference import predict
from dermaflow.learning.local import memory_feed
from dermaflow.learning.loop import Run, State, fit
from dermaflow.learning.recipe import Recipe
from dermaflow.preparation.balancing import Balance, BalanceConfig, balance

CPU = torch.device("cpu")
LABELS = np.repeat(np.arange(7), 4)
EVEN = balance(np.full(7, 4), BalanceConfig())


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Four noisy images of each of seven colours."""
    colours = np.random.default_rng(0).integers(40, 216, (7, 3))
    images = [colours[label] + (noise(n, 24, 32).astype(int) - 128) // 4 for n, label in enumerate(LABELS)]
    return np.clip(np.stack(images), 0, 255).astype(np.uint8)


def a_recipe(backbone: str = "seed_cnn", **choices: Any) -> Recipe:
    top = {key: choices.pop(key) for key in ("validation_fold", "monitor_every", "seed") if key in choices}
    optim = {"batch_size": 8, "head_epochs": 0, "epochs": 2, "lr": 0.003, "layer_decay": 1.0} | choices
    content = {"name": "toy", "input": {"height": 24, "width": 32}, "backbone": {"name": backbone}, "optim": optim}
    return Recipe.model_validate(content | top)


def a_run(recipe: Recipe, pixels: np.ndarray, **choices: Any) -> Run:
    feed = memory_feed(pixels, LABELS, EVEN, recipe)
    return Run(recipe, feed, EVEN, np.full(7, 1 / 7), "data", CPU, **choices)


def a_network(recipe: Recipe) -> Network:
    torch.manual_seed(recipe.seed)
    return build(recipe.backbone)


class Kept:
    """Checkpoints of every epoch, through bytes as on a disk."""

    def __init__(self) -> None:
        self.states: list[State] = []

    def __call__(self, entry: dict[str, float], state: Callable[[], State]) -> None:
        stream = io.BytesIO()
        torch.save(state(), stream)
        stream.seek(0)
        self.states.append(torch.load(stream, weights_only=True))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def figures(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in history]


def test_the_first_epochs_see_small_images_and_the_last_whole_ones(pixels: np.ndarray) -> None:
    recipe = a_recipe(epochs=3)
    recipe = recipe.model_copy(update={"input": recipe.input.model_copy(update={"small_epochs": 2})})
    network, seen = a_network(recipe), []
    network.body.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[2:])))
    fit(network, a_run(recipe, pixels))
    steps = len(seen) // 3
    assert seen == [(16, 21)] * (2 * steps) + [(24, 32)] * steps


def test_the_loss_falls_on_what_can_be_learned(pixels: np.ndarray) -> None:
    recipe = a_recipe(epochs=12)
    network, history = fit(a_network(recipe), a_run(recipe, pixels))
    losses = [entry["loss"] for entry in history]
    assert len(history) == 12 and abs(losses[0] - np.log(7)) < 0.4 and losses[-1] < 0.5 * losses[0]
    assert {"epoch", "loss", "lr", "images", "seconds"} == set(history[0])
    assert all(entry["images"] == 24 for entry in history)
    logits, features = predict(network, pixels, recipe.input_spec)
    assert (logits.argmax(1) == LABELS).mean() > 0.8 and features.shape == (28, 128)


@pytest.mark.parametrize(
    ("backbone", "choices"),
    [
        ("seed_cnn", {"schedule": "cosine"}),
        ("seed_cnn", {"ema": 0.5, "optimizer": "adam", "warmup": 0.5}),
        ("seed_cnn", {"validation_fold": 0, "patience": 9}),
        ("mobilenet_v2", {"schedule": "one_cycle", "ema": 0.8}),
    ],
    ids=["cosine", "adam, average", "best", "one cycle, average, batch normalisation"],
)
def test_resumed_after_any_epoch_gives_the_same_bits(
    pixels: np.ndarray, backbone: str, choices: dict[str, Any]
) -> None:
    recipe = a_recipe(backbone, head_epochs=2, epochs=2, **choices)
    validate = None
    if recipe.validation_fold is not None:
        validate = lambda network: {"val_loss": float(network.head.weight.detach().abs().sum())}  # noqa: E731
    kept = Kept()
    whole, history = fit(a_network(recipe), a_run(recipe, pixels, on_epoch=kept, validate=validate))
    assert len(kept.states) == 4
    for state in kept.states:
        torch.manual_seed(999)  # another process knows nothing of the random numbers drawn before
        other = build(recipe.backbone)
        epochs = Kept()
        resumed, found = fit(other, a_run(recipe, pixels, on_epoch=epochs, validate=validate), copy.deepcopy(state))
        assert same(resumed.state_dict(), whole.state_dict()), f"after epoch {state['epoch']}"
        assert figures(found) == figures(history)
        assert [state["epoch"] for state in epochs.states] == list(range(state["epoch"] + 1, 4))


def test_the_seed_decides(pixels: np.ndarray) -> None:
    first = a_network(a_recipe()).state_dict()
    networks = []
    for seed in (0, 0, 1):
        network = build(BackboneConfig(name="seed_cnn"))
        network.load_state_dict(first)
        networks.append(fit(network, a_run(a_recipe(epochs=1, seed=seed), pixels))[0].state_dict())
    assert same(networks[0], networks[1]) and not same(networks[0], networks[2])


def test_a_frozen_backbone_does_not_change(pixels: np.ndarray) -> None:
    """Neither do the running statistics of its normalisation layers."""
    recipe = a_recipe("mobilenet_v2", head_epochs=1, epochs=1)
    first = copy.deepcopy(a_network(recipe).state_dict())
    kept = Kept()
    fit(a_network(recipe), a_run(recipe, pixels, on_epoch=kept))
    after_head, after_all = (state["network"] for state in kept.states)
    changed = {key for key in first if not torch.equal(first[key], after_head[key])}
    assert changed == {"head.weight", "head.bias"}
    thawed = {key for key in first if not torch.equal(after_head[key], after_all[key])}
    assert {key for key in first if key.endswith("running_mean")} <= thawed
    assert thawed == set(first)


def test_the_average_is_the_one_of_the_steps(pixels: np.ndarray) -> None:
    recipe = a_recipe(ema=0.7, epochs=2)
    network, steps = a_network(recipe), []
    run = a_run(recipe, pixels, on_step=lambda *progress: steps.append(network.head.weight.detach().clone()))
    kept, _ = fit(network, run)
    average = steps[0]
    for weight in steps[1:]:
        average = 0.7 * average + 0.3 * weight
    assert len(steps) == 6
    torch.testing.assert_close(kept.head.weight.detach(), average)
    assert not torch.equal(kept.head.weight, steps[-1])


def test_progress(pixels: np.ndarray) -> None:
    calls: list[tuple[int, int, int, float]] = []
    _, history = fit(a_network(a_recipe()), a_run(a_recipe(), pixels, on_step=lambda *call: calls.append(call)))
    assert [call[:3] for call in calls] == [(epoch, step, 3) for epoch in (0, 1) for step in (1, 2, 3)]
    assert [calls[2][3], calls[5][3]] == pytest.approx([entry["loss"] for entry in history])


def test_the_class_weights_reach_the_loss(pixels: np.ndarray) -> None:
    recipe, losses = a_recipe(epochs=1, lr=1e-12), []
    for factor in (1.0, 2.0):
        rule = Balance(loss_weights=np.full(7, factor), draws=np.ones(7))
        run = a_run(recipe, pixels)
        run.rule = rule
        losses.append(fit(a_network(recipe), run)[1][0]["loss"])
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-5)


def test_bfloat16_trains_as_float32_does(pixels: np.ndarray) -> None:
    losses = {}
    for precision in ("float32", "bfloat16"):
        recipe = a_recipe(epochs=1, precision=precision)
        losses[precision] = fit(a_network(recipe), a_run(recipe, pixels))[1][0]["loss"]
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


# --- watching ------------------------------------------------------------------------------------------------------


class Script:
    """Validation losses as written, one a look."""

    def __init__(self, *losses: float) -> None:
        self.losses, self.seen = list(losses), []

    def __call__(self, network: Network) -> dict[str, float]:
        self.seen.append(copy.deepcopy(network.state_dict()))
        return {"val_loss": self.losses[len(self.seen) - 1]}


@pytest.mark.parametrize("ema", [0.0, 0.6])
def test_early_stopping_keeps_the_best(pixels: np.ndarray, ema: float) -> None:
    recipe = a_recipe(epochs=20, patience=2, validation_fold=0, ema=ema)
    script, kept = Script(1.0, 0.5, 0.7, 0.6), Kept()
    network, history = fit(a_network(recipe), a_run(recipe, pixels, validate=script, on_epoch=kept))
    assert [entry["val_loss"] for entry in history] == [1.0, 0.5, 0.7, 0.6]
    assert same(network.state_dict(), script.seen[1]) and not same(network.state_dict(), script.seen[3])
    # Cut off after its last epoch, a run that had stopped does not go on.
    other = a_network(recipe)
    resumed, found = fit(other, a_run(recipe, pixels, validate=Script(), on_epoch=kept), kept.states[3])
    assert len(kept.states) == 4 and figures(found) == figures(history)
    assert same(resumed.state_dict(), network.state_dict())


def test_patience_waits_for_a_look_and_for_the_whole_network(pixels: np.ndarray) -> None:
    recipe = a_recipe(epochs=9, patience=1, validation_fold=0, monitor_every=3)
    _, history = fit(a_network(recipe), a_run(recipe, pixels, validate=Script(0.5, 0.6)))
    assert [entry.get("val_loss") for entry in history] == [None, None, 0.5, None, None, 0.6]
    recipe = a_recipe(head_epochs=3, epochs=4, patience=2, validation_fold=0)
    _, history = fit(a_network(recipe), a_run(recipe, pixels, validate=Script(0.1, 0.2, 0.3, 0.4, 0.5, 0.6)))
    assert len(history) == 5  # the three head epochs do not count


def test_without_patience_the_last_is_kept_and_the_end_is_looked_at(pixels: np.ndarray) -> None:
    recipe = a_recipe(epochs=5, monitor_every=2)
    script = Script(0.1, 0.2, 0.3)
    network, history = fit(a_network(recipe), a_run(recipe, pixels, validate=script))
    assert ["val_loss" in entry for entry in history] == [False, True, False, True, True]
    assert same(network.state_dict(), script.seen[-1])


# --- refusing ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_run_is_refused(pixels: np.ndarray) -> None:
    kept = Kept()
    recipe = a_recipe()
    fit(a_network(recipe), a_run(recipe, pixels, on_epoch=kept))
    other = a_recipe(lr=0.004)
    with pytest.raises(
        CheckpointError, match=rf"another recipe \({recipe.digest[:12]}\); expected {other.digest[:12]}"
    ):
        fit(a_network(other), a_run(other, pixels), kept.states[0])
    run = a_run(recipe, pixels)
    run.data_hash = "other"
    with pytest.raises(CheckpointError, match=r"another data \(data\); expected other. Train into another --out"):
        fit(a_network(recipe), run, kept.states[0])


@pytest.mark.parametrize(("head_epochs", "key"), [(1, r"optim\.head_lr"), (0, r"optim\.lr")])
def test_a_loss_that_is_not_finite_ends_the_run(pixels: np.ndarray, head_epochs: int, key: str) -> None:
    recipe = a_recipe(head_epochs=head_epochs, head_lr=1e38, lr=1e38, warmup=0)
    kept = Kept()
    with pytest.raises(
        DermaflowError, match=rf"the loss of epoch 0 is (nan|inf); expected a finite number. Lower {key}"
    ):
        fit(a_network(recipe), a_run(recipe, pixels, on_epoch=kept))
    assert kept.states == []


def test_an_optimiser_goes_on_from_the_moments_of_an_earlier_call(pixels: np.ndarray) -> None:
    """Two calls of one epoch, the second with what the optimiser remembered, come near one call of two epochs."""
    choices: dict[str, Any] = {"schedule": "constant", "warmup": 0.0}
    once, twice = a_recipe(epochs=1, **choices), a_recipe(epochs=2, **choices)
    whole, _ = fit(a_network(twice), a_run(twice, pixels))
    first = a_run(once, pixels)
    network, _ = fit(a_network(once), first)
    assert any(name.endswith("/exp_avg") for name in first.moments)

    def away(moments: dict[str, torch.Tensor]) -> float:
        run = a_run(once, pixels, moments=moments)
        run.feed = dataclasses.replace(run.feed, epoch=lambda _, epoch=run.feed.epoch: epoch(1))
        other, _ = fit(copy.deepcopy(network), run)
        pairs = zip(whole.state_dict().values(), other.state_dict().values(), strict=True)
        return float(sum((a - b).abs().sum() for a, b in pairs))

    assert away(first.moments) < away({})  # dropout and augmentation are drawn by the epoch's number: near, not equal


def test_frozen_normalisation_keeps_its_statistics_and_a_last_block_its_body(pixels: np.ndarray) -> None:
    recipe = a_recipe("mobilenet_v2", epochs=1, freeze_norm=True)
    start = a_network(recipe).state_dict()
    end = fit(a_network(recipe), a_run(recipe, pixels))[0].state_dict()
    assert all(torch.equal(end[name], start[name]) for name in end if "running" in name)
    assert not torch.equal(end["body.features.0.0.weight"], start["body.features.0.0.weight"])
    recipe = a_recipe("mobilenet_v2", epochs=1, trained="last_block")
    end = fit(a_network(recipe), a_run(recipe, pixels))[0].state_dict()
    assert torch.equal(end["body.features.0.0.weight"], start["body.features.0.0.weight"])
    assert torch.equal(end["body.features.0.1.running_mean"], start["body.features.0.1.running_mean"])
    assert not torch.equal(end["body.features.18.1.running_mean"], start["body.features.18.1.running_mean"])
