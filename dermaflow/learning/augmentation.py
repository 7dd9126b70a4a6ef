"""Augmentation of whole batches in tensor arithmetic.

One affine grid a batch and colour as per-image affine maps of RGB cost a small part of what per-image transforms do: on
a CPU those cost more than the network.
"""

from __future__ import annotations

import math

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch.nn import functional


class AugmentConfig(BaseModel):
    """How far an image may be changed. All at 0 and flips off leave it as it is."""

    model_config = ConfigDict(extra="forbid")

    flips: bool = True
    rotation: float = Field(180.0, ge=0, le=180, description="Degrees either way; a lesion has no upright.")
    zoom: float = Field(0.2, ge=0, lt=1, description="Scale is drawn from 1-zoom to 1/(1-zoom), in and out.")
    stretch: float = Field(0.1, ge=0, lt=1, description="Change of the aspect ratio, likewise.")
    shift: float = Field(0.08, ge=0, lt=0.5, description="Share of the height and width.")
    brightness: float = Field(0.2, ge=0, lt=1)
    contrast: float = Field(0.2, ge=0, lt=1)
    saturation: float = Field(0.2, ge=0, lt=1)
    tint: float = Field(0.05, ge=0, lt=1, description="Gain of each colour channel, as between cameras and lamps.")
    sharpness: float = Field(0.0, ge=0, le=1, description="Fine detail is amplified by 1-sharpness to 1+sharpness.")
    noise: float = Field(
        0.0,
        ge=0,
        le=64,
        description="Noise of a pixel, all channels alike; standard deviation from 0 to this, of 255.",
    )
    erase: float = Field(0.0, ge=0, le=1, description="Chance that a rectangle is blanked.")


_GREY = torch.tensor([0.299, 0.587, 0.114])  # luma weights of ITU-R BT.601


def augment(
    pixels: torch.Tensor, config: AugmentConfig, generator: torch.Generator, size: tuple[int, int] | None = None
) -> torch.Tensor:
    """Change every image of a batch in its own way.

    Args:
        pixels: uint8 [N, H, W, 3] on any device.
        config: How far.
        generator: CPU generator; the same state gives the same result.
        size: Height and width to come out, if not those that went in; not below half of them, where sampling aliases.

    Returns:
        uint8 [N, H, W, 3] of that size.
    """
    planes = pixels.permute(0, 3, 1, 2).float()
    planes = _move(planes, config, generator, size or (pixels.shape[1], pixels.shape[2]))
    planes = _recolour(planes, config, generator)
    if config.sharpness:
        planes = _resharpen(planes, config.sharpness, generator)
    if config.noise:
        planes = _add_noise(planes, config.noise, generator)
    if config.erase:
        planes = _erase(planes, config.erase, generator)
    return planes.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low


def _move(
    planes: torch.Tensor, config: AugmentConfig, generator: torch.Generator, size: tuple[int, int]
) -> torch.Tensor:
    """Rotate, scale, stretch, shift and flip through one sampling grid; the border is mirrored."""
    count, _, height, width = planes.shape
    angle = _uniform((count,), -config.rotation, config.rotation, generator) * (math.pi / 180)
    reach = -math.log1p(-config.zoom)
    scale = torch.exp(_uniform((count,), -reach, reach, generator))
    reach = -math.log1p(-config.stretch)
    stretch = torch.exp(_uniform((count,), -reach / 2, reach / 2, generator))
    sign = torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1.0 if config.flips else torch.ones(count)
    # Grid coordinates run from -1 to 1 along both sides, so a rotation has to undo the aspect ratio.
    aspect = width / height
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = cos * stretch * sign, -sin / aspect * stretch
    theta[:, 1, 0], theta[:, 1, 1] = sin * aspect / stretch * sign, cos / stretch
    theta[:, :, 2] = _uniform((count, 2), -2 * config.shift, 2 * config.shift, generator)
    grid = functional.affine_grid(theta.to(planes.device), [count, 3, *size], align_corners=False)
    return functional.grid_sample(planes, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _recolour(planes: torch.Tensor, config: AugmentConfig, generator: torch.Generator) -> torch.Tensor:
    """Saturation, contrast, brightness and tint together are one affine map of RGB an image: out = A rgb + b."""
    count = len(planes)
    saturation = 1 + _uniform((count, 1, 1), -config.saturation, config.saturation, generator)
    matrix = saturation * torch.eye(3) + (1 - saturation) * _GREY.expand(3, 3)
    contrast = 1 + _uniform((count, 1, 1), -config.contrast, config.contrast, generator)
    gain = 1 + _uniform((count, 1, 1), -config.brightness, config.brightness, generator)
    gain = gain * (1 + _uniform((count, 3, 1), -config.tint, config.tint, generator))
    matrix = (gain * contrast * matrix).to(planes.device)
    middle = planes.mean(dim=(2, 3)) @ _GREY.to(planes.device)
    offset = gain.to(planes.device) * ((1 - contrast[:, :, 0].to(planes.device)) * middle[:, None])[:, :, None]
    return torch.baddbmm(offset, matrix, planes.flatten(2)).view_as(planes)


def _resharpen(planes: torch.Tensor, most: float, generator: torch.Generator) -> torch.Tensor:
    """Soften or sharpen by an unsharp mask, as lenses and copies at other sizes differ."""
    amount = _uniform((len(planes), 1, 1, 1), -most, most, generator).to(planes.device)
    around = functional.avg_pool2d(functional.pad(planes, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return planes.lerp(around, -amount)


def _add_noise(planes: torch.Tensor, most: float, generator: torch.Generator) -> torch.Tensor:
    """The same grey noise in all colours, of a standard deviation of up to `most`, as sensors differ."""
    deviation = _uniform((len(planes), 1, 1, 1), 0, most, generator)
    noise = torch.randn((len(planes), 1, *planes.shape[2:]), generator=generator).mul_(deviation)
    return planes.add(noise.to(planes.device))


def _erase(planes: torch.Tensor, chance: float, generator: torch.Generator) -> torch.Tensor:
    """Blank a rectangle of 5 to 20 % of the area with the image's mean colour (random erasing, arXiv 1708.04896)."""
    count, _, height, width = planes.shape
    area = _uniform((count,), 0.05, 0.2, generator)
    ratio = torch.exp(_uniform((count,), -0.7, 0.7, generator))
    half_h, half_w = torch.sqrt(area * ratio) / 2, torch.sqrt(area / ratio) / 2
    middle = torch.rand((count, 2), generator=generator)
    rows, columns = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
    inside = ((rows[None] - middle[:, :1]).abs() < half_h[:, None])[:, :, None] & (
        (columns[None] - middle[:, 1:]).abs() < half_w[:, None]
    )[:, None, :]
    inside &= (torch.rand(count, generator=generator) < chance)[:, None, None]
    return torch.where(inside[:, None].to(planes.device), planes.mean(dim=(2, 3), keepdim=True), planes)
