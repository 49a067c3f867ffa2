"""The demo world: scenes of coloured shapes on textured backgrounds, their pictures and their captions.

A scene is a shape, a colour, a position, a count, a size and a background. `render` draws it, `caption` describes it
in one of many wordings, and `describe` reads a caption back into what it promises, so that a scorer can compare a
picture with any sentence made of these words. Everything follows from the generator handed in: the same seed, the
same scenes.

Some (colour, shape) pairs and one sentence in eight are held out: the demo set never shows them.
"""

import re
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b

import cv2
import numpy as np

COLOURS = {
    "red": (222, 36, 36),
    "orange": (246, 134, 16),
    "yellow": (250, 226, 46),
    "green": (36, 164, 66),
    "cyan": (36, 202, 214),
    "blue": (40, 76, 224),
    "purple": (136, 52, 190),
    "pink": (250, 112, 184),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SUBJECT = "heart"
"""A shape that no scene of the demo set has and no caption names, to be taught afterwards."""
POSITIONS = {
    "left": (0.27, 0.5),
    "right": (0.73, 0.5),
    "top": (0.5, 0.27),
    "bottom": (0.5, 0.73),
    "centre": (0.5, 0.5),
}
"""Name -> where the scene's middle lies, as fractions (x, y) of width and height."""
BACKGROUNDS = ("plain", "gradient", "stripes", "checker", "noise")
SIZES = {"small": 0.42, "medium": 0.47, "large": 0.52}
"""Name -> diameter of a single shape as a fraction of the square root of the picture's area."""
FORMATS_WH = ((128, 128), (160, 96), (96, 160))
UNSEEN_PAIRS = frozenset(
    {
        ("red", "star"),
        ("orange", "ring"),
        ("yellow", "square"),
        ("green", "triangle"),
        ("blue", "circle"),
        ("purple", "cross"),
    }
)
SEEN_PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in UNSEEN_PAIRS)

WORDS = {
    "colour": {"violet": "purple", "turquoise": "cyan"} | {name: name for name in COLOURS},
    "shape": {
        **{"circle": "circle", "circles": "circle", "disc": "circle", "discs": "circle"},
        **{"square": "square", "squares": "square", "box": "square", "boxes": "square"},
        **{"triangle": "triangle", "triangles": "triangle"},
        **{"star": "star", "stars": "star"},
        **{"cross": "cross", "crosses": "cross", "plus": "cross", "pluses": "cross"},
        **{"ring": "ring", "rings": "ring", "hoop": "ring", "hoops": "ring"},
    },
    "position": {
        **{"left": "left", "right": "right", "top": "top", "upper": "top", "bottom": "bottom", "lower": "bottom"},
        **{"centre": "centre", "middle": "centre"},
    },
    "count": {"a": 1, "an": 1, "one": 1, "single": 1, "two": 2, "pair": 2, "three": 3},
    "size": {"small": "small", "little": "small", "tiny": "small", "large": "large", "big": "large", "huge": "large"},
    "background": {
        **{"plain": "plain", "gradient": "gradient", "fading": "gradient", "striped": "stripes", "stripes": "stripes"},
        **{"checkered": "checker", "checks": "checker", "noisy": "noise", "grainy": "noise"},
    },
}
"""Attribute -> the words that name a value of it; the first word of a value is not special."""

REACH = 1.35
"""How far the corners of a shape of radius 1 are from its middle, at most."""

