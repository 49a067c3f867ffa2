"""Buckets: the few picture sizes of equal area that a run trains at, and which one a picture belongs to."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Self

import numpy as np

from warpcore.data.hashing import splitmix64
from warpcore.errors import UserError
from warpcore.text import brief

# Added to a seed, they give each purpose its own stream.
_WHETHER, _WHICH = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03


class Buckets:
    """The bucket of every ratio and of its inverse, and the choice among them.

    density: area of a bucket in px². factor: both sides of a bucket are multiples of it, rounded down.
    ratios: width / height, each as `parse_ratio` takes it; none, or 1 alone, gives one square bucket.
    random_ratio: the probability, decided by the sample's seed, of a bucket drawn uniformly among the ratios.
    """

    micro_batch_sizes: Mapping[tuple[int, int], int] = MappingProxyType({})
    """Buckets of pictures have none of their own: the run's holds for all."""
    settings: Mapping[str, object] = MappingProxyType({})
    """Nothing but `sizes` and `random_ratio` decides of the bucket."""
    stride, frame_rate = 1, None
    """Of clips."""
    by_row = False
    """Each epoch draws for itself, where `random_ratio` leaves something to chance."""

    def __init__(self, density: int, factor: int, ratios: Iterable[str | int | float] = (), random_ratio: float = 0.0):
        if not 0 <= random_ratio <= 1:
            raise UserError(f"random_ratio (bucketeer_random_ratio) is a probability in 0 .. 1, not {random_ratio}")
        self.random_ratio = float(random_ratio)
        self.ratios: list[float] = [parse_ratio(ratio) for ratio in ratios] or [1.0]
        for ratio in tuple(self.ratios):
            if 1 / ratio not in self.ratios:
                self.ratios.append(1 / ratio)
        self.sizes: list[tuple[int, int]] = [_bucket_size(density, factor, ratio) for ratio in self.ratios]
        """Bucket (H, W) in px of every ratio; two ratios may share one."""
        # Ratios that share a bucket share its first index, so that equal indices and equal sizes mean the same.
        self._index = np.array([self.sizes.index(size) for size in self.sizes])

    @classmethod
    def for_image_size(
        cls,
        image_size: int | tuple[int, int],
        ratios: Iterable[str | int | float] | None = None,
        factor: int = 32,
        random_ratio: float = 0.0,
    ) -> Self:
        """Buckets of the area of a square picture of `image_size` px, as the configs give it, or the one of
        (width, height) px alone.

        Raises:
            UserError: ratios come with such a size, or its sides are no multiples of `factor`.
        """
        if isinstance(image_size, int):
            return cls(image_size**2, factor, ratios or (), random_ratio)
        width, height = image_size
        if ratios:
            raise UserError(f"image_size: {width}x{height} is one size: remove multi_aspect_ratio, or give one side")
        if width % factor or height % factor:
            near = "x".join(str(max(round(side / factor), 1) * factor) for side in image_size)
            raise UserError(f"image_size: {width}x{height}: sides have to be multiples of {factor} px; write {near}")
        made = cls(width * height, 1, (width / height,))
        made.ratios, made.sizes, made._index = made.ratios[:1], [(height, width)], made._index[:1]
        return made

    def drawn_by_row(self) -> Self:
        """These buckets: of pictures nothing is stored where their bucket is left to chance."""
        return self

    def choose(self, width: int, height: int, seed: int) -> tuple[int, int]:
        """The bucket (H, W) of one picture of `width` x `height` px."""
        return self.sizes[int(self.choose_many([width], [height], [seed])[0])]

    def choose_many(
        self,
        widths: Sequence[int] | np.ndarray,
        heights: Sequence[int] | np.ndarray,
        seeds: Sequence[int] | np.ndarray,
        num_frames: np.ndarray | None = None,
        fps: np.ndarray | None = None,
    ) -> np.ndarray:
        """(N,) int64: for each picture the index in `sizes` of its bucket; equal buckets have equal indices.

        The bucket is the first of those whose ratio differs least from the picture's (plain difference).
        `num_frames` and `fps`, which decide of the bucket of a clip, change nothing.
        """
        picture_ratios = np.asarray(widths, np.float64) / np.asarray(heights, np.float64)
        nearest = np.zeros(len(picture_ratios), np.int64)
        least = np.full(len(picture_ratios), np.inf)
        for index, ratio in enumerate(self.ratios):  # one ratio at a time keeps memory flat over millions of rows
            difference = np.abs(picture_ratios - ratio)
            nearest = np.where(difference < least, index, nearest)
            least = np.minimum(difference, least)
        if self.random_ratio > 0:
            seeds = np.asarray(seeds, np.uint64)
            drawn = (uniform(seeds, _WHICH) * len(self.ratios)).astype(np.int64)
            nearest = np.where(uniform(seeds, _WHETHER) < self.random_ratio, drawn, nearest)
        return self._index[nearest]


