"""What pictures of the demo world show, and how near they are to true ones.

The scorer finds the saturated shapes on the muted background, then compares their outline with each shape's templates
(intersection over union at equal area), their median colour with each colour (in Lab), and the middle of all of them
with each position's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
import torch

from families.common.pictures import image_metrics
from tools.demo_scenes import COLOURS, POSITIONS, SHAPES, Scene, captioned_scene, describe, shape_mask

ATTRIBUTES = ("colour", "position", "shape", "count")
_WORKING_SIDE_PX = 256
"""Pictures are scaled until the square root of their area is this, so that thresholds hold for every size."""
_LEAST_CHROMA = 22.0
"""Backgrounds stay below 12 in Lab chroma, every colour of the demo world is above 40."""
_TEMPLATE_PX = 64
TEMPLATE_BLURS = (4.0, 12.0)
"""Deviations of the blur on a shape of radius 60 px."""


@dataclass(frozen=True)
class Found:
    """What a picture shows; None where nothing stands out of the background."""

    colour: str | None
    position: str | None
    shape: str | None
    count: int


def score(picture: np.ndarray, wanted: dict[str, str | int]) -> dict[str, bool]:
    """Which of the wanted attributes the picture shows.

    `picture` is uint8 RGB (H, W, 3) of any size, `wanted` holds some of "colour", "position", "shape" and "count" as
    `tools.demo_scenes.describe` returns them; other attributes are passed over.
    """
    found = find(picture)
    return {name: getattr(found, name) == value for name, value in wanted.items() if hasattr(found, name)}


def find(picture: np.ndarray, shapes: Sequence[str] = SHAPES) -> Found:
    """Reads a picture, uint8 RGB (H, W, 3), that shows one of `shapes`, if any."""
    lab = in_lab(picture)
    masks = things(lab)
    if not masks:
        return Found(None, None, None, 0)
    together = np.any(masks, axis=0)
    votes = [_shape(mask, shapes) for mask in masks]
    return Found(colour_of(lab, together), _position(together), max(votes, key=votes.count), len(masks))


def in_lab(picture: np.ndarray) -> np.ndarray:
    """A picture, uint8 RGB (H, W, 3), in Lab and at the working size: float32 (H', W', 3)."""
    scale = _WORKING_SIDE_PX / (picture.shape[0] * picture.shape[1]) ** 0.5
    picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    picture = cv2.GaussianBlur(picture, (0, 0), 1.5)
    return cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)


def things(lab: np.ndarray) -> list[np.ndarray]:
    """Masks (H, W) bool of the shapes: connected, and in chroma nearer to the strongest than to the background."""
    chroma = np.hypot(lab[..., 1], lab[..., 2])
    strongest = np.sort(chroma, axis=None)[-chroma.size // 100 :].mean()
    if strongest < _LEAST_CHROMA:
        return []
    threshold = max(0.5 * (strongest + np.median(chroma)), 0.75 * _LEAST_CHROMA)
    _, labels, statistics, _ = cv2.connectedComponentsWithStats((chroma > threshold).astype(np.uint8), connectivity=4)
    areas = statistics[1:, cv2.CC_STAT_AREA]
    least = max(0.004 * chroma.size, 0.25 * areas.max())
    return [labels == i + 1 for i in np.flatnonzero(areas >= least)]


def colour_of(lab: np.ndarray, mask: np.ndarray) -> str:
    """The colour of the demo world that is nearest to a picture's (H, W, 3), in Lab, where the mask (H, W) is."""
    inside = cv2.erode(mask.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
    mean = np.median(lab[inside if inside.any() else mask], axis=0)
    names = list(COLOURS)
    known = cv2.cvtColor(np.array([list(COLOURS.values())], np.float32) / 255, cv2.COLOR_RGB2LAB)[0]
    return names[int(np.argmin(((known - mean) ** 2 * (0.25, 1, 1)).sum(1)))]


def _position(mask: np.ndarray) -> str:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x = (columns[0] + columns[-1] + 1) / 2 / mask.shape[1]
    y = (rows[0] + rows[-1] + 1) / 2 / mask.shape[0]
    return min(POSITIONS, key=lambda name: (POSITIONS[name][0] - x) ** 2 + (POSITIONS[name][1] - y) ** 2)


def _shape(mask: np.ndarray, shapes: Sequence[str]) -> str:
    outline = normalised(mask)

    def overlap(shape: str) -> float:
        return max((outline & template).sum() / (outline | template).sum() for template in _templates(shape))

    return max(shapes, key=overlap)


@cache
def _templates(shape: str) -> list[np.ndarray]:
    """The outline of a shape, sharp and as a blurred picture shows it."""
    sharp = shape_mask(shape, 256, 256, 128, 128, 60)
    return [normalised(blurred(sharp, blur) > 0.5) for blur in TEMPLATE_BLURS]


def blurred(mask: np.ndarray, deviation: float) -> np.ndarray:
    """A mask (H, W) float32, softened; the deviation is in pixels."""
    return cv2.GaussianBlur(mask, (0, 0), deviation)


def normalised(mask: np.ndarray) -> np.ndarray:
    """The mask (H, W) bool moved and scaled: centre of mass in the middle, a sixth of the canvas covered."""
    mask = mask.astype(np.float32)
    moments = cv2.moments(mask)
    x, y = moments["m10"] / moments["m00"], moments["m01"] / moments["m00"]
    scale = (_TEMPLATE_PX**2 / 6 / moments["m00"]) ** 0.5
    middle = (_TEMPLATE_PX - 1) / 2
    move = np.array([[scale, 0, middle - scale * x], [0, scale, middle - scale * y]])
    return cv2.warpAffine(mask, move, (_TEMPLATE_PX, _TEMPLATE_PX), flags=cv2.INTER_LINEAR) > 0.5


def sentences(number: int, pairs: Sequence[tuple[str, str]], seed: int) -> list[tuple[Scene, str]]:
    """Scenes with sentences that the demo set never uses."""
    rng = np.random.default_rng(seed)
    return [captioned_scene(rng, tuple(pairs), held_out=True) for _ in range(number)]


def distance(made: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """PSNR in dB and SSIM of a picture, enlarged to the true one's size where it is smaller."""
    made = cv2.resize(made, true.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    found = image_metrics(*(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255 for picture in (made, true)))
    return found["psnr"].item(), found["ssim"].item()


def accuracy(pictures: Sequence[np.ndarray], texts: Sequence[str]) -> dict[str, float]:
    """Share of the pictures that show each attribute of their sentence, and all of them together."""
    results = [score(picture, describe(text)) for picture, text in zip(pictures, texts, strict=True)]
    shares = {name: float(np.mean([result[name] for result in results])) for name in ATTRIBUTES}
    return shares | {"all": float(np.mean([all(result.values()) for result in results]))}