_PLURALS = {"circle": "circles", "disc": "discs", "square": "squares", "box": "boxes", "triangle": "triangles"} | {
    **{"star": "stars", "cross": "crosses", "plus": "pluses", "ring": "rings", "hoop": "hoops"},
}
_PLACES = {
    "left": ("on the left", "at the left side", "on the left of the picture", "near the left edge"),
    "right": ("on the right", "at the right side", "on the right of the picture", "near the right edge"),
    "top": ("at the top", "in the upper part", "at the top of the picture", "near the upper edge"),
    "bottom": ("at the bottom", "in the lower part", "at the bottom of the picture", "near the lower edge"),
    "centre": ("in the centre", "in the middle", "in the middle of the picture", "at the centre"),
}
SURROUNDINGS = {
    "plain": ("on a plain background", "on plain ground"),
    "gradient": ("on a gradient", "on a fading background"),
    "stripes": ("on a striped background", "in front of stripes"),
    "checker": ("on a checkered background", "in front of checks"),
    "noise": ("on a noisy background", "on grainy ground"),
}
_TEMPLATES = (
    "{things} {place}",
    "{things} {place} {surroundings}",
    "{things} {surroundings}, {place}",
    "{place}, {things}",
    "{place} {things} {surroundings}",
    "there is {things} {place}",
    "a picture of {things} {place}",
    "a drawing with {things} {place} {surroundings}",
    "{surroundings}: {things} {place}",
    "{things} seen {place}",
)


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `seed` decides jitter and texture; `spoiled` scenes are what a score filter drops."""

    shape: str
    colour: str
    position: str
    count: int = 1
    size: str = "medium"
    background: str = "plain"
    width: int = 128
    height: int = 128
    seed: int = 0
    spoiled: bool = False


def random_scene(rng: np.random.Generator, pairs: tuple[tuple[str, str], ...] = SEEN_PAIRS, spoiled=0.0) -> Scene:
    """Draws a scene whose (colour, shape) is one of `pairs`; it is spoiled with the given probability."""
    colour, shape = pairs[rng.integers(len(pairs))]
    position = pick(rng, tuple(POSITIONS))
    count = int(rng.choice(3, p=(0.80, 0.12, 0.08))) + 1
    # A row of shapes runs down at the sides and across elsewhere; that side of the picture must not be the short one.
    formats = [
        (w, h) for w, h in FORMATS_WH if count == 1 or (h if position in ("left", "right") else w) >= 128 or w == h
    ]
    width, height = formats[rng.integers(len(formats))]
    size = pick(rng, tuple(SIZES))
    background = pick(rng, BACKGROUNDS)
    return Scene(
        shape,
        colour,
        position,
        count,
        size,
        background,
        width,
        height,
        int(rng.integers(2**62)),
        rng.random() < spoiled,
    )


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One wording for the scene, 4 to 18 words. It may leave out the size and the background, never the rest."""
    colour = pick(rng, tuple(word for word, value in WORDS["colour"].items() if value == scene.colour))
    noun = pick(rng, nouns(scene.shape))
    sizes = tuple(word for word, value in WORDS["size"].items() if value == scene.size)
    adjectives = f"{pick(rng, sizes)} {colour}" if sizes and rng.random() < 0.5 else colour
    if scene.count == 1:
        article = "an" if adjectives[0] in "aeiou" else "a"
        things = f"{pick(rng, (article, article, 'one', 'a single'))} {adjectives} {noun}"
    else:
        number = "three" if scene.count == 3 else pick(rng, ("two", "two", "a pair of"))
        things = f"{number} {adjectives} {_PLURALS[noun]}"
    text = pick(rng, _TEMPLATES).format(
        things=things,
        place=pick(rng, _PLACES[scene.position]),
        surroundings=pick(rng, SURROUNDINGS[scene.background]),
    )
    return text.replace("there is", "there are") if scene.count > 1 else text


def nouns(shape: str) -> tuple[str, ...]:
    """The words for one such shape."""
    return tuple(word for word, value in WORDS["shape"].items() if value == shape and word in _PLURALS)


def is_held_out(sentence: str) -> bool:
    """True for the one sentence in eight that the demo set never uses."""
    return blake2b(sentence.lower().encode(), digest_size=1).digest()[0] % 8 == 0


def captioned_scene(
    rng: np.random.Generator, pairs: tuple[tuple[str, str], ...] = SEEN_PAIRS, held_out=False, spoiled=0.0
) -> tuple[Scene, str]:
    """A random scene with a caption from the sentences of the demo set, or, with `held_out`, from the others."""
    while True:
        scene = random_scene(rng, pairs, spoiled)
        text = caption(scene, rng)
        if is_held_out(text) == held_out:
            return scene, text


def describe(sentence: str) -> dict[str, str | int]:
    """The attributes a sentence names, e.g. {"colour": "red", "shape": "star", "position": "left", "count": 1}.

    Words outside the demo world are passed over. A sentence that names no shape is a ValueError.
    """
    found: dict[str, str | int] = {}
    words = re.findall(r"[a-z]+", sentence.lower())
    for attribute, values in WORDS.items():
        named = [values[word] for word in words if word in values]
        if named:
            found[attribute] = max(named) if attribute == "count" else named[0]
    if "shape" not in found:
        raise ValueError(f"{sentence!r} names no shape; write one of: {', '.join(SHAPES)}")
    return found


def render(scene: Scene) -> np.ndarray:
    """The scene's picture, uint8 (H, W, 3)."""
    rng = np.random.default_rng(scene.seed)
    picture = background(scene, rng)
    coverage = np.zeros((scene.height, scene.width), np.float32)
    for x, y, radius in _layout(scene, rng):
        coverage = np.maximum(coverage, shape_mask(scene.shape, scene.height, scene.width, x, y, radius))
    fill = np.asarray(COLOURS[scene.colour], np.float32) + rng.uniform(-10, 10, 3).astype(np.float32)
    shading = np.linspace(1.06, 0.94, scene.height, dtype=np.float32)[:, None, None]
    picture += coverage[..., None] * (fill * shading - picture)
    if scene.spoiled:
        picture = 0.55 * picture + 60 + rng.normal(0, 26, picture.shape).astype(np.float32)
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def score(scene: Scene, rng: np.random.Generator) -> float:
    """A made-up aesthetic score: 5 to 7 for a clean picture, 3 to 4.4 for a spoiled one."""
    return round(float(rng.uniform(3.0, 4.4) if scene.spoiled else rng.uniform(5.0, 7.0)), 3)


