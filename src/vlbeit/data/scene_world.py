"""The drawn world: what a scene can hold, how one is drawn by lot, and how it is painted.

A scene is one or two groups of equal figures on a patterned ground. All attributes of a group
are uniform and independent of each other, of the other group and of the ground. This is what
keeps captions from giving a hidden word away: nothing in a text says anything about the rest of
the text. The layout makes every combination fit, so that no combination has to be refused
(refusing would make attributes depend on each other again).

Lengths are in units of 1/40 of the picture's side; one unit is one pixel at the default size.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from PIL import Image, ImageDraw

from vlbeit.draws import Draws

COLOURS: Final = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES: Final = ("ring", "square", "triangle", "star", "cross")
SIZES: Final = ("small", "large")
TEXTURES: Final = ("plain", "striped", "dotted")
COUNTS: Final = ("one", "two", "three")
PLACES: Final = ("left", "right", "top", "bottom", "middle")
DIRECTIONS: Final = ("left", "right", "above", "below")
TONES: Final = ("white", "grey", "black", "brown", "pink")
PATTERNS: Final = ("flat", "lined", "barred", "checked", "shaded")

SIDE: Final = 40
"""Units along a side of the picture, whatever its size in pixels."""
CELL: Final = 8
"""Figures are centred on a grid of this many units, so that a patch of 8 units shows few looks of a
figure. It is what lets a tiny model name shapes soon (docs/notebook.md)."""
SUPERSAMPLE: Final = 4
LIGHT: Final = 0.04
"""How far the light of a scene may strengthen or weaken a colour channel."""
TWO_GROUPS: Final = 0.2
"""Share of scenes with two groups."""

_RGB: Final = {
    "red": (214, 30, 36),
    "green": (36, 160, 58),
    "blue": (34, 76, 224),
    "yellow": (246, 222, 30),
    "purple": (138, 40, 176),
    "orange": (250, 130, 16),
}
# The two shades of each tone. Little saturation and far in lightness or hue from every figure.
_TONE_RGB: Final = {
    "white": ((250, 250, 250), (206, 210, 214)),
    "grey": ((148, 150, 152), (104, 106, 110)),
    "black": ((20, 20, 24), (66, 68, 74)),
    "brown": ((122, 96, 74), (82, 62, 46)),
    "pink": ((250, 214, 222), (220, 168, 182)),
}
_DIAMETER: Final = {"small": 9.0, "large": 13.0}


@dataclass(frozen=True)
class Ground:
    """What lies behind the figures."""

    tone: str
    pattern: str


@dataclass(frozen=True)
class Group:
    """One to three equal figures at one place.

    `spots` are the centres (x, y) of the figures, x to the right and y downwards, in units.
    """

    colour: str
    shape: str
    size: str
    texture: str
    count: str
    place: str
    spots: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class World:
    """All that is true of a picture. Two groups lie at opposite places, in random order."""

    groups: tuple[Group, ...]
    ground: Ground
    light: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """What red, green and blue are multiplied with: no two scenes are lit alike, so no held-out
    picture was ever seen."""


def draw_world(draws: Draws, wanted: Iterable[tuple[str, str]] = ()) -> World:
    """A world by lot: `TWO_GROUPS` of them with two groups, everything else uniform.

    `wanted` are values by kind ("colour", "shape", "size", "texture") that one of the groups
    gets instead of drawn ones.
    """
    places: tuple[str, ...] = (draws.choice(PLACES),)
    if draws.uniform() < TWO_GROUPS:
        opposite = draws.choice((("left", "right"), ("top", "bottom")))
        places = opposite if draws.uniform() < 0.5 else opposite[::-1]
    groups = [
        _draw_group(draws, place, {} if i else dict(wanted)) for i, place in enumerate(places)
    ]
    ground = Ground(draws.choice(TONES), draws.choice(PATTERNS))
    red, green, blue = (1 + LIGHT * (2 * draws.uniforms(3) - 1)).tolist()
    return World(tuple(groups), ground, (red, green, blue))


def _draw_group(draws: Draws, place: str, wanted: Mapping[str, str]) -> Group:
    drawn = {
        "colour": draws.choice(COLOURS),
        "shape": draws.choice(SHAPES),
        "size": draws.choice(SIZES),
        "texture": draws.choice(TEXTURES),
        "count": draws.choice(COUNTS),
        **wanted,
    }
    spots = _spots(draws, place, drawn["size"], COUNTS.index(drawn["count"]) + 1)
    return Group(**drawn, place=place, spots=spots)


def _spots(draws: Draws, place: str, size: str, count: int) -> tuple[tuple[float, float], ...]:
    """Centres such that figures do not touch and stay on their half.

    A group at the left or right stands in a column, at the top or bottom in a row. Centres are
    centres of the `CELL` x `CELL` cells, so that a patch of that size shows few looks of a figure;
    only three figures in the middle and three large ones in a line stand off the grid.
    """
    if place == "middle":
        sign = draws.choice((-1, 1))
        relative = {
            1: ((0, 0),),
            2: ((-8, 0), (8, 0)),
            3: ((0, -8 * sign), (-8, 4 * sign), (8, 4 * sign)),
        }[count]
        if draws.uniform() < 0.5:
            relative = tuple((y, x) for x, y in relative)
        return tuple((20 + x, 20 + y) for x, y in relative)

    across = draws.choice((4, 12)) if size == "small" else 12
    along: tuple[float, ...]
    # Away from the border a group must be centred: off it, the corner would be as near as the side.
    if count == 1:
        along = (draws.choice((12, 20, 28)) if across == 4 else 20,)
    elif count == 2:
        along = draws.choice(((12, 28), (4, 20), (20, 36))) if across == 4 else (12, 28)
    else:
        along = (4, 20, 36) if size == "small" else (6.5, 20, 33.5)
    if place in ("right", "bottom"):
        across = SIDE - across
    pairs = [(across, at) for at in along]
    return tuple(pairs if place in ("left", "right") else ((x, y) for y, x in pairs))


def paint(world: World, size: int = SIDE) -> Image.Image:
    """The picture, RGB, size x size; drawn at four times the size and averaged down."""
    canvas = _ground(world.ground, size * SUPERSAMPLE).copy()
    for group in world.groups:
        for figure, stencil, corner in _figures(group, size):
            canvas.paste(figure, corner, stencil)
    lit = np.asarray(canvas.reduce(SUPERSAMPLE)) * np.array(world.light)
    return Image.fromarray(np.rint(lit).clip(0, 255).astype(np.uint8))


def paint_segmentation(world: World, size: int = SIDE) -> Image.Image:
    """The map of the same picture, mode L: 1 + index in SHAPES where the figures of a group
    cover at least half of a pixel, else 0."""
    painted = Image.new("L", (size, size))
    for group in world.groups:
        canvas = Image.new("L", (size * SUPERSAMPLE, size * SUPERSAMPLE))
        for _, stencil, corner in _figures(group, size):
            canvas.paste(255, corner, stencil)
        covered = canvas.reduce(SUPERSAMPLE).point([0] * 128 + [255] * 128)
        painted.paste(1 + SHAPES.index(group.shape), (0, 0), covered)
    return painted


def _figures(group: Group, size: int) -> Iterator[tuple[Image.Image, Image.Image, tuple[int, int]]]:
    """Colours, stencil and upper left corner of each figure, at the full resolution."""
    scale = size * SUPERSAMPLE / SIDE
    figure, stencil = _figure(group.shape, group.colour, group.texture, group.size, scale)
    for x, y in group.spots:
        half = stencil.width // 2
        yield figure, stencil, (round(x * scale) - half, round(y * scale) - half)


@lru_cache(maxsize=256)
def _ground(ground: Ground, side: int) -> Image.Image:
    """The empty ground. Every pattern repeats after 8 units or less, or changes with the height
    only, so that a hidden patch follows from the patches around it."""
    light, dark = (np.array(rgb, dtype=np.float64) for rgb in _TONE_RGB[ground.tone])
    steps = (np.arange(side) + 0.5) * SIDE / side
    x, y = steps[None, :], steps[:, None]
    patterns: dict[str, Callable[[], np.ndarray]] = {
        "flat": lambda: np.zeros((side, side)),
        "lined": lambda: (y % 4 >= 2) + 0.0 * x,
        "barred": lambda: (x % 4 >= 2) + 0.0 * y,
        "checked": lambda: (((x // 4) + (y // 4)) % 2) * 1.0,
        "shaded": lambda: y / SIDE + 0.0 * x,
    }
    share = patterns[ground.pattern]()[..., None]
    return Image.fromarray(np.rint(light + (dark - light) * share).astype(np.uint8))


@lru_cache(maxsize=4096)
def _figure(
    shape: str, colour: str, texture: str, size: str, scale: float
) -> tuple[Image.Image, Image.Image]:
    """One figure at full resolution: its colours (RGB) and its stencil (L, 0 or 255).

    Stripes are lighter and dots darker than the figure, so the two differ at any size. Figures of
    one size have about the same area; none is wider than its diameter by more than 12 %.
    """
    radius = _DIAMETER[size] / 2 * scale
    half = math.ceil(radius * 1.15) + 1
    side = 2 * half
    stencil = Image.new("L", (side, side))
    pen = ImageDraw.Draw(stencil)
    if shape == "ring":  # a filled circle is easily taken for a square at nine pixels
        pen.ellipse(_box(half, radius), fill=255)
        pen.ellipse(_box(half, radius * 0.45), fill=0)
    elif shape == "square":
        pen.rectangle(_box(half, radius * 0.88), fill=255)
    elif shape == "triangle":
        points = [(-1.03, 0.9), (1.03, 0.9), (0.0, -1.0)]
        pen.polygon([(half + radius * x, half + radius * y) for x, y in points], fill=255)
    elif shape == "star":
        tips = []
        for k in range(10):
            reach = radius * (1.12 if k % 2 == 0 else 0.46)
            angle = -math.pi / 2 + k * math.pi / 5
            tips.append((half + reach * math.cos(angle), half + reach * math.sin(angle)))
        pen.polygon(tips, fill=255)
    else:
        arm = radius * 0.34
        pen.rectangle((half - radius, half - arm, half + radius - 1, half + arm - 1), fill=255)
        pen.rectangle((half - arm, half - radius, half + arm - 1, half + radius - 1), fill=255)

    rgb = np.array(_RGB[colour], dtype=np.float64)
    figure = np.broadcast_to(rgb, (side, side, 3)).copy()
    offsets = (np.arange(side) + 0.5 - half) / scale
    if texture == "striped":
        figure[np.abs((offsets + 0.8) % 3.2) < 1.6] = rgb + (255 - rgb) * 0.55
    elif texture == "dotted":
        near = np.abs(offsets % 4.0 - 2.0)
        figure[near[:, None] ** 2 + near[None, :] ** 2 < 1.15**2] = rgb * 0.38
    return Image.fromarray(np.rint(figure).astype(np.uint8)), stencil


def _box(half: int, radius: float) -> tuple[float, float, float, float]:
    return (half - radius, half - radius, half + radius - 1, half + radius - 1)
