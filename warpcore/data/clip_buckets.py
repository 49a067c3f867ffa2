"""Buckets of clips, (frames, H, W) in place of (H, W), and which one a clip or a picture goes to.

A *rung* is a length at a resolution (`240p`, 51 frames), with the share of samples that it keeps and a micro-batch
size. A sample looks for its rung from the largest resolution down:

    a resolution is passed over where the sample has less than 0.8 of its area
      among its lengths, from the longest down, the first that the sample has frames for and that takes it, by chance
        is the sample's rung, if it keeps the sample, by chance; else the search goes on at the next resolution

So a rung that keeps nothing (0.0) is a wall: long clips stop there and go on to smaller resolutions. Samples of one
frame, pictures among them, go to rungs of one frame, and no others do. The size of a rung is the one whose ratio is
nearest to the sample's. All this is what `bucket_config` means in Open-Sora, but for one point: a clip of exactly as
many frames as a bucket has fills it, where the published code wants one more.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np

from warpcore.data.buckets import Buckets, uniform
from warpcore.data.frames import frames_needed
from warpcore.data.resolutions import RESOLUTIONS
from warpcore.errors import UserError
from warpcore.random import stable_hash
from warpcore.text import brief

MAX_FRAMES, MAX_MICRO_BATCH = 100_000, 100_000
_SIDE = re.compile(r"([1-9][0-9]{0,4})(px)?")
LEAST_AREA = 0.8
"""Of a resolution's area that a sample needs to be enlarged to it."""
DRAWN_BY_ROW = (
    "the probabilities in bucket_config are drawn once for each row, by its key: a cache holds it in one bucket, the "
    "same in each epoch"
)
Size = tuple[int, int, int]
"""(frames, H, W)"""


