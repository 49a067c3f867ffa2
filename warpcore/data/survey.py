"""What a pass over the whole index finds, and the rows that are held out of training."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from warpcore.data.catalog import Catalog
from warpcore.data.clip_buckets import ClipBuckets, row_seeds
from warpcore.data.columns import PREFIX
from warpcore.data.filters import column_names, values_of
from warpcore.data.index import has_member, read_rows
from warpcore.data.selection import PASS_ROWS, Piece, Selection, as_pieces, choose_by_hash, cut, shown_sizes
from warpcore.errors import UserError


@dataclass
class Survey:
    """What a pass over the whole index finds."""

    rows: int = 0
    passed: int = 0
    """Training rows: those that meet all conditions and are not held out."""
    per_epoch: float = 0.0
    """How many draws of them an epoch has, on average over epochs: each counts with the weight of its source."""
    rejected: Counter[str] = field(default_factory=Counter)
    ranges: dict[str, str] = field(default_factory=dict)
    """Filtered column -> the values it was seen to have."""
    members: Counter[str] = field(default_factory=Counter)
    """How many training rows have each of the members that were asked for."""
    missing: Counter[str] = field(default_factory=Counter)
    """How many training rows lack each of the columns that the selection names."""
    examples: dict[str, str] = field(default_factory=dict)
    """Of some of the reasons, the first row that was rejected, and what to do."""
    buckets: dict[str, float] = field(default_factory=dict)
    """Of a run of clips: length at a resolution -> the draws that it has per epoch, on average over epochs."""
    micro_batches_per_epoch: float = 0.0
    """Of a run whose buckets have micro-batch sizes of their own, on average over epochs."""

    def __str__(self) -> str:
        reasons = [
            f"{count} rejected: {reason}" + (f" ({self.examples[reason]})" if reason in self.examples else "")
            for reason, count in self.rejected.most_common()
        ]
        ranges = [f"{name} is {seen}" for name, seen in self.ranges.items()]
        buckets = [f"{name}: {rows:,.6g}" for name, rows in self.buckets.items()]
        buckets = [f"rows per bucket and epoch, on average: {', '.join(buckets)}"] if buckets else []
        return "; ".join([f"{self.passed} of {self.rows} rows can be drawn", *reasons, *ranges, *buckets])

    @property
    def samples_per_micro_batch(self) -> Fraction:
        """On average over epochs."""
        return Fraction(self.per_epoch / (self.micro_batches_per_epoch or 1.0)).limit_denominator(10**6) or Fraction(1)

    def count_buckets(self, buckets: ClipBuckets, rows: pa.Table, weight: float) -> None:
        """Add what an epoch draws of rows that fit a bucket, for every bucket; `weight` is that of their source."""
        seeds = row_seeds(rows["key"].to_pylist()) if buckets.by_row else None
        for rung, shares in buckets.shares(*shown_sizes(rows), seeds):
            draws = float(shares.sum()) * weight
            self.per_epoch += draws
            self.micro_batches_per_epoch += draws / (rung.micro_batch_size or 1)
            self.buckets[str(rung)] = self.buckets.get(str(rung), 0.0) + draws


def survey(catalog: Catalog, selection: Selection, members: Sequence[str] = ()) -> Survey:
    """Read every index once: a second per million rows and filter, longer where storage is slow."""
    result = Survey()
    limits: dict[str, list] = {}
    names = list(dict.fromkeys(key for condition in selection.filters for key in condition.keys))
    for piece in as_pieces(cut(catalog, PASS_ROWS)):
        result.rows += piece.stop - piece.start
        rows = selection.load(catalog, piece)
        result.passed += len(rows.numbers)
        weight = float(catalog.weights[piece.shard])
        if selection.buckets is None:
            result.per_epoch += len(rows.numbers) * weight
        else:
            result.count_buckets(selection.buckets, rows.table, weight)
        for member in members:
            result.members[member] += pc.sum(has_member(rows.table, member)).as_py() or 0
        for name in selection.columns:
            result.missing[name] += rows.table[PREFIX + name].null_count
        result.rejected += rows.rejected
        result.examples = rows.examples | result.examples
        for name, column in _values_in(catalog, piece, names):
            seen = pc.min_max(column).as_py()
            limits.setdefault(name, []).extend(value for value in seen.values() if value is not None)
    for name, values in limits.items():
        result.ranges[name] = _range(values)
    return result


def _values_in(catalog: Catalog, piece: Piece, names: list[str]) -> Iterator[tuple[str, pa.ChunkedArray]]:
    if names:
        columns = [column for name in names for column in column_names(name)]
        table = read_rows(catalog.shard(piece.shard), columns, piece.start, piece.stop)
        found = ((name, values_of(table, name)) for name in names)
        yield from ((name, values) for name, values in found if values is not None)


def _range(values: list) -> str:
    numbers = [value for value in values if not isinstance(value, str)]
    texts = [value[:40] for value in values if isinstance(value, str)]
    shown = [f"{_told(min(kind))} .. {_told(max(kind))}" for kind in (numbers, texts) if kind]
    return " and ".join(shown) or "empty"


def _told(value: float | str) -> str:
    return f"{value:.7g}" if isinstance(value, float) else repr(value)  # columns of videos are float32


def hold_out(catalog: Catalog, selection: Selection, count: int, candidates: int = 262_144) -> dict[int, np.ndarray]:
    """Choose `count` rows for validation by the hash of their keys: shard number -> row numbers, sorted.

    Raises:
        UserError: no row would be left for training.
    """
    chosen, found = choose_by_hash(catalog, selection, count, candidates)
    if not found:
        raise UserError(f"no sample can be drawn: {survey(catalog, selection)}")
    if found <= count:
        raise UserError(f"validation_samples: {count} leaves no row for training: only {survey(catalog, selection)}")
    return chosen