def shape_mask(
    shape: str, height: int, width: int, x: float, y: float, radius: float, turn: float = 0.0
) -> np.ndarray:
    """How much of each pixel a shape around (x, y) covers: float32 (height, width) in 0..1, anti-aliased.

    turn: clockwise, in radians.
    """
    left, top = int(x - REACH * radius), int(y - REACH * radius)
    side = int(2 * REACH * radius) + 2
    canvas = np.zeros((4 * side, 4 * side), np.uint8)
    middle = np.array([x - left, y - top])
    turned = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    for points, value in _outlines(shape):
        cv2.fillPoly(canvas, [np.round(4 * 16 * (middle + radius * points @ turned)).astype(np.int32)], value, shift=4)
    patch = cv2.resize(canvas, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    mask = np.zeros((height, width), np.float32)
    y0, y1, x0, x1 = max(top, 0), min(top + side, height), max(left, 0), min(left + side, width)
    mask[y0:y1, x0:x1] = patch[y0 - top : y1 - top, x0 - left : x1 - left]
    return mask


def pick(rng: np.random.Generator, options: tuple):
    """One of the options, each as likely as the others."""
    return options[rng.integers(len(options))]


@cache
def _outlines(shape: str) -> tuple[tuple[np.ndarray, int], ...]:
    """Polygons (points (P, 2), fill value) of a shape of radius 1 around the origin, y pointing down."""
    turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    disc = np.stack([np.cos(turn), np.sin(turn)], 1)
    if shape == "circle":
        return ((0.92 * disc, 255),)
    if shape == "ring":
        return ((disc, 255), (0.55 * disc, 0))
    if shape == "square":
        return ((0.82 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]), 255),)
    if shape == "triangle":
        return ((np.array([[0, -1.0], [1.05, 0.82], [-1.05, 0.82]]), 255),)
    if shape == "star":
        angles = -np.pi / 2 + np.arange(10) * np.pi / 5
        radii = np.where(np.arange(10) % 2 == 0, 1.12, 0.46)
        return ((np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1), 255),)
    if shape == "cross":
        a = 0.34
        corners = [
            (-a, -1),
            (a, -1),
            (a, -a),
            (1, -a),
            (1, a),
            (a, a),
            (a, 1),
            (-a, 1),
            (-a, a),
            (-1, a),
            (-1, -a),
            (-a, -a),
        ]
        return ((np.array(corners), 255),)
    if shape == SUBJECT:
        sine, cosine = np.sin(turn), np.cos(turn)
        height = 13 * cosine - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        return ((np.stack([16 * sine**3, -height], 1) / 15.5, 255),)
    raise ValueError(f"unknown shape {shape!r}; there are {', '.join(SHAPES)}")


def _layout(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Centre and radius (x, y, radius in px) of each shape of the scene."""
    unit = (scene.width * scene.height) ** 0.5
    fx, fy = POSITIONS[scene.position]
    down = scene.position in ("left", "right")
    length = scene.height if down else scene.width
    # A large shape at the top of a low picture must not reach so far down that it seems to be in the centre.
    radius = min(0.5 * unit * SIZES[scene.size] * rng.uniform(0.95, 1.05), 0.31 * min(scene.width, scene.height))
    if scene.count > 1:
        radius = min(radius, 0.94 * length / (2.5 * scene.count))
    middle = np.array([fx * scene.width, fy * scene.height]) + rng.uniform(-0.02, 0.02, 2) * unit
    gap = 2.45 * radius + rng.uniform(0, 0.02) * unit
    offsets = (np.arange(scene.count) - (scene.count - 1) / 2) * gap
    places = middle + offsets[:, None] * (np.array([0, 1]) if down else np.array([1, 0]))
    reach = 1.12 * radius + 1
    low, high = places.min(0) - reach, places.max(0) + reach
    size = np.array([scene.width, scene.height])
    places += np.maximum(-low, 0) - np.maximum(high - size, 0)
    return [(float(x), float(y), float(radius)) for x, y in places]


def background(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A texture of muted tones, float32 (H, W, 3)."""
    shape = (scene.height, scene.width)
    first = _muted(rng)
    second = np.clip(first + rng.choice((-1, 1)) * rng.uniform(10, 22), 20, 235)
    rows, columns = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    if scene.background == "plain":
        blend = np.zeros(shape, np.float32)
    elif scene.background == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        blend = np.cos(angle) * (columns / shape[1] - 0.5) + np.sin(angle) * (rows / shape[0] - 0.5)
        blend = blend * 1.4 + 0.5
    elif scene.background == "stripes":
        angle, period = rng.uniform(0, np.pi), rng.uniform(12, 28)
        wave = np.sin(2 * np.pi * (np.cos(angle) * columns + np.sin(angle) * rows) / period)
        blend = np.clip(2.5 * wave, -1, 1) * 0.5 + 0.5
    elif scene.background == "checker":
        cell = rng.uniform(10, 20)
        blend = ((columns // cell + rows // cell) % 2).astype(np.float32)
    else:
        blend = rng.random(shape, np.float32)
    return (first + blend[..., None] * (second - first)).astype(np.float32)


def _muted(rng: np.random.Generator) -> np.ndarray:
    """A greyish tone, three values 89 to 171 that differ by at most 12."""
    return rng.uniform(95, 165) + rng.uniform(-6, 6, 3)