class Shapes(Protocol):
    """The sizes (H, W) of a resolution, and the choice among them, such as `Buckets`."""

    sizes: list[tuple[int, int]]

    def choose_many(self, widths: np.ndarray, heights: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """(N,) places in `sizes`."""


class NamedShapes:
    """The sizes of a resolution with a name, their sides rounded down to multiples of `factor` px."""

    def __init__(self, name: str, factor: int):
        named = RESOLUTIONS[name].sizes
        self._ratios = np.array([*named])
        self.sizes = [(height // factor * factor, width // factor * factor) for height, width in named.values()]
        if not all(map(all, self.sizes)):
            raise UserError(f"bucket_config: {name} has sizes with a side under {factor} px: take a larger resolution")

    def choose_many(self, widths: np.ndarray, heights: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """(N,) the place of the first size whose ratio differs least (plain difference of height / width)."""
        return np.abs((heights / widths)[:, None] - self._ratios).argmin(axis=1)


@dataclass(frozen=True)
class Rung:
    """A length at a resolution."""

    resolution: str
    num_frames: int
    shapes: Shapes
    area: float = 0.0
    """Of the resolution, in px²; 0 takes samples of any size."""
    keep: float = 1.0
    """Probability that a sample stays here."""
    take: float | None = None
    """Probability that this length is considered at all; None: always."""
    micro_batch_size: int | None = None
    """None: the run's."""

    def __str__(self) -> str:
        return f"{self.resolution} x {self.num_frames} frame{'s' * (self.num_frames > 1)}"


class ClipBuckets:
    """The buckets of a run, and the choice among them.

    Args:
        rungs: in any order.
        stride: one in `stride` frames of a video is taken, or
        frame_rate: as many as make this number of frames per second (see `warpcore.data.frames`).
        by_row: chance decides once for each row, see `drawn_by_row`.
    """

    def __init__(self, rungs: Sequence[Rung], stride: int = 1, frame_rate: float | None = None, by_row: bool = False):
        self.stride, self.frame_rate = stride, frame_rate
        self.by_row = by_row and any(0 < share < 1 for rung in rungs for share in (rung.keep, rung.take or 0.0))
        self.rungs = sorted(rungs, key=lambda rung: (-rung.area, rung.resolution, -rung.num_frames))
        self._sizes_of = [[(rung.num_frames, *size) for size in rung.shapes.sizes] for rung in self.rungs]
        self.sizes: list[Size] = list(
            dict.fromkeys(size for rung, sizes in zip(self.rungs, self._sizes_of, strict=True) if rung.keep
                          for size in sizes)
        )  # fmt: skip
        """(frames, H, W) of every bucket that samples may go to."""
        self.random_ratio = max(getattr(rung.shapes, "random_ratio", 0.0) for rung in self.rungs)
        self.micro_batch_sizes: dict[Size, int] = {}
        """Of each bucket with a micro-batch size of its own; of two rungs with one bucket, the smaller one."""
        for rung, sizes in zip(self.rungs, self._sizes_of, strict=True):
            for size in sizes if rung.keep and rung.micro_batch_size else ():
                self.micro_batch_sizes[size] = min(rung.micro_batch_size, self.micro_batch_sizes.get(size, 2**31))
        place_of = {size: place for place, size in enumerate(self.sizes)}
        self._places = [np.array([place_of.get(size, -1) for size in sizes]) for sizes in self._sizes_of]
        shortest = min((rung.num_frames for rung in self.rungs if rung.num_frames > 1), default=None)
        steps = f", frame_rate {frame_rate:g}" if frame_rate else f", frame_stride {stride}" if stride > 1 else ""
        self.reasons = (
            "one frame, for which there is no bucket",
            f"too few frames for the shortest bucket ({shortest} frames{steps})"
            if shortest
            else "a video, and all buckets are of one frame",
            f"too small: under {LEAST_AREA:g} of the area of every resolution with buckets for its frames",
            "fits only buckets that keep nothing (0.0 in bucket_config)",
        )
        """Why a sample fits no bucket, by the numbers that `misfits` gives."""

    @property
    def largest(self) -> Size:
        """The bucket of the largest frames, one of clips where there are any; of equally large ones the longest, then
        the one nearest to a square, then the wide one."""
        return max(self.sizes, key=lambda size: (size[0] > 1, size[1] * size[2], size[0], min(size[1:]), size[2]))

    @property
    def settings(self) -> dict:
        """JSON-able: what a sample's bucket depends on, beside `sizes`."""
        rungs = [[r.resolution, r.num_frames, r.keep, r.take, r.micro_batch_size] for r in self.rungs]
        chance = {"buckets_drawn": "by row"} if self.by_row else {}
        return {"bucket_config": rungs, "frame_stride": self.stride, "frame_rate": self.frame_rate} | chance

    def drawn_by_row(self) -> "ClipBuckets":
        """These buckets for samples of which something is stored at one size: what chance decides follows from the key
        of a row alone (`row_seeds`), so that it has the same bucket, or none, in each epoch and in every run."""
        return ClipBuckets(self.rungs, self.stride, self.frame_rate, by_row=True)

    def choose_many(
        self, widths: np.ndarray, heights: np.ndarray, seeds: np.ndarray, num_frames: np.ndarray, fps: np.ndarray
    ) -> np.ndarray:
        """(N,) int64: for each sample the place in `sizes` of its bucket; -1 where no bucket keeps it.

        Args:
            widths, heights: in px, as shown. seeds: of the samples, from which all chance follows.
            num_frames, fps: 1 and 0 of pictures.
        """
        seeds = np.asarray(seeds, np.uint64)
        places = np.full(len(widths), -1, np.int64)
        for number, share in self._search(widths, heights, num_frames, fps, self._drawn(seeds)):
            own = np.flatnonzero(share)
            if len(own):
                shapes = self.rungs[number].shapes.choose_many(widths[own], heights[own], seeds[own])
                places[own] = self._places[number][shapes]
        return places

    def _drawn(self, seeds: np.ndarray) -> Callable[[int, str], np.ndarray | float]:
        def chance(number: int, what: str) -> np.ndarray | float:
            probability = getattr(self.rungs[number], what)
            if probability is None or probability >= 1:
                return 1.0
            drawn = self.draw(seeds, number, what)
            return (drawn <= probability if what == "take" else drawn < probability).astype(float)

        return chance

    def draw(self, seeds: np.ndarray, number: int, what: str) -> np.ndarray:
        """(N,) float64 in [0, 1): what decides whether a rung takes ("take") and keeps ("keep") each sample."""
        rung = self.rungs[number]
        return uniform(seeds, stable_hash("bucket", rung.resolution, rung.num_frames, what))

    def shares(
        self,
        widths: np.ndarray,
        heights: np.ndarray,
        num_frames: np.ndarray,
        fps: np.ndarray,
        seeds: np.ndarray | None = None,
    ) -> Iterator[tuple[Rung, np.ndarray]]:
        """For every rung the probability (N,) of each sample to go there: its share of the epochs.

        seeds: of samples for which chance has decided; their shares are 0 or 1.
        """

        def probability(number: int, what: str) -> float:
            probability = getattr(self.rungs[number], what)
            return 1.0 if probability is None else probability

        chance = probability if seeds is None else self._drawn(seeds)
        for number, share in self._search(widths, heights, num_frames, fps, chance):
            yield self.rungs[number], share

    def misfits(self, widths: np.ndarray, heights: np.ndarray, num_frames: np.ndarray, fps: np.ndarray) -> np.ndarray:
        """(N,) int64: for each sample that no bucket can ever keep, the place of the reason in `reasons`; else -1."""
        possible = np.zeros(len(widths), bool)
        for _, share in self.shares(widths, heights, num_frames, fps):
            possible |= share > 0
        long_enough = np.zeros(len(widths), bool)
        fitting = long_enough.copy()
        for rung in self.rungs:
            has_frames = self._has_frames(rung, num_frames, fps)
            long_enough |= has_frames
            fitting |= has_frames & _has_area(rung, widths, heights)
        single = np.asarray(num_frames) == 1
        conditions = [possible, ~long_enough & single, ~long_enough, ~fitting]
        return np.select(conditions, [-1, 0, 1, 2], default=3)

    def _search(
        self,
        widths: np.ndarray,
        heights: np.ndarray,
        num_frames: np.ndarray,
        fps: np.ndarray,
        chance: Callable[[int, str], np.ndarray | float],
    ) -> Iterator[tuple[int, np.ndarray]]:
        """The search of the module's docstring: of each rung's number, the share (N,) of each sample that ends there.

        chance: gives the share of all samples that a rung takes, and keeps.
        """
        arriving = np.ones(len(widths))
        numbered = enumerate(self.rungs)
        for _, of_resolution in groupby(numbered, key=lambda pair: pair[1].resolution):
            searching, going_on = arriving, np.zeros(len(widths))
            for number, rung in of_resolution:
                fits = self._has_frames(rung, num_frames, fps) & _has_area(rung, widths, heights)
                entering = searching * fits * chance(number, "take")
                kept = entering * chance(number, "keep")
                searching, going_on = searching - entering, going_on + (entering - kept)
                yield number, kept
            arriving = searching + going_on

    def _has_frames(self, rung: Rung, num_frames: np.ndarray, fps: np.ndarray) -> np.ndarray:
        if rung.num_frames == 1:
            return np.asarray(num_frames) == 1
        needed = frames_needed(rung.num_frames, fps, self.stride, self.frame_rate)
        return (np.asarray(num_frames) > 1) & (num_frames >= needed)


def row_seeds(keys: Iterable[str]) -> np.ndarray:
    """(N,) uint64: of rows with these keys, whose buckets are drawn once (`ClipBuckets.drawn_by_row`)."""
    return np.array([stable_hash("bucket of a row", key) for key in keys], np.uint64)


def _has_area(rung: Rung, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
    return np.asarray(widths, np.int64) * np.asarray(heights, np.int64) >= LEAST_AREA * rung.area


def checked(bucket_config: object) -> dict[str, dict[int, list]]:
    """A `bucket_config` as YAML gives it, with names as texts and numbers as numbers; see `rungs_of`.

    Raises:
        ValueError: says which entry is wrong, and what to write.
    """
    if not isinstance(bucket_config, dict):
        raise ValueError("write resolutions with numbers of frames, such as {240p: {51: [1.0, 8]}}")
    found: dict[str, dict[int, list]] = {}
    for name, lengths in bucket_config.items():
        if not isinstance(lengths, dict) or not lengths:
            raise ValueError(f"{name} needs numbers of frames, such as {{51: [1.0, 8]}}")
        if same := next((other for other in found if _plain(other) == _plain(str(name))), None):
            raise ValueError(f"{name!r} and {same!r} are one resolution: write its lengths under one of them")
        of_name = found[str(name)] = {}
        for frames, entry in lengths.items():
            number = _number(frames, int, 1, MAX_FRAMES)
            if number is None:
                raise ValueError(f"{name} has {brief(frames)}, which is no number of frames from 1 to {MAX_FRAMES:,}")
            if number in of_name:
                raise ValueError(f"{name} has {number} frames twice: remove one")
            of_name[number] = _entry(entry)
            if of_name[number] is None:
                raise ValueError(
                    f"{name}: {number} has {brief(entry)}: write [share of the clips to keep, micro-batch size], such "
                    "as [1.0, 8], or [[share to keep, share to take], size]; shares are from 0 to 1, sizes at least 1"
                )
    return found


def _plain(name: str) -> str:
    """The name of a resolution without what may be left out: 256 for 256px."""
    return number[1] if (number := _SIDE.fullmatch(name)) else name


def _entry(entry: object) -> list | None:
    """[keep or [keep, take], size or [guess, range] or None]; None where it is something else."""
    if not isinstance(entry, list | tuple) or len(entry) != 2:
        return None
    keeping, size = entry
    shares = [_number(one, float, 0, 1) for one in (keeping if isinstance(keeping, list | tuple) else [keeping])]
    sizes = list(size) if isinstance(size, list | tuple) else [size]
    numbers = [_number(one, int, least, MAX_MICRO_BATCH) for one, least in zip(sizes, (1, 0), strict=False)]
    if (
        None in shares
        or not 1 <= len(shares) <= 2
        or not 1 <= len(sizes) <= 2
        or (None in numbers and size is not None)
    ):
        return None
    return [shares if len(shares) == 2 else shares[0], numbers if len(sizes) == 2 else numbers[0]]


def _number(value: object, kind: type, least: int, most: int) -> int | float | None:
    """The number that a value is, or spells, if it is in range."""
    try:
        number = None if isinstance(value, bool) or (kind is int and isinstance(value, float)) else kind(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if number is not None and least <= number <= most else None


def rungs_of(
    bucket_config: Mapping[str, Mapping[int, Sequence]], factor: int, ratios: Sequence[float] = ()
) -> list[Rung]:
    """The rungs of a `bucket_config`: resolution -> frames -> (keep or (keep, take), micro-batch size).

    Args:
        factor: px of which sides are multiples, rounded down.
        ratios: width / height, in place of those that belong to a resolution's name, each with its inverse.

    Raises:
        UserError: a name of no resolution, or a rung that keeps samples without a micro-batch size.
    """
    rungs = []
    for name, lengths in bucket_config.items():
        area, shapes = _resolution(name, factor, ratios)
        for num_frames, (keeping, size) in lengths.items():
            keep, take = keeping if isinstance(keeping, Sequence) else (keeping, None)
            if keep and not isinstance(size, int):
                raise UserError(f"bucket_config: {name}: {num_frames}: {_without_size(size)}")
            rungs.append(Rung(name, num_frames, shapes, area, keep, take, size if keep else None))
    return rungs


def _without_size(size: Sequence[int] | None) -> str:
    if size is None:
        return "it keeps samples, so it needs a micro-batch size: write [keep, size]"
    return (
        f"{list(size)} is a guess and a range, in which tools/search_batch_size.py looks for a micro-batch size: run "
        "that first, or write one number"
    )


def _resolution(name: str, factor: int, ratios: Sequence[float]) -> tuple[int, Shapes]:
    """Area in px² and sizes of a resolution: `240p`, or `256`, or the side of a square as `64px`."""
    number = _SIDE.fullmatch(name)
    known = number[1] if number and number[1] in RESOLUTIONS else name
    if known in RESOLUTIONS and not ratios:
        return RESOLUTIONS[known].area, NamedShapes(known, factor)
    if known not in RESOLUTIONS and number is None:
        names = ", ".join(sorted(RESOLUTIONS, key=lambda one: RESOLUTIONS[one].area))
        raise UserError(f"bucket_config: {name} is no resolution: write one of {names}, or a side as 320px")
    area = RESOLUTIONS[known].area if known in RESOLUTIONS else int(number[1]) ** 2
    try:
        return area, Buckets(area, factor, ratios)
    except UserError as error:
        raise UserError(f"bucket_config: {name}: {error}") from None
