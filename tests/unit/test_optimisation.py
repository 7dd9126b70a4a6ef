"""Rates by depth, what decays, and schedules that rise and fall within a phase of any length."""

from __future__ import annotations

import pytest
import torch

from dermaflow.errors import SettingError
from dermaflow.learning.backbones import BackboneConfig, Network, build
from dermaflow.learning.optimisation import OptimConfig, make_optimizer, make_schedule, pick_device, pick_precision
from dermaflow.settings import settings


@pytest.fixture
def network() -> Network:
    return build(BackboneConfig(name="seed_cnn"))


def rates(optimizer: torch.optim.Optimizer, network: Network) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each parameter by its name."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }


def test_head_epochs_train_the_head_alone(network: Network) -> None:
    found = rates(make_optimizer(network, OptimConfig(head_lr=0.5, weight_decay=0.1), head_only=True), network)
    assert found == {"head.weight": (0.5, 0.1), "head.bias": (0.5, 0.0)}
    assert not any(parameter.requires_grad for parameter in network.body.parameters())


def test_rates_fall_with_depth_and_biases_do_not_decay(network: Network) -> None:
    make_optimizer(network, OptimConfig(), head_only=True)
    config = OptimConfig(lr=0.8, layer_decay=0.5, weight_decay=0.1)
    found = rates(make_optimizer(network, config, head_only=False), network)
    assert set(found) == {name for name, _ in network.named_parameters()}
    assert all(parameter.requires_grad for parameter in network.parameters())
    body = [name for name, _ in network.body.named_parameters()]  # four layers with weight and bias: a quarter each
    assert [found[f"body.{name}"] for name in body] == [
        (0.1, 0.1), (0.1, 0.0), (0.2, 0.1), (0.2, 0.0), (0.4, 0.1), (0.4, 0.0), (0.8, 0.1), (0.8, 0.0),
    ]  # fmt: skip
    assert found["head.weight"] == (0.8, 0.1) and found["head.bias"] == (0.8, 0.0)


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_optimizers(network: Network, name: str, kind: type) -> None:
    config = OptimConfig.model_validate({"optimizer": name})
    assert type(make_optimizer(network, config, head_only=False)) is kind


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("steps", [1, 2, 3, 40])
def test_a_schedule_of_any_length_rises_to_the_peak_and_falls(
    network: Network, schedule: str, warmup: float, steps: int
) -> None:
    config = OptimConfig.model_validate({"schedule": schedule, "warmup": warmup, "lr": 1.0, "layer_decay": 0.5})
    optimizer = make_optimizer(network, config, head_only=False)
    peaks = torch.tensor([group["lr"] for group in optimizer.param_groups])
    rule = make_schedule(optimizer, config, steps)
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        rule.step()
    shares = torch.tensor(found) / peaks
    torch.testing.assert_close(shares, shares[:, :1].expand_as(shares))  # all groups alike
    shares = shares[:, 0]
    assert shares.min() > 0 and shares.max() <= 1 + 1e-6
    if steps == 40:
        top = int(shares.argmax())
        assert shares[top] > 0.95 and abs(top - warmup * steps) <= 2
        assert (shares[: top + 1].diff() > 0).all() and (shares[top:].diff() <= 0).all()
        assert shares[-1] < 0.05


def test_bfloat16_only_where_asked_or_in_hardware() -> None:
    cpu = torch.device("cpu")
    assert pick_precision(OptimConfig(precision="float32"), cpu) == torch.float32
    assert pick_precision(OptimConfig(precision="bfloat16"), cpu) == torch.bfloat16
    flags = torch.cpu.get_capabilities()
    in_hardware = bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))
    assert (pick_precision(OptimConfig(), cpu) == torch.bfloat16) == in_hardware


def test_the_device_of_the_environment_is_used_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DERMAFLOW_DEVICE", "cpu")
    settings.cache_clear()
    with caplog.at_level("INFO"):
        assert pick_device() == torch.device("cpu")
    assert "device: cpu" in caplog.text
    settings.cache_clear()


def test_a_gpu_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERMAFLOW_DEVICE", f"cuda:{torch.cuda.device_count()}")
    settings.cache_clear()
    with pytest.raises(SettingError, match=r"DERMAFLOW_DEVICE: cuda:\d+; expected one of \d+ GPUs"):
        pick_device()
    settings.cache_clear()


def test_each_cycle_starts_anew_at_half_the_rate(network: Network) -> None:
    config = OptimConfig(lr=1.0, layer_decay=1.0, warmup=0.1, cycles=2)
    schedule = make_schedule(make_optimizer(network, config, head_only=False), config, 200)
    shares = []
    for _ in range(200):
        shares.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    assert max(shares[:100]) == pytest.approx(1.0, abs=0.02) and max(shares[100:]) == pytest.approx(0.5, abs=0.02)
    assert shares[99] < 0.05 and shares[199] < 0.05
    assert shares[100:200] == pytest.approx([share / 2 for share in shares[:100]])
