"""How each of the seven lesion types is drawn: a caricature of what dermoscopy textbooks look for.

The criteria are those of the revised pattern analysis (Kittler et al., J Am Acad Dermatol 74, 1093, 2016): network and
globules, blue-white veil, milia-like cysts, arborising vessels, lacunae, central white patch, rosettes and scale.
Colours come from what lies in the skin: melanin near the surface is brown to black, deep melanin blue-grey, blood red;
keratin and fibrosis cover what is below with yellow and white.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dermaflow.datasets.synthetic.canvas import Canvas, Field, fade

ABSORPTION = np.array([[0.42, 0.78, 1.05], [0.12, 0.95, 0.62], [0.95, 0.72, 0.48]], np.float32)
"""How much a unit of melanin, blood and deep melanin takes from red, green and blue; set by eye on real images."""
COVER = np.array([[0.95, 0.86, 0.88], [0.93, 0.82, 0.60]], np.float32)
"""Colours of white (fibrosis, pearl) and of keratin."""


@dataclass
class Film:
    """What a lesion adds to the skin: five fields of the canvas' shape, amounts from 0 (none) upwards."""

    melanin: Field
    blood: Field
    deep: Field
    white: Field
    keratin: Field

    @classmethod
    def clear(cls, size: int) -> Film:
        """No lesion at all."""
        return cls(*(np.zeros((size, size), np.float32) for _ in range(5)))

    def blend(self, other: Film, share: float) -> Film:
        """Part of this film and `share` of another one."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Film(*(mine + np.float32(share) * (theirs - mine) for mine, theirs in pairs))

    def optics(self) -> tuple[Field, Field]:
        """Seen colour is skin times the first array plus the second; both ``(size, size, 3)`` in 0..1."""
        seen = np.exp(-np.maximum(np.stack([self.melanin, self.blood, self.deep], -1), 0) @ ABSORPTION)
        added = np.zeros_like(seen)
        for amount, colour in zip((self.white, self.keratin), COVER, strict=True):
            through = 1 - np.clip(amount, 0, 0.9)[..., None]
            seen *= through
            added = added * through + (1 - through) * colour
        return seen, added


@dataclass
class Trait:
    """What is particular to one lesion.

    Attributes:
        body: 1 inside the lesion, 0 outside.
        edge: Signed distance from the border in lesion radii, negative inside.
        tone: How much pigment or blood, around 1.
        clarity: How conspicuous the structures of its class are, 0..1.
    """

    body: Field
    edge: Field
    tone: float
    clarity: float


def nevus(c: Canvas, t: Trait) -> Film:
    """Regular network, regular globules or no structure; brown, symmetric, fading at the border."""
    film = Film.clear(c.size)
    kind = c.rng.choice(["reticular", "globular", "homogeneous"], p=[0.55, 0.25, 0.2])
    base = 0.8 * t.tone * (1 + 0.12 * c.noise(0.8 * c.radius))
    film.blood = t.body * np.float32(c.rng.uniform(0.0, 0.4))
    if kind == "reticular":
        mesh = c.mesh(c.rng.uniform(0.028, 0.045), c.rng.uniform(0.2, 0.32))
        clear = t.clarity * (0.75 + 0.3 * np.tanh(c.noise(0.5 * c.radius)))
        film.melanin = t.body * base * (1 - clear * (0.55 - 1.3 * mesh))
    elif kind == "globular":
        cobbles = 1 - c.mesh(c.rng.uniform(0.038, 0.055), 0.3, 0.2)
        film.melanin = t.body * base * (1 - 0.5 * t.clarity + 1.0 * t.clarity * cobbles)
    else:
        film.melanin = t.body * base * (1.1 + 0.12 * c.noise(0.05))
    film.melanin *= 1 + 0.5 * c.rng.uniform(-0.5, 1) * fade(t.edge + 0.5, 0.4)  # darker or paler centre
    return film


def melanoma(c: Canvas, t: Trait) -> Film:
    """Asymmetric, several colours, atypical network, irregular dots, streaks on one side, blue-white veil."""
    film = Film.clear(c.size)
    rng, k = c.rng, t.clarity
    lean = rng.uniform(0, 6.28)
    side = (c.x * np.float32(np.cos(lean)) + c.y * np.float32(np.sin(lean))) / np.float32(c.radius)
    dark = np.tanh(1.5 * (c.noise(0.7 * c.radius) + 0.8 * k * side))
    mesh = c.mesh(rng.uniform(0.035, 0.06), 0.55, rng.uniform(-0.3, 0.4))
    film.melanin = t.body * t.tone * (0.95 + 0.55 * dark) * (1 - 0.4 * k + 0.9 * k * mesh * (0.5 + 0.5 * dark))
    film.blood = t.body * (rng.uniform(0.1, 0.45) + 0.3 * k * fade(-c.noise(0.5 * c.radius), 0.5))

    if rng.random() < 0.5:
        streaks = np.cos(c.theta * np.float32(rng.integers(18, 30)) + 4 * c.noise(0.35)) * 0.5 + 0.5
        rim = fade(np.abs(t.edge - 0.02) - 0.12, 0.06) * fade(0.5 - side + 0.3 * c.noise(0.1), 0.2)
        film.melanin += 1.1 * k * t.tone * rim * streaks**2

    def at(reach: float) -> tuple[float, float]:
        angle = lean + rng.normal(0, 1.0)
        return float(reach * np.cos(angle)), float(reach * np.sin(angle))

    blotch = c.blob(*at(0.4), rng.uniform(0.25, 0.45)) * t.body
    film.melanin += 1.3 * k * t.tone * blotch
    veil = c.blob(*at(0.3), rng.uniform(0.3, 0.55), soft=0.4) * t.body
    film.melanin *= 1 - 0.6 * k * veil
    film.deep += 1.0 * k * veil
    film.white += 0.22 * k * veil
    if rng.random() < 0.4:  # regression
        scar = c.blob(*at(-0.5), rng.uniform(0.2, 0.4)) * t.body
        film.melanin *= 1 - 0.8 * scar
        film.white += 0.3 * k * scar
        film.deep += 0.3 * k * c.dots(c.points(scar, 40), 0.006)
    count = int(rng.integers(6, 22))
    places = c.points(t.body * fade(-side, 0.3), count)
    film.melanin += 1.6 * k * c.dots(places, rng.uniform(0.005, 0.018, len(places)))
    return film


def keratosis(c: Canvas, t: Trait) -> Film:
    """Stuck on with a sharp border, milia-like cysts, comedo-like openings, fissures; dull and waxy."""
    film = Film.clear(c.size)
    rng, k = c.rng, t.clarity
    bumps = c.noise(0.07)
    film.melanin = t.body * 0.75 * t.tone * (1 + 0.25 * c.noise(0.4 * c.radius) + 0.15 * bumps)
    film.blood = t.body * np.float32(rng.uniform(0.05, 0.4))
    film.keratin = t.body * (0.12 + 0.1 * k * np.tanh(bumps))
    if rng.random() < 0.55:  # brain-like fissures
        fissure = fade(np.abs(c.noise(rng.uniform(0.05, 0.09))) - 0.12, 0.12)
        film.melanin += 0.8 * k * t.body * fissure
    cysts = c.points(t.body, int(rng.integers(5, 22)))
    cysts_field = c.dots(cysts, rng.uniform(0.007, 0.02, len(cysts)), 0.8) * t.body
    openings = c.points(fade(t.edge + 0.12, 0.02), int(rng.integers(3, 16)))
    openings_field = c.dots(openings, rng.uniform(0.008, 0.022, len(openings)), 0.35, 1.4)
    film.melanin += 2.2 * k * openings_field
    film.white += 0.7 * k * cysts_field * (1 - openings_field)
    return film


def basal_cell(c: Canvas, t: Trait) -> Film:
    """Pearly pink with arborising vessels, blue-grey ovoid nests, leaf-like edges, sometimes an erosion."""
    film = Film.clear(c.size)
    rng, k = c.rng, t.clarity
    film.blood = t.body * 0.35 * t.tone * (1 + 0.4 * c.noise(0.5 * c.radius))
    film.melanin = t.body * np.maximum(rng.uniform(0.0, 0.25) + 0.12 * c.noise(0.4 * c.radius), 0)
    film.white = t.body * 0.22 * fade(-c.noise(0.5 * c.radius), 0.8)
    roots = c.points(fade(t.edge + 0.1, 0.02), int(rng.integers(3, 7)))
    trees = c.vessels(roots, 0.75 * c.radius, rng.uniform(0.007, 0.011), 3)
    film.blood += 1.6 * k * trees * fade(t.edge - 0.15, 0.1)
    count = int(rng.choice([0, 3, 6, 10], p=[0.2, 0.3, 0.3, 0.2]))
    nests = c.points(fade(t.edge + 0.25, 0.02), count)
    field = c.dots(nests, rng.uniform(0.014, 0.04, len(nests)), 0.6, 1.5)
    film.deep += 1.1 * k * field
    film.melanin += 0.5 * k * field
    if rng.random() < 0.45:  # leaf-like areas along the border
        leaves = c.points(fade(np.abs(t.edge + 0.06) - 0.06, 0.01), int(rng.integers(4, 9)))
        film.melanin += 1.2 * k * c.dots(leaves, rng.uniform(0.014, 0.026, len(leaves)), 0.5, 2.0)
    if rng.random() < 0.3:  # erosion
        sore = c.blob(rng.uniform(-0.4, 0.4), rng.uniform(-0.4, 0.4), rng.uniform(0.12, 0.25), soft=0.15) * t.body
        film.blood += 1.0 * k * sore
        film.melanin += 0.8 * k * sore
    return film


def vascular(c: Canvas, t: Trait) -> Film:
    """Sharply set red to purple lacunae with pale septa between them."""
    film = Film.clear(c.size)
    rng, k = c.rng, t.clarity
    purple = max(rng.normal(0.15, 0.35), 0)
    lacunae = c.points(fade(t.edge + 0.12, 0.02), int(rng.integers(14, 34)))
    field = c.dots(lacunae, c.radius * rng.uniform(0.13, 0.3, len(lacunae)), 0.45, 1.2) * fade(t.edge, 0.08)
    septa = t.body * (1 - field)
    film.blood = t.tone * (t.body * (0.7 + 0.15 * c.noise(0.3 * c.radius)) + 0.8 * k * field)
    film.deep = purple * (0.3 * t.body + 0.7 * field)
    film.melanin = t.body * np.float32(max(rng.normal(0.05, 0.2), 0))
    film.white = 0.35 * k * septa
    if rng.random() < 0.3:  # a thrombosed lacuna
        film.melanin += 1.6 * k * c.dots(lacunae[:3], 0.14 * c.radius, 0.5)
    return film


def dermatofibroma(c: Canvas, t: Trait) -> Film:
    """Central white patch in a ring of fine, pale network."""
    film = Film.clear(c.size)
    rng, k = c.rng, t.clarity
    centre = fade(t.edge + rng.uniform(0.45, 0.7) + 0.12 * c.noise(0.3 * c.radius), 0.18)
    mesh = c.mesh(rng.uniform(0.02, 0.03), 0.25)
    ring = t.body * (1 - centre)
    film.melanin = 0.55 * t.tone * (ring * (1 - 0.5 * k + 1.0 * k * mesh) + 0.35 * centre)
    film.blood = t.body * (rng.uniform(0.1, 0.45) + 0.15 * c.noise(0.5 * c.radius))
    lines = fade(np.abs(c.noise(0.05)) - 0.2, 0.2)  # shiny white strands in the patch
    film.white = k * centre * (0.45 + 0.25 * lines)
    return film


def actinic(c: Canvas, t: Trait) -> Film:
    """Ill-defined redness around pale follicles (strawberry), rosettes and surface scale, sometimes pigment."""
    film = Film.clear(c.size)
    rng, k = c.rng, t.clarity
    spacing = rng.uniform(0.05, 0.08)
    straw = c.mesh(spacing, 0.25, 0.3)
    film.blood = t.body * t.tone * (0.45 + 0.2 * c.noise(0.4 * c.radius)) * (1 - 0.5 * k + 1.0 * k * straw)
    film.keratin = 0.3 * k * t.body * (1 - straw)
    pigment = max(rng.normal(0.15, 0.35), 0)
    film.melanin = t.body * pigment * fade(-c.noise(0.35 * c.radius), 0.6) * (0.6 + 0.6 * c.mesh(spacing, 0.25))
    scale = fade(0.9 - c.noise(0.08) - 0.5 * c.noise(0.02), 0.15) * t.body
    film.keratin += 0.55 * k * scale
    film.white += 0.3 * k * scale
    corners = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]]) * 0.011
    for place in c.points(fade(t.edge + 0.2, 0.02), int(rng.integers(2, 8))):
        film.white += 0.75 * k * c.dots(place + corners, 0.0075, 0.7)
    return film


@dataclass(frozen=True)
class Kind:
    """How the lesions of a class vary.

    Attributes:
        paint: Draws its structures.
        radius: Median, image heights.
        irregular: Range of the border's lobes, share of the radius.
        jagged: Range of the border's fine wobble, share of the radius.
        soft: Range of the border's blur, share of the radius.
        mimics: The classes an atypical lesion of this class is mistaken for.
    """

    paint: Callable[[Canvas, Trait], Film]
    radius: float
    irregular: tuple[float, float]
    jagged: tuple[float, float]
    soft: tuple[float, float]
    mimics: tuple[str, ...]


KINDS: dict[str, Kind] = {
    "akiec": Kind(actinic, 0.30, (0.1, 0.4), (0.08, 0.2), (0.15, 0.4), ("bkl", "bcc")),
    "bcc": Kind(basal_cell, 0.27, (0.1, 0.3), (0.04, 0.12), (0.1, 0.3), ("akiec", "mel", "nv")),
    "bkl": Kind(keratosis, 0.28, (0.1, 0.35), (0.03, 0.12), (0.04, 0.12), ("mel", "nv", "akiec")),
    "df": Kind(dermatofibroma, 0.26, (0.03, 0.15), (0.04, 0.1), (0.2, 0.4), ("nv", "bcc")),
    "mel": Kind(melanoma, 0.30, (0.2, 0.55), (0.06, 0.16), (0.05, 0.2), ("nv", "nv", "bkl")),
    "nv": Kind(nevus, 0.25, (0.03, 0.22), (0.02, 0.1), (0.08, 0.25), ("mel", "bkl")),
    "vasc": Kind(vascular, 0.22, (0.05, 0.25), (0.03, 0.1), (0.05, 0.15), ("bcc", "nv")),
}
ATYPICAL = {"nv": 0.06}  # nevi are two thirds of all, so a larger share would outnumber the melanomas
ATYPICAL_ELSE = 0.2


def draw_lesion(code: str, rng: np.random.Generator, height: int) -> tuple[Film, NDArray[np.bool_]]:
    """Draw one lesion.

    Args:
        code: One of `dermaflow.taxonomy.CODES`.
        rng: Source of chance; the same state draws the same lesion.
        height: Of the image it is drawn for, pixels.

    Returns:
        The film on the skin, and the lesion's mask; both on a square centred on the lesion, three radii wide.
    """
    kind = KINDS[code]
    radius = float(np.clip(kind.radius * np.exp(rng.normal(0, 0.28)), 0.13, 0.46))
    canvas = Canvas(rng, round(3.2 * radius * height), height, radius)
    edge = canvas.outline(rng.uniform(*kind.irregular), rng.uniform(*kind.jagged), np.exp(rng.normal(0, 0.14)))
    body = fade(edge, rng.uniform(*kind.soft))
    trait = Trait(body, edge, float(np.exp(rng.normal(0, 0.35))), float(np.clip(rng.beta(2.5, 1.5), 0.15, 1)))
    film = kind.paint(canvas, trait)
    if rng.random() < ATYPICAL.get(code, ATYPICAL_ELSE):
        mimic = kind.mimics[int(rng.integers(len(kind.mimics)))]
        film = film.blend(KINDS[mimic].paint(canvas, trait), rng.uniform(0.35, 0.65))
    return film, edge < 0
