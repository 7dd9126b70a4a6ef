"""From a shard's bytes to the network's input. Training, evaluation, scoring and serving all come through here."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import interpolate

from dermaflow.datasets.framing import lies_across, shown_part
from dermaflow.datasets.images import decode_field, dimensions, small_copy
from dermaflow.schemas.bundle import Copies, InputSpec

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""RGB statistics that torchvision's weights were trained with."""


def pixels(data: bytes, height: int, width: int, copies: Copies | None = None) -> np.ndarray:
    """Decode an image and bring it to size: without the black surround of a lens (`field_of_view`), mirrored at its
    diagonal where it `lies_across`, stretched a little and, beyond that, cropped (`shown_part`).

    Args:
        data: Encoded image.
        height: Height in pixels.
        width: Width in pixels.
        copies: What the network learnt from: a larger image is copied likewise first.

    Returns:
        uint8 array [height, width, 3], RGB.

    Raises:
        ImageProblem: The bytes are no readable image.
    """
    if copies is not None:
        data = small_copy(data, copies.height, copies.width, copies.quality)
    found_width, found_height = dimensions(data)
    across = lies_across(found_height, found_width, height, width)
    image = decode_field(data, width, height) if across else decode_field(data, height, width)
    found_height, found_width = image.shape[:2]
    if lies_across(found_height, found_width, height, width):
        image = image.transpose(1, 0, 2)
        found_height, found_width = found_width, found_height
    # Cropped first, so that a strip one pixel high is not blown up whole; rounded up, because libjpeg's sizes are.
    rows, columns = (math.ceil(part - 1e-6) for part in shown_part(found_height, found_width, height, width))
    top, left = (found_height - rows) // 2, (found_width - columns) // 2
    image = image[top : top + rows, left : left + columns]
    if (rows, columns) != (height, width):
        planes = torch.from_numpy(image).permute(2, 0, 1)[None]
        planes = interpolate(planes, size=(height, width), mode="bilinear", antialias=True)
        image = planes[0].permute(1, 2, 0).numpy()
    return np.ascontiguousarray(image)


def pixel_batch(images: Sequence[bytes], height: int, width: int, copies: Copies | None = None) -> np.ndarray:
    """`pixels` of several images: uint8 array [N, height, width, 3]."""
    batch = np.empty((len(images), height, width, 3), np.uint8)
    for place, data in zip(batch, images, strict=True):
        place[:] = pixels(data, height, width, copies)
    return batch


def normalise(batch: torch.Tensor, spec: InputSpec) -> torch.Tensor:
    """Pixels to the network's input.

    Args:
        batch: uint8 tensor [N, H, W, 3].
        spec: Mean and standard deviation of RGB in [0, 1].

    Returns:
        float32 tensor [N, 3, H, W] in channels_last memory format.
    """
    planes = batch.permute(0, 3, 1, 2).float()
    mean = torch.tensor(spec.mean, device=batch.device).view(1, 3, 1, 1) * 255
    std = torch.tensor(spec.std, device=batch.device).view(1, 3, 1, 1) * 255
    return planes.sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)