def parse_size(value: object) -> object:
    """(512, 768) of "512x768"; what is no such text stays as it is."""
    match = re.fullmatch(r"(\d+) ?x ?(\d+)", value) if isinstance(value, str) else None
    return value if match is None else (int(match[1]), int(match[2]))


def whole_size(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W) of the square, or of the one size, that the key `image_size` gives."""
    return (image_size, image_size) if isinstance(image_size, int) else (image_size[1], image_size[0])


def parse_ratio(value: str | int | float, key: str = "multi_aspect_ratio") -> float:
    """Width / height from "16/9", "16:9", 1.78 or 969; raises UserError, which names `key`, for anything else.

    YAML 1.1 reads a bare `16:9` as a number in base 60: 16 * 60 + 9 = 969. No ratio is 60 or more, so that is undone.
    """
    ratio = _ratio(value)
    if ratio is None or not 1 / 60 < ratio < 60:
        raise UserError(
            f"{key} has {brief(value)}, which is no ratio of width to height; write '16/9', '16:9' or 1.78"
        )
    return ratio


def resized_size(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """(H, W) in px of the smallest picture of the given shape that covers the bucket `size`, before it is cropped.

    The shorter side is rounded up and the longer one down, as the reference implementation does. In exact integers.
    """
    short, long = min(height, width), max(height, width)
    side = max(-(-size[0] * short // height), -(-size[1] * short // width))
    other = side * long // short
    return (other, side) if height > width else (side, other)


def _ratio(value: str | int | float) -> float | None:
    """The quotient that `value` spells, None where it spells none."""
    if isinstance(value, str):
        try:
            parts = [float(part) for part in value.replace(":", "/").split("/")]
        except ValueError:
            return None
    elif isinstance(value, int | float) and not isinstance(value, bool):
        parts = list(divmod(value, 60)) if math.isfinite(value) and value >= 60 else [value]
    else:
        return None
    if len(parts) == 1:
        return float(parts[0])
    return parts[0] / parts[1] if len(parts) == 2 and parts[1] else None


def _bucket_size(density: int, factor: int, ratio: float) -> tuple[int, int]:
    height, width = (int((area**0.5 // factor) * factor) for area in (density / ratio, density * ratio))
    if not height or not width:
        raise UserError(
            f"image_size {math.isqrt(density)} is too small for ratio {ratio:.4g}: the bucket's shorter side is under "
            f"{factor} px; use a larger image_size or leave that ratio out of multi_aspect_ratio"
        )
    return height, width


def uniform(seeds: np.ndarray, purpose: int) -> np.ndarray:
    """(N,) float64 in [0, 1), of uint64 seeds; another purpose gives numbers that are independent of these."""
    with np.errstate(over="ignore"):
        return (splitmix64(seeds + np.uint64(purpose)) >> np.uint64(11)) * 2.0**-53
