"""Lanes: the independent streams of micro-batches that a plan consists of.

A lane owns pieces of the data set. In each epoch it orders them again, takes them in groups of bounded size, shuffles
across a group, and deals its rows to buckets; a bucket that is full is a micro-batch. Rows of incomplete micro-batches
are carried into the next group and epoch. Everything follows from the recipe and a small state.
"""

import heapq
import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from warpcore.data.catalog import Catalog
from warpcore.data.clip_buckets import row_seeds
from warpcore.data.hashing import splitmix64
from warpcore.data.samples import MicroBatch, Sample
from warpcore.data.selection import Piece, Selection, as_pieces, cut, make_samples
from warpcore.data.survey import survey
from warpcore.errors import UserError
from warpcore.random import stable_hash

CHUNK_ROWS = 256
"""How many rows become samples at a time: few enough to start quickly, enough to amortise pyarrow's calls."""
PIECES_PER_LANE = 8
"""The least number of pieces, where there are several lanes, whose loads differ by less than a piece."""
PASSED, DRAWN = "passed", "drawn"
NOT_KEPT = "left out this time, by the probabilities in bucket_config"
MAX_EMPTY_EPOCHS = 1000
"""Of a lane, one after the other, in which chance keeps none of its rows."""


class BucketChoice(Protocol):
    """What a plan needs of `Buckets`."""

    sizes: list[tuple[int, ...]]
    micro_batch_sizes: Mapping[tuple[int, ...], int]
    """Of those buckets that have a micro-batch size of their own."""
    settings: Mapping[str, object]
    """What else decides of a sample's bucket, as JSON."""
    stride: int
    frame_rate: float | None
    """Which frames clips take, see `warpcore.data.frames`; one of the two."""
    by_row: bool
    """Whether a row has its bucket once and for all, by `row_seeds`; else each of its draws has one of its own."""

    def choose_many(
        self, widths: np.ndarray, heights: np.ndarray, seeds: np.ndarray, num_frames: np.ndarray, fps: np.ndarray
    ) -> np.ndarray:
        """(N,) places in `sizes`; -1 where no bucket keeps a sample this time."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides which rows a micro-batch holds, but for the position."""

    catalog: Catalog
    selection: Selection
    buckets: BucketChoice
    micro_batch_size: int | None
    """Of buckets that have none of their own."""
    seed: int
    num_lanes: int
    group_rows: int

    @cached_property
    def lanes(self) -> list[np.ndarray]:
        """The pieces (n, 3) of every lane, as `cut` gives them: each draws about the same number of rows per epoch."""
        pieces = cut(self.catalog, self._piece_rows())
        loads = (pieces[:, 2] - pieces[:, 1]) * self.catalog.weights[pieces[:, 0]]
        shuffled = hash_numbers(np.arange(len(pieces)), stable_hash(self.seed, "deal"))
        order = np.lexsort((shuffled, -loads))
        lanes: list[list[int]] = [[] for _ in range(self.num_lanes)]
        least = [(0.0, number) for number in range(self.num_lanes)]
        for place, piece_load in zip(order.tolist(), loads[order].tolist(), strict=True):
            load, number = least[0]
            lanes[number].append(place)
            heapq.heapreplace(least, (load + piece_load, number))
        return [pieces[np.array(places, np.int64)] for places in lanes]

    def _piece_rows(self) -> np.ndarray:
        """(shards,) rows of a piece at most: small enough that lanes, which all go at one speed, get equal loads."""
        if self.num_lanes == 1:
            return np.full(len(self.catalog), self.group_rows)
        load = float(self.catalog.rows @ self.catalog.weights) / (PIECES_PER_LANE * self.num_lanes)
        return np.clip(load / self.catalog.weights, 1, self.group_rows).astype(np.int64)

    def groups(self, lane: int, epoch: int) -> list[list[Piece]]:
        """The shard groups of one epoch of a lane: its pieces in a new order, bounded in rows."""
        pieces = self.lanes[lane]
        order = np.argsort(hash_numbers(np.arange(len(pieces)), stable_hash(self.seed, "groups", lane, epoch)))
        groups: list[list[Piece]] = []
        rows = self.group_rows
        for piece in as_pieces(pieces[order]):
            rows += piece.stop - piece.start
            if rows > self.group_rows:
                groups.append([])
                rows = piece.stop - piece.start
            groups[-1].append(piece)
        return groups

    def to_samples(self, rows: pa.Table, draws: "Sequence[Draw]") -> list[Sample]:
        shards = {draw.shard for draw in draws}
        whole = {shard: self.catalog.shard(shard) for shard in shards}
        names = {shard: self.catalog.name(shard) for shard in shards}
        seeds = [draw_seed(self.seed, draw.epoch, names[draw.shard], draw.row, draw.repeat) for draw in draws]
        return make_samples(rows, [whole[draw.shard] for draw in draws], seeds)

    def sizes_of(self, samples: Sequence[Sample]) -> list[tuple[int, ...] | None]:
        return sizes_of(samples, self.buckets)

    def micro_batch_size_of(self, size: tuple[int, ...]) -> int:
        """Samples of a micro-batch of a bucket."""
        return self.buckets.micro_batch_sizes.get(size, self.micro_batch_size)

    @property
    def least_micro_batch_size(self) -> int:
        """Of all buckets."""
        return min(map(self.micro_batch_size_of, self.buckets.sizes))


