"""The moving demo world: clips of one coloured shape that moves, turns, grows or stays, and their captions.

It is the demo world of `tools.demo_scenes` in motion, with its colours, shapes, places and backgrounds, and the same
pairs and share of sentences held out. `render` draws a moving scene, `caption` describes it in one of many wordings,
and `describe` reads a caption back into what it promises. Any two thirds of a clip show its motion, so that a run may
take its frames from anywhere in it.
"""

import re
from dataclasses import dataclass

import numpy as np

from tools import demo_scenes
from tools.demo_scenes import BACKGROUNDS, COLOURS, POSITIONS, SEEN_PAIRS, SURROUNDINGS, WORDS, is_held_out, pick

SIDE_PX = 64
NUM_FRAMES = 24
FPS = 8
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Motion -> where it leads, (x, y) with y pointing down."""
MOTIONS = (*DIRECTIONS, "turn", "grow", "stay")
"""The number of a motion in this order is the class of its clips."""
ROUND = frozenset({"circle", "ring"})
"""Shapes that show no turning."""
TRAVEL = 0.5
"""How far a moving shape goes in a clip, as a fraction of the side; the middle of its path is that of its lane."""
TURNS_DEGREES = (120, 180)
GROWTH = (1.9, 2.2)
"""The last radius, over the first."""
RADII = (0.17, 0.20)
"""Of shapes, and of growing ones at their largest, as fractions of the side."""

VERBS = {
    "left": ("moves to the left", "moves left", "slides to the left", "goes leftwards"),
    "right": ("moves to the right", "moves right", "slides to the right", "goes rightwards"),
    "up": ("moves up", "rises", "slides up", "goes upwards"),
    "down": ("moves down", "sinks", "slides down", "goes downwards"),
    "turn": ("turns", "rotates", "spins", "turns around"),
    "grow": ("grows", "gets larger", "gets bigger", "swells"),
    "stay": ("stays where it is", "stands still", "does not move", "rests"),
}
PLACES = {
    "left": ("at the left side", "near the left edge", "in the left part"),
    "right": ("at the right side", "near the right edge", "in the right part"),
    "top": ("at the top", "in the upper part", "near the upper edge"),
    "bottom": ("at the bottom", "in the lower part", "near the lower edge"),
    "centre": ("in the centre", "in the middle", "at the centre"),
}
_TEMPLATES = (
    "{thing} {verb} {place}",
    "{thing} {verb} {place} {surroundings}",
    "{place}, {thing} {verb}",
    "{place} {thing} {verb} {surroundings}",
    "{surroundings}, {thing} {verb} {place}",
    "a clip of {thing} that {verb} {place}",
    "{thing} that {verb}, {place} {surroundings}",
)


@dataclass(frozen=True)
class MovingScene:
    """What a clip shows. `seed` decides jitter and texture.

    position: where the shape is all the time; of a moving one, the lane that it moves along.
    """

    motion: str
    shape: str
    colour: str
    position: str
    background: str = "plain"
    seed: int = 0
    side: int = SIDE_PX
    num_frames: int = NUM_FRAMES


def lanes(motion: str) -> tuple[str, ...]:
    """The positions of scenes with a motion: a shape that moves across does so at the top, in the centre, ..."""
    across = DIRECTIONS.get(motion, (0, 0))
    return tuple(
        name
        for name, place in POSITIONS.items()
        if all(not step or at == 0.5 for step, at in zip(across, place, strict=True))
    )


def random_scene(rng: np.random.Generator, pairs: tuple[tuple[str, str], ...] = SEEN_PAIRS) -> MovingScene:
    """Draws a scene whose (colour, shape) is one of `pairs`."""
    motion = pick(rng, MOTIONS)
    able = tuple(pair for pair in pairs if motion != "turn" or pair[1] not in ROUND)
    colour, shape = pick(rng, able)
    position, background = pick(rng, lanes(motion)), pick(rng, BACKGROUNDS)
    return MovingScene(motion, shape, colour, position, background, int(rng.integers(2**62)))


def caption(scene: MovingScene, rng: np.random.Generator) -> str:
    """One wording for the scene. It may leave out the background, never the rest."""
    colour = pick(rng, tuple(word for word, value in WORDS["colour"].items() if value == scene.colour))
    noun = pick(rng, demo_scenes.nouns(scene.shape))
    return pick(rng, _TEMPLATES).format(
        thing=f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {noun}",
        verb=pick(rng, VERBS[scene.motion]),
        place=pick(rng, PLACES[scene.position]),
        surroundings=pick(rng, SURROUNDINGS[scene.background]),
    )


def captioned_scene(
    rng: np.random.Generator, pairs: tuple[tuple[str, str], ...] = SEEN_PAIRS, held_out: bool = False
) -> tuple[MovingScene, str]:
    """A random scene with a caption from the sentences of the demo set, or, with `held_out`, from the others."""
    while True:
        scene = random_scene(rng, pairs)
        text = caption(scene, rng)
        if is_held_out(text) == held_out:
            return scene, text


def describe(sentence: str) -> dict[str, str]:
    """The motion, shape, colour and position that a sentence names.

    A sentence of other words is a ValueError, as is one that names no motion.
    """
    text = sentence.lower()
    words = re.findall(r"[a-z]+", text)
    found = {
        attribute: value
        for attribute in ("shape", "colour")
        for value in [next((WORDS[attribute][word] for word in words if word in WORDS[attribute]), None)]
        if value is not None
    }
    for attribute, phrases in {"motion": VERBS, "position": PLACES}.items():
        named = [value for value, wordings in phrases.items() if any(wording in text for wording in wordings)]
        if len(named) == 1:
            found[attribute] = named[0]
    if "motion" not in found:
        raise ValueError(f"{sentence!r} names no motion; write one of: {', '.join(v[0] for v in VERBS.values())}")
    return found


def render(scene: MovingScene) -> np.ndarray:
    """The scene's clip, uint8 (T, H, W, 3)."""
    rng = np.random.default_rng(scene.seed)
    still = demo_scenes.Scene(
        scene.shape, scene.colour, scene.position, background=scene.background, width=scene.side, height=scene.side
    )
    ground = demo_scenes.background(still, rng)
    fill = np.asarray(COLOURS[scene.colour], np.float32) + rng.uniform(-10, 10, 3).astype(np.float32)
    frames = []
    for x, y, radius, turn in _path(scene, rng):
        covered = demo_scenes.shape_mask(scene.shape, scene.side, scene.side, x, y, radius, turn)
        frames.append(ground + covered[..., None] * (fill - ground))
    return np.clip(np.stack(frames) + 0.5, 0, 255).astype(np.uint8)


def _path(scene: MovingScene, rng: np.random.Generator) -> np.ndarray:
    """Centre, radius (px) and turn (radians) of the shape in each frame, (T, 4)."""
    time = np.linspace(-0.5, 0.5, scene.num_frames)[:, None]
    middle = np.array(POSITIONS[scene.position]) + rng.uniform(-0.02, 0.02, 2)
    radius, growth = rng.uniform(*RADII), rng.uniform(*GROWTH)
    turn = np.radians(rng.uniform(*TURNS_DEGREES)) * rng.choice((-1, 1))
    middle = middle + TRAVEL * np.array(DIRECTIONS.get(scene.motion, (0, 0))) * time
    radius = radius * growth ** ((time - 0.5) * (scene.motion == "grow"))
    middle = np.clip(middle, 1.15 * radius, 1 - 1.15 * radius)  # nothing is cut off
    return np.hstack([scene.side * middle, scene.side * radius, turn * (time + 0.5) * (scene.motion == "turn")])
