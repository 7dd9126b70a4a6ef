"""The square a lesion is drawn on, and the strokes every lesion type draws with: noise, meshes, dots, vessels.

Lengths are in image heights, so that a lesion looks the same at any resolution. Fields are float32 arrays of the
canvas' shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Field = NDArray[np.floating]


def smooth_noise(rng: np.random.Generator, height: int, width: int, cell: float) -> Field:
    """Smooth random field of about zero mean and unit variance.

    Args:
        rng: Source of chance.
        height: Pixels.
        width: Pixels.
        cell: Size of the blobs, pixels.

    Returns:
        float32 ``(height, width)``.
    """
    cell = max(cell, 1.0)
    coarse = rng.standard_normal((int(height / cell) + 4, int(width / cell) + 4), dtype=np.float32)
    box = (1.0, 1.0, 1.0 + width / cell, 1.0 + height / cell)  # inside the grid, so no edge shows
    fine = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC, box=box)
    return np.asarray(fine) * np.float32(1.25)  # interpolation takes a third of the variance


def fade(field: Field, softness: float) -> Field:
    """1 where the field is well below 0, 0 well above, a smooth step of width `softness` between."""
    return 0.5 - 0.5 * np.tanh(field * np.float32(1.0 / softness))


@dataclass
class Canvas:
    """A square centred on the lesion.

    Attributes:
        rng: Source of chance of this lesion.
        size: Side, pixels.
        unit: Pixels an image height.
        radius: Of the lesion, image heights.
    """

    rng: np.random.Generator
    size: int
    unit: float
    radius: float

    @cached_property
    def x(self) -> Field:
        """Columns, image heights from the centre, ``(1, size)``."""
        return ((np.arange(self.size, dtype=np.float32) - self.size / 2) / np.float32(self.unit))[None, :]

    @cached_property
    def y(self) -> Field:
        """Rows, image heights from the centre, ``(size, 1)``."""
        return self.x.T

    @cached_property
    def r(self) -> Field:
        """Distance from the centre, image heights."""
        return np.hypot(self.x, self.y)

    @cached_property
    def theta(self) -> Field:
        """Angle, radians."""
        return np.arctan2(self.y, self.x)

    def noise(self, cell: float) -> Field:
        """Smooth noise with blobs of `cell` image heights."""
        return smooth_noise(self.rng, self.size, self.size, cell * self.unit)

    def outline(self, irregular: float, jagged: float, elongation: float) -> Field:
        """Signed distance from a wavy closed border, in lesion radii; negative inside.

        Args:
            irregular: Size of the lobes, share of the radius.
            jagged: Size of the fine wobble of the border, share of the radius.
            elongation: Long over short axis.
        """
        turn = np.arange(721, dtype=np.float32) * np.float32(2 * np.pi / 720)
        border = np.sqrt(np.cos(turn) ** 2 * elongation + np.sin(turn) ** 2 / elongation)
        for wave in range(2, 8):
            border += irregular * self.rng.normal() / wave * np.cos(wave * turn + self.rng.uniform(0, 6.28))
        index = ((self.theta + np.float32(np.pi)) * np.float32(720 / (2 * np.pi))).astype(np.int32)
        distance = self.r / np.float32(self.radius) - border.astype(np.float32)[index]
        wobble = 0.8 * self.noise(0.35 * self.radius) + 0.4 * self.noise(0.1 * self.radius)
        rim = 4 * (self.r / np.float32(self.radius) - 1.35)  # nothing reaches the canvas' side at 1.6 radii
        return np.maximum(distance + np.float32(jagged) * wobble, rim)

    def blob(self, x: float, y: float, radius: float, wobble: float = 0.3, soft: float = 0.3) -> Field:
        """A cloud-like patch, 1 inside and 0 outside; lengths in lesion radii."""
        scale = np.float32(1 / self.radius)
        distance = np.hypot(self.x * scale - float(x), self.y * scale - float(y)) / radius - 1
        return fade(distance + np.float32(wobble) * self.noise(0.5 * radius * self.radius), soft)

    def mesh(self, spacing: float, warp: float, line: float = 0.0) -> Field:
        """A honeycomb of lines around round holes: the pigment network.

        Args:
            spacing: Of the holes, image heights.
            warp: Displacement of the holes, in spacings; 0.15 is regular, 0.6 is wild.
            line: Shifts towards thicker (positive) or thinner lines.

        Returns:
            1 on the lines, 0 in the holes.
        """
        spacing = max(spacing, 3.6 / self.unit)  # below that the mesh would alias
        wave = np.float32(2 * np.pi / spacing * 2 / np.sqrt(3))
        shift = np.float32(warp * spacing)
        u = self.x + shift * self.noise(3 * spacing)
        v = self.y + shift * self.noise(3 * spacing)
        start = self.rng.uniform(0, np.pi)
        total = np.zeros((self.size, self.size), np.float32)
        for angle in (start, start + np.pi / 3, start + 2 * np.pi / 3):
            total += np.cos(wave * (u * np.float32(np.cos(angle)) + v * np.float32(np.sin(angle))))
        thickness = np.float32(line) + np.float32(2 * warp) * self.noise(4 * spacing)
        return fade(total - thickness, 0.8)

    def points(self, where: Field, count: int) -> NDArray[np.float64]:
        """Random places ``(count, 2)`` as x, y in image heights, drawn where the mask is above a half."""
        flat = np.flatnonzero(where > 0.5)
        if not len(flat):
            return np.zeros((0, 2))
        row, column = np.divmod(flat[(self.rng.random(count) * len(flat)).astype(int)], self.size)
        return (np.stack([column, row], 1) - self.size / 2) / self.unit

    def dots(
        self, places: NDArray[np.float64], radii: NDArray[np.float64] | float, soft: float = 0.5, squeeze: float = 1.0
    ) -> Field:
        """Round or oval spots.

        Args:
            places: ``(n, 2)`` as x, y in image heights.
            radii: ``(n,)`` or one for all, image heights.
            soft: Width of the rim, in radii.
            squeeze: Long over short axis of ovals that point anywhere.

        Returns:
            1 in a spot, 0 outside, the largest where they meet.
        """
        field = np.zeros((self.size, self.size), np.float32)
        radii = np.broadcast_to(radii, len(places))
        for (x, y), radius, angle in zip(places, radii, self.rng.uniform(0, np.pi, len(places)), strict=True):
            radius = max(radius, 0.8 / self.unit)
            reach = int(radius * squeeze * (1 + soft) * self.unit) + 2
            column, row = (int(p * self.unit + self.size / 2) for p in (x, y))
            rows = slice(max(row - reach, 0), max(row + reach, 0))
            columns = slice(max(column - reach, 0), max(column + reach, 0))
            dx, dy = self.x[:, columns] - np.float32(x), self.y[rows] - np.float32(y)
            along = (dx * np.cos(angle) + dy * np.sin(angle)) / (radius * squeeze)
            across = (dy * np.cos(angle) - dx * np.sin(angle)) / radius
            spot = np.clip((1 - np.hypot(along, across)) / soft + 0.5, 0, 1)
            np.maximum(field[rows, columns], spot, out=field[rows, columns])
        return field

    def vessels(self, roots: NDArray[np.float64], length: float, width: float, branching: int) -> Field:
        """Tree-like (``branching`` > 0) or single wavy vessels, 1 inside; lengths in image heights."""
        image = Image.new("L", (2 * self.size, 2 * self.size))
        pen = ImageDraw.Draw(image)
        stack = [(x, y, self.rng.uniform(0, 6.28), length, width, branching) for x, y in roots]
        while stack:
            x, y, heading, reach, thick, left = stack.pop()
            line = [(x, y)]
            for _ in range(10):
                heading += self.rng.normal(0, 0.3)
                x, y = x + np.cos(heading) * reach / 10, y + np.sin(heading) * reach / 10
                line.append((x, y))
            if left:
                for side in (-1, 1):
                    at = line[int(self.rng.integers(3, 11))]
                    turn = heading + side * self.rng.uniform(0.4, 1.0)
                    stack.append((*at, turn, 0.7 * reach, 0.65 * thick, left - 1))
            pixels = [(2 * (px * self.unit + self.size / 2), 2 * (py * self.unit + self.size / 2)) for px, py in line]
            pen.line(pixels, fill=255, width=max(round(2 * thick * self.unit), 1), joint="curve")
        return np.asarray(image.reduce(2), np.float32) * np.float32(1 / 255)