class Draw(NamedTuple):
    """One occurrence of a row."""

    shard: int
    row: int
    repeat: int
    epoch: int


@dataclass(frozen=True)
class Group:
    """The rows of a shard group that can be drawn, and the shuffled order of their draws."""

    rows: pa.Table
    shards: np.ndarray
    """(rows,) the shard of each row."""
    numbers: np.ndarray
    """(rows,) the place of each row in its shard."""
    order: np.ndarray
    """(draws,) places in `rows`."""
    repeats: np.ndarray
    """(draws,)"""
    counts: Counter[str]

    @classmethod
    def load(cls, recipe: Recipe, pieces: Sequence[Piece], epoch: int) -> "Group":
        loaded = [recipe.selection.load(recipe.catalog, piece) for piece in pieces]
        lengths = [len(rows.numbers) for rows in loaded]
        shards = np.repeat([piece.shard for piece in pieces], lengths)
        numbers = np.concatenate([rows.numbers for rows in loaded])
        salts = [stable_hash(recipe.seed, "rows", recipe.catalog.name(piece.shard)) for piece in pieces]
        hashes = hash_numbers(numbers, np.repeat(np.array(salts, np.uint64), lengths))
        occurrences = occurrences_in_epoch(hashes, recipe.catalog.weights[shards], epoch)
        places = np.repeat(np.arange(len(numbers)), occurrences)
        firsts = np.repeat(np.cumsum(occurrences) - occurrences, occurrences)
        repeats = np.arange(len(places)) - firsts
        shuffled = hash_numbers(repeats, hashes[places] ^ np.uint64(stable_hash(recipe.seed, "order", epoch)))
        order = np.argsort(shuffled, kind="stable")
        counts: Counter[str] = sum((rows.rejected for rows in loaded), Counter())
        counts += Counter({PASSED: len(numbers), DRAWN: len(places)})
        table = pa.concat_tables([rows.table for rows in loaded]).combine_chunks()
        return cls(table, shards, numbers, places[order], repeats[order], counts)

    def draws(self, start: int, stop: int, epoch: int) -> tuple[pa.Table, list[Draw]]:
        places = self.order[start:stop]
        columns = (self.shards[places], self.numbers[places], self.repeats[start:stop])
        found = [Draw(*row, epoch) for row in zip(*(column.tolist() for column in columns), strict=True)]
        return self.rows.take(pa.array(places)), found


def draws_of_epoch(recipe: Recipe, epoch: int = 0) -> Iterator[tuple[Draw, Sample, tuple[int, ...] | None]]:
    """Every draw of an epoch, lane after lane, with its sample and its bucket; None where no bucket keeps it then."""
    for lane in range(recipe.num_lanes):
        for pieces in recipe.groups(lane, epoch):
            group = Group.load(recipe, pieces, epoch)
            for start in range(0, len(group.order), CHUNK_ROWS):
                rows, draws = group.draws(start, start + CHUNK_ROWS, epoch)
                samples = recipe.to_samples(rows, draws)
                yield from zip(draws, samples, recipe.sizes_of(samples), strict=True)


