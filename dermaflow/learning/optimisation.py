"""Optimiser, learning-rate schedule and precision."""

from __future__ import annotations

import ctypes
import logging
import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from dermaflow.errors import SettingError
from dermaflow.learning.backbones import Network
from dermaflow.settings import settings

log = logging.getLogger(__name__)


class OptimConfig(BaseModel):
    """How the weights move, in two phases: the head alone on a frozen backbone, then everything."""

    model_config = ConfigDict(extra="forbid")

    optimizer: Literal["adam", "adamw", "sgd"] = Field("adamw", description="sgd: with Nesterov's momentum of 0.9.")
    batch_size: int = Field(32, ge=1, description="Over all workers together.")
    head_epochs: int = Field(1, ge=0, description="Epochs with a frozen backbone.")
    head_lr: float = Field(3e-3, gt=0)
    epochs: int = Field(15, ge=0, description="Epochs with everything trained, after the head epochs.")
    lr: float = Field(1e-3, gt=0, description="Peak rate of the last layers of the backbone and of the head.")
    layer_decay: float = Field(0.6, gt=0, le=1, description="Rate of a quarter of the backbone relative to the next.")
    weight_decay: float = Field(0.05, ge=0, description="Not on biases and normalisation.")
    trained: Literal["all", "last_block"] = Field(
        "all", description="After the head epochs: everything, or the head and the backbone's last quarter."
    )
    freeze_norm: bool = Field(False, description="Keep the running statistics of the first weights.")
    schedule: Literal["cosine", "one_cycle", "constant"] = "cosine"
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of a cycle's steps in which the rate rises.")
    cycles: int = Field(
        1, ge=1, description="cosine only: equal cycles of `epochs`, each with half the peak rate of the one before."
    )
    clip: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    ema: float = Field(0.0, ge=0, lt=1, description="Decay a step of the averaged weights that are kept; 0 for none.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 autocast where the hardware computes in it, else float32."
    )
    patience: int | None = Field(
        None, ge=1, description="Stop after so many epochs without a better validation loss; needs validation_fold."
    )


Scope = Literal["head", "last_block", "all"]
"""What is trained: the head; the head and the last quarter of the backbone's parameters; everything."""


def trained_names(network: Network, scope: Scope) -> list[str]:
    """Names of the trained parameters, in the network's order."""
    body = [f"body.{name}" for name, _ in network.body.named_parameters()]
    chosen = {"head": [], "last_block": body[len(body) - len(body) // 4 :], "all": body}[scope]
    return [*chosen, *(f"head.{name}" for name, _ in network.head.named_parameters())]


def train_mode(network: Network, *, freeze_norm: bool = False) -> None:
    """Training mode, but frozen parts, or all, keep the running statistics of their normalisation layers."""
    network.train()
    if not any(parameter.requires_grad for parameter in network.body.parameters()):
        network.body.eval()
    for module in network.body.modules():
        if isinstance(module, _BatchNorm):
            moves = any(parameter.requires_grad for parameter in module.parameters())
            module.train(moves and not freeze_norm)


def make_optimizer(network: Network, config: OptimConfig, *, head_only: bool) -> torch.optim.Optimizer:
    """Parameter groups with their peak rates; freezes every parameter that is not trained."""
    trained = set(trained_names(network, "head" if head_only else config.trained))
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in trained)
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}

    def put(parameter: torch.nn.Parameter, rate: float) -> None:
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)

    for parameter in network.head.parameters():
        put(parameter, config.head_lr if head_only else config.lr)
    if not head_only:
        body = list(network.body.parameters())
        for i, parameter in enumerate(body):
            quarters_above = 3 - 4 * i // len(body)
            if parameter.requires_grad:
                put(parameter, config.lr * config.layer_decay**quarters_above)
    chosen = [{"params": p, "lr": lr, "weight_decay": wd} for (lr, wd), p in groups.items()]
    if config.optimizer == "sgd":
        return torch.optim.SGD(chosen, momentum=0.9, nesterov=True, fused=True)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(chosen, fused=True)


def moments_of(optimizer: torch.optim.Optimizer, network: Network) -> dict[str, torch.Tensor]:
    """What an optimiser remembers of each parameter, on the CPU: ``<parameter>/<moment>`` and ``<parameter>/step``."""
    return {
        f"{name}/{key}": value.detach().cpu()
        for name, parameter in network.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    }


def put_moments(optimizer: torch.optim.Optimizer, network: Network, moments: dict[str, torch.Tensor]) -> None:
    """Let an optimiser go on from `moments_of`, where it trains the same parameters."""
    parameters = dict(network.named_parameters())
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for place, value in moments.items():
        name, key = place.rsplit("/", 1)
        parameter = parameters[name]
        if id(parameter) in trained:
            if value.shape == parameter.shape:  # fused optimisers want it in the parameter's memory format
                value = torch.empty_like(parameter, requires_grad=False).copy_(value)
            optimizer.state[parameter][key] = value.to(parameter.device)


def cosine_rate(step: float, length: float, rising: float) -> float:
    """Share of the peak rate: up during the first `rising` of `length` steps, then half a cosine, never quite zero."""
    if step < rising:
        return (step + 1) / (rising + 1)
    done = min(1.0, (step - rising) / (length - rising))
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


def make_schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int) -> LRScheduler:
    """Rates over the `steps` of a phase: up during `warmup`, then down to nearly nothing."""
    if config.schedule == "one_cycle":  # Smith and Topin 2017 (arXiv 1708.07120)
        peaks = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, peaks, total_steps=steps + 1, pct_start=max(config.warmup, 2 / (steps + 1)))
    if config.schedule == "constant":
        return LambdaLR(optimizer, lambda step: 1.0)
    length = steps / config.cycles
    rising = config.warmup * length

    def rate(step: int) -> float:  # warm restarts, Loshchilov and Hutter 2017 (arXiv 1608.03983)
        cycle = min(int(step / length), config.cycles - 1)
        return 0.5**cycle * cosine_rate(step - int(cycle * length), length, rising)

    return LambdaLR(optimizer, rate)


def keep_freed_memory() -> None:
    """Let this process keep the memory of freed tensors, for the next step's.

    glibc gives tensors above 32 MB back to the system and takes them anew at every step, each page a fault: a tenth of
    a training step on a CPU. Other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no mappings of their own
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def pick_device() -> torch.device:
    """The device of ``DERMAFLOW_DEVICE``, or a GPU where there is one; says which in the log.

    Raises:
        SettingError: There is no such GPU.
    """
    wanted = settings().device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingError(
            wanted, where="DERMAFLOW_DEVICE", expected=f"one of {torch.cuda.device_count()} GPUs",
            todo="set it to auto, or see what dermaflow doctor says",
        )  # fmt: skip
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    log.info("device: %s (%s)", device, name)
    return device


def pick_precision(config: OptimConfig, device: torch.device) -> torch.dtype:
    """bfloat16 only where it is computed in hardware: emulated on a CPU it costs ten times float32."""
    if config.precision != "auto":
        return torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if features.get("avx512_bf16") or features.get("amx_bf16") else torch.float32
