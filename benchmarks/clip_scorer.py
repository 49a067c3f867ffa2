"""What clips of the moving demo world show: motion, colour, shape and position.

Each frame is read as `benchmarks.scorer` reads a picture, with outlines at any turn. Frames vote for the colour and
the shape. Straight lines through the middle, the size and the angle over time say how the thing moves: the largest of
travel, growth and turn, each beside its own threshold.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from benchmarks.scorer import TEMPLATE_BLURS, blurred, colour_of, in_lab, normalised, things
from tools.demo_clips import DIRECTIONS, MOTIONS, ROUND, MovingScene, captioned_scene, describe, lanes
from tools.demo_scenes import POSITIONS, SHAPES, SUBJECT, shape_mask

ATTRIBUTES = ("motion", "colour", "shape", "position")
LEAST_TRAVEL = 0.12
"""Of a moving thing over a clip, as a fraction of the side."""
LEAST_GROWTH = 1.25
LEAST_TURN_DEGREES = 30
LEAST_SEEN = 0.75
"""The share of the frames that must show something."""
MANY_FRAMES = 16
"""Of fewer, each is read: from one to the next a shape may not turn by half of its symmetry."""
SYMMETRY = {"square": 4, "triangle": 3, "star": 5, "cross": 4, "circle": 1, "ring": 1, SUBJECT: 1}
"""How many turns of a shape look the same."""
TEMPLATE_STEP_DEGREES = 9


@dataclass(frozen=True)
class Seen:
    """What a clip shows; None where nothing stands out of the background, or what does moves in no way that is known:
    shrinks, or jumps."""

    motion: str | None = None
    colour: str | None = None
    shape: str | None = None
    position: str | None = None


def score(clip: np.ndarray, wanted: dict[str, str]) -> dict[str, bool]:
    """Which of the wanted attributes a clip, uint8 RGB (T, H, W, 3), shows; see `tools.demo_clips.describe`."""
    seen = look(clip)
    return {name: getattr(seen, name) == value for name, value in wanted.items()}


def accuracy(clips: Sequence[np.ndarray], wanted: Sequence[dict[str, str]]) -> dict[str, float]:
    """The share of clips that show each attribute that is wanted of them, and all of them together; as `direction`,
    the share of right motions among the clips that should lead somewhere."""
    results = [score(*pair) for pair in zip(clips, wanted, strict=True)]
    led = [result["motion"] for result, one in zip(results, wanted, strict=True) if one.get("motion") in DIRECTIONS]
    names = [name for name in ATTRIBUTES if name in results[0]]
    shares = {name: float(np.mean([result[name] for result in results])) for name in names}
    shares |= {"direction": float(np.mean(led))} if led else {}
    return shares | {"all": float(np.mean([all(result.values()) for result in results]))}


def sentences(number: int, pairs: Sequence[tuple[str, str]], seed: int) -> list[tuple[MovingScene, str]]:
    """Moving scenes with sentences that the demo set never uses."""
    rng = np.random.default_rng(seed)
    return [captioned_scene(rng, tuple(pairs), held_out=True) for _ in range(number)]


def attributes_of(sentence: str) -> dict[str, str]:
    """What a sentence, or the name of a motion, asks for."""
    return {"motion": sentence} if sentence in MOTIONS else describe(sentence)


def look(clip: np.ndarray, shapes: Sequence[str] = SHAPES) -> Seen:
    """Reads a clip, uint8 RGB (T, H, W, 3), of any size, that shows one of `shapes`, if any: every second frame where
    there are many."""
    found, clip = [], clip[::2] if len(clip) >= MANY_FRAMES else clip
    for number, frame in enumerate(clip):
        lab = in_lab(frame)
        if masks := things(lab):
            mask = max(masks, key=np.count_nonzero)
            found.append((number, colour_of(lab, mask), mask))
    if len(found) < max(2, LEAST_SEEN * len(clip)):
        return Seen()
    times, colours, masks = zip(*found, strict=True)
    shape = _majority([_shape(mask, tuple(shapes)) for mask in masks])
    middles = np.array([middle_of(mask) for mask in masks])
    motion = _motion(np.array(times) / (len(clip) - 1), middles, masks, shape)
    return Seen(motion, _majority(colours), shape, _position(middles.mean(axis=0), motion))


def _majority(votes: Sequence[str]) -> str:
    return Counter(votes).most_common(1)[0][0]


def middle_of(mask: np.ndarray) -> tuple[float, float]:
    """(x, y) of the middle of a mask's box, as fractions of width and height."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (columns[0] + columns[-1] + 1) / 2 / mask.shape[1], (rows[0] + rows[-1] + 1) / 2 / mask.shape[0]


def _motion(times: np.ndarray, middles: np.ndarray, masks: Sequence[np.ndarray], shape: str) -> str | None:
    """times: 0 to 1 over the clip, (n,). middles: (n, 2). masks: n of (H, W)."""
    travel = np.polyfit(times, middles, 1)[0]
    growth = np.polyfit(times, [0.5 * np.log(mask.sum()) for mask in masks], 1)[0]
    turn = 0.0 if shape in ROUND else np.polyfit(times, _angles(masks, SYMMETRY[shape]), 1)[0]
    direction = max(DIRECTIONS, key=lambda name: np.dot(DIRECTIONS[name], travel))
    sizes = {
        direction: np.hypot(*travel) / LEAST_TRAVEL,
        "grow" if growth > 0 else None: abs(growth) / np.log(LEAST_GROWTH),
        "turn": abs(turn) / np.radians(LEAST_TURN_DEGREES),
    }
    largest = max(sizes, key=lambda name: sizes[name])
    return largest if sizes[largest] >= 1 else "stay"


def _angles(masks: Sequence[np.ndarray], symmetry: int) -> np.ndarray:
    """The angle of a shape in each mask, radians, without jumps of a whole symmetry."""
    phases = []
    for mask in masks:
        y, x = np.nonzero(mask)
        offsets = (x - x.mean()) + 1j * (y - y.mean())
        # Far points say most of the angle: the corners.
        phases.append(np.angle((np.abs(offsets) ** 2 * (offsets / (np.abs(offsets) + 1e-6)) ** symmetry).sum()))
    return np.unwrap(phases) / symmetry


def _position(middle: np.ndarray, motion: str | None) -> str:
    """The nearest place; of what moves, the nearest lane, wherever in it the thing is."""
    across = np.abs(DIRECTIONS.get(motion, (0, 0)))

    def distance(name: str) -> float:
        return float(np.sum((1 - across) * (middle - POSITIONS[name]) ** 2))

    return min(lanes(motion), key=distance)


def _shape(mask: np.ndarray, shapes: tuple[str, ...]) -> str:
    names, templates = _templates(shapes)
    outline = normalised(mask).ravel()
    overlaps = (templates & outline).sum(axis=1) / (templates | outline).sum(axis=1)
    return names[int(np.argmax(overlaps))]


@cache
def _templates(shapes: tuple[str, ...]) -> tuple[list[str], np.ndarray]:
    """Outlines (n, pixels) of the shapes at every turn, sharp and as a blurred picture shows them, and their names."""
    names, outlines = [], []
    for shape in shapes:
        period = 1 if shape in ROUND else 360 / SYMMETRY[shape]
        for degrees in np.arange(0, period, TEMPLATE_STEP_DEGREES):
            sharp = shape_mask(shape, 256, 256, 128, 128, 60, np.radians(degrees))
            outlines += [normalised(blurred(sharp, blur) > 0.5).ravel() for blur in TEMPLATE_BLURS]
            names += [shape] * len(TEMPLATE_BLURS)
    return names, np.stack(outlines)