class Lane:
    """One lane at a position; `next_micro_batch` moves it on."""

    def __init__(self, recipe: Recipe, number: int, state: dict | None = None):
        state = state or fresh_state()
        self.recipe = recipe
        self.number = number
        self.emitted: int = state["emitted"]
        """How many micro-batches the lane has given since the run began."""
        self._epoch: int = state["epoch"]
        self._group_number: int = state["group"]
        self._cursor: int = state["cursor"]
        self._counts: Counter[str] = Counter(state["counts"])
        self._groups = recipe.groups(number, self._epoch)
        try:
            self._waiting = {parse_size(size): self._restore(draws) for size, draws in state["waiting"].items()}
        except (LookupError, OverflowError) as error:
            raise UserError(f"the saved state of lane {number} names rows that the data does not have") from error
        if self._group_number >= len(self._groups) or any(
            size not in recipe.buckets.sizes or len(entries) >= recipe.micro_batch_size_of(size)
            for size, entries in self._waiting.items()
        ):
            raise UserError(f"the saved state of lane {number} is not one of this data")
        self._group: Group | None = None
        self._chunk: deque[tuple[tuple[int, ...] | None, tuple[Draw, Sample]]] = deque()
        self._empty_epochs = 0

    def next_micro_batch(self, number: int) -> MicroBatch:
        """Fill the next micro-batch, whose global number is `number`.

        Raises:
            UserError: a whole epoch of the lane had no row that can be drawn, or many had none that chance kept.
        """
        notes: list[str] = []
        while True:
            if not self._chunk and not self._fill_chunk():
                notes = self._next_group() or notes  # of several short epochs the last one's note says it all
                continue
            size, entry = self._chunk.popleft()
            self._cursor += 1
            if size is None:
                self._counts[NOT_KEPT] += 1
                continue
            entries = self._waiting.setdefault(size, [])
            entries.append(entry)
            if len(entries) == self.recipe.micro_batch_size_of(size):
                del self._waiting[size]
                self.emitted += 1
                samples = tuple(sample for _, sample in entries)
                return MicroBatch(number, size, samples, self.number, self.state(), self._epoch, tuple(notes))

    def state(self) -> dict:
        """JSON-able; a lane made of it goes on exactly here."""
        return {
            "emitted": self.emitted,
            "epoch": self._epoch,
            "group": self._group_number,
            "cursor": self._cursor,
            "counts": dict(self._counts),
            "waiting": {
                bucket_name(size): [list(draw) for draw, _ in entries]
                for size, entries in sorted(self._waiting.items())
            },
        }

    def _fill_chunk(self) -> bool:
        """Make samples of the group's next rows; False where it has no more."""
        if self._group is None:
            self._group = Group.load(self.recipe, self._groups[self._group_number], self._epoch)
        rows, draws = self._group.draws(self._cursor, self._cursor + CHUNK_ROWS, self._epoch)
        samples = self.recipe.to_samples(rows, draws)
        self._chunk.extend(zip(self.recipe.sizes_of(samples), zip(draws, samples, strict=True), strict=True))
        return bool(draws)

    def _next_group(self) -> list[str]:
        """Go on to the next group; the note of the epoch where this was its last."""
        assert self._group is not None
        self._counts += self._group.counts
        self._group, self._cursor = None, 0
        self._group_number += 1
        if self._group_number < len(self._groups):
            return []
        note = self._epoch_note()
        if not self._counts[PASSED]:
            raise UserError(self._nothing_to_draw())
        self._empty_epochs = self._empty_epochs + 1 if self._counts[DRAWN] == self._counts[NOT_KEPT] > 0 else 0
        if self._empty_epochs == MAX_EMPTY_EPOCHS:
            raise UserError(
                f"bucket_config: its probabilities kept none of the {self._counts[DRAWN]} rows of lane {self.number} "
                f"in {MAX_EMPTY_EPOCHS} epochs: raise them"
            )
        self._epoch, self._group_number, self._counts = self._epoch + 1, 0, Counter()
        self._groups = self.recipe.groups(self.number, self._epoch)
        return [note]

    def _epoch_note(self) -> str:
        counts = self._counts
        lane = f" of lane {self.number}" if self.recipe.num_lanes > 1 else ""
        waiting = {bucket_name(size): len(entries) for size, entries in sorted(self._waiting.items())}
        parts = [f"epoch {self._epoch}{lane} is over: {counts[DRAWN]} rows drawn"]
        parts += [f"{n} rejected: {reason}" for reason, n in counts.most_common() if reason not in (PASSED, DRAWN)]
        if waiting:
            buckets = ", ".join(f"{size}: {number}" for size, number in waiting.items())
            parts.append(f"{sum(waiting.values())} wait for a full micro-batch ({buckets})")
        size = self.recipe.least_micro_batch_size
        if counts[DRAWN] - counts[NOT_KEPT] < size:
            parts.append(f"fewer than a micro-batch of {size}: a picture occurs more than once in one")
        return "; ".join(parts)

    def _nothing_to_draw(self) -> str:
        found = survey(self.recipe.catalog, self.recipe.selection)
        if not found.passed:
            return f"no row of the data set can be drawn: {found}"
        return (
            f"lane {self.number} of {self.recipe.num_lanes} has no row that can be drawn; the conditions leave too "
            f"few rows for {self.recipe.num_lanes} lanes: set lanes to 1 ({found})"
        )

    def _restore(self, saved: list[list[int]]) -> list[tuple[Draw, Sample]]:
        """The waiting rows of a saved state, read from the indexes again."""
        draws = [Draw(*entry) for entry in saved]
        samples: dict[Draw, Sample] = {}
        for shard in {draw.shard for draw in draws}:
            of_shard = [draw for draw in draws if draw.shard == shard]
            rows = [draw.row for draw in of_shard]
            first = min(rows)
            table = self.recipe.selection.read(self.recipe.catalog.shard(shard), first, max(rows) + 1)
            table = table.take(pa.array([row - first for row in rows]))
            samples |= zip(of_shard, self.recipe.to_samples(table, of_shard), strict=True)
        return [(draw, samples[draw]) for draw in draws]


def sizes_of(samples: Sequence[Sample], buckets: BucketChoice) -> list[tuple[int, ...] | None]:
    """The bucket of every sample, (H, W) or (frames, H, W); None where no bucket keeps it this time."""
    widths, heights, num_frames = (
        np.array([getattr(sample, name) for sample in samples], np.int64) for name in ("width", "height", "num_frames")
    )
    if buckets.by_row:
        seeds = row_seeds(sample.key for sample in samples)
    else:
        seeds = np.array([sample.seed for sample in samples], np.uint64)
    fps = np.array([sample.fps for sample in samples], np.float64)
    places = buckets.choose_many(widths, heights, seeds, num_frames, fps)
    return [None if place < 0 else buckets.sizes[place] for place in places.tolist()]


def most_pixel_bytes(buckets: BucketChoice, micro_batch_size: int | None) -> int:
    """What the pixels of a micro-batch take at most."""
    return max(3 * math.prod(size) * buckets.micro_batch_sizes.get(size, micro_batch_size) for size in buckets.sizes)


def draw_seed(seed: int, epoch: int, shard: str, row: int, repeat: int = 0) -> int:
    """The seed of a sample, from which all its randomness follows. shard: its name in the catalog."""
    return stable_hash(seed, "sample", epoch, shard, row, repeat)


def fresh_state(epoch: int = 0, emitted: int = 0) -> dict:
    """The state of a lane at the start of an epoch, nothing waiting."""
    return {"emitted": emitted, "epoch": epoch, "group": 0, "cursor": 0, "counts": {}, "waiting": {}}


def bucket_name(size: tuple[int, ...]) -> str:
    """A bucket as text, `256x320` or `17x256x320`, as `parse_size` reads it."""
    return "x".join(map(str, size))


def parse_size(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x")))


def occurrences_in_epoch(hashes: np.ndarray, weights: np.ndarray, epoch: int) -> np.ndarray:
    """(rows,) how often each row occurs: `weight` times on average over epochs, evenly spread.

    Row by row it is floor(u + (epoch + 1) * weight) - floor(u + epoch * weight) with u in [0, 1) from the row's hash,
    so weight 0.5 takes one half of the rows in even epochs and the other half in odd ones.
    """
    start = (hashes >> np.uint64(32)) / 2**32  # 32 bits, so that whole weights add without rounding
    return (np.floor(start + (epoch + 1) * weights) - np.floor(start + epoch * weights)).astype(np.int64)


def hash_numbers(numbers: np.ndarray, salt: int | np.ndarray) -> np.ndarray:
    """(n,) uint64: for every number its hash; another salt gives unlike ones."""
    return splitmix64(numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.asarray(salt, np.uint64))
