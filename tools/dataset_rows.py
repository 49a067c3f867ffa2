"""The rows of a data set as a training's plan sees them, without a picture: who is drawn, into which bucket, and why
others are not."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from warpcore.data.buckets import resized_size
from warpcore.data.filters import values_of
from warpcore.data.index import read_rows
from warpcore.data.lanes import Recipe, bucket_name, draws_of_epoch
from warpcore.data.samples import Sample
from warpcore.data.selection import PASS_ROWS, Piece, Rows, as_pieces, cut
from warpcore.data.storage import in_parallel
from warpcore.data.tars import clean

MAX_COLUMNS = 64
MAX_TEXT = 4_000
"""Characters of a text that a page shows."""
MOST_CHARACTERS = 2**25
"""Of all columns of texts together."""
BINS = 24
"""Bars of a histogram of numbers."""
MOST_VALUES = 12
"""Of a column of texts or truth values: those that are counted one by one."""
FEW = 0.01
"""A bucket with a smaller share of the draws is nearly empty."""
DRAWN = "drawn"
NOT_DRAWN = "not drawn in the first epoch"
"""By the weight of its source, or by chance (bucket_config)."""


@dataclass
class Listed:
    """Rows of the indexes, in the order of the catalog. Lists have an entry for each of them."""

    shards: list[str]
    """All of the catalog."""
    columns: dict[str, list]
    """Of the samples' .json, and what the index says of videos."""
    first: dict[int, int] = field(default_factory=dict)
    """Shard -> the number of its first row."""
    shard: list[int] = field(default_factory=list)
    key: list[str] = field(default_factory=list)
    width: list[int] = field(default_factory=list)
    height: list[int] = field(default_factory=list)
    members: list[str] = field(default_factory=list)
    problem: list[str | None] = field(default_factory=list)
    state: list[str] = field(default_factory=list)
    """DRAWN, NOT_DRAWN, or the reason for which it is left out."""

    def __len__(self) -> int:
        return len(self.key)

    def add(self, piece: Piece, rows: Rows, table: pa.Table) -> None:
        """The rows of the index of a piece, of which `rows` can be drawn."""
        state = np.full(len(table), NOT_DRAWN, object)
        for reason, numbers in rows.left_out.items():
            state[numbers - piece.start] = clean(reason)
        self.first.setdefault(piece.shard, len(self))
        self.state += state.tolist()
        self.shard += [piece.shard] * len(table)
        for name in ("key", "width", "height", "problem"):
            getattr(self, name).extend(table[name].to_pylist())
        self.members += [" ".join(sorted(names)) for names in table["member_names"].to_pylist()]
        for name, values in self.columns.items():
            found = values_of(table, name)
            values += [None] * len(table) if found is None else map(_sayable, found.to_pylist())


def list_rows(recipe: Recipe, most: int) -> Listed:
    """The first rows, about `most` of them: pieces of tars are listed whole."""
    catalog, pieces, room = recipe.catalog, [], most
    for piece in as_pieces(cut(catalog, PASS_ROWS)):
        if room > 0:
            pieces.append(piece)
            room -= piece.stop - piece.start

    def load(piece: Piece) -> tuple[Rows, pa.Table]:
        table = read_rows(catalog.shard(piece.shard), None, piece.start, piece.stop)
        return recipe.selection.load(catalog, piece), table

    listed = Listed([*map(clean, catalog.urls)], {name: [] for name in sorted(catalog.fields)[:MAX_COLUMNS]})
    for piece, (rows, table) in zip(pieces, in_parallel(load, [(piece,) for piece in pieces]), strict=True):
        listed.add(piece, rows, table)
    return listed


def _sayable(value: Any) -> Any:
    """What a page can say of a value of an index: no NaN, six digits, and of a number that is too long for a browser
    the text."""
    if isinstance(value, int) and abs(value) > 2**53:
        return str(value)
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return clean(value[:MAX_TEXT]) if isinstance(value, str) else value


@dataclass
class Drawn:
    """The draws of the first epoch."""

    samples: dict[int, Sample] = field(default_factory=dict)
    """Of each listed row that is drawn its first draw, in the order of the draws."""
    sizes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """The bucket of each of these, (H, W) or (frames, H, W) in px."""
    counts: Counter[tuple[int, ...]] = field(default_factory=Counter)
    """Draws of each bucket, those of rows included that are not listed."""


def draw(recipe: Recipe, listed: Listed) -> Drawn:
    """The draws of the first epoch; says in `listed` which rows are among them."""
    found = Drawn()
    for (shard, place, *_), sample, size in draws_of_epoch(recipe):
        if size is None:
            continue
        found.counts[size] += 1
        row = listed.first.get(shard, len(listed)) + place
        if row < len(listed) and listed.shard[row] == shard and row not in found.samples:
            found.samples[row], found.sizes[row] = sample, size
            listed.state[row] = DRAWN
    return found


def kept(sample: Sample, size: tuple[int, ...]) -> tuple[float, float]:
    """How many times as large a picture gets before it is cropped to its bucket, and the share that the crop keeps."""
    height, width = resized_size(sample.height, sample.width, size[-2:])
    return height / sample.height, size[-2] * size[-1] / (height * width)


# ------------------------------------------------------------------ for the page


def row_lists(listed: Listed, drawn: Drawn, captions: Mapping[int, str]) -> dict[str, Any]:
    """Of every row, what a table of them shows. Texts that repeat are numbers of those in a list of `texts`."""
    sizes = sorted(drawn.counts)
    buckets = {size: number for number, size in enumerate(sizes)}
    scales = {row: kept(sample, drawn.sizes[row]) for row, sample in drawn.samples.items()}
    rows = range(len(listed))
    texts: dict[str, list[str]] = {}
    numbers: dict[str, list[int]] = {}
    for name in ("members", "state"):
        places: dict[str, int] = {}
        numbers[name] = [places.setdefault(text, len(places)) for text in getattr(listed, name)]
        texts[name] = [*map(clean, places)]
    return {
        "shards": listed.shards, "texts": texts | {"bucket": [*map(bucket_name, sizes)]},
        "key": [*map(clean, listed.key)], "shard": listed.shard, "width": listed.width, "height": listed.height,
        **numbers,
        "bucket": [buckets.get(drawn.sizes.get(row), -1) for row in rows],
        "scale": [round(scales[row][0], 3) if row in scales else None for row in rows],
        "kept": [round(scales[row][1], 3) if row in scales else None for row in rows],
        "caption": [captions[row][:MAX_TEXT] if row in captions else None for row in rows],
        "problem": {row: clean(text) for row, text in enumerate(listed.problem) if text},
    }  # fmt: skip


def column_texts(columns: Mapping[str, list]) -> tuple[dict[str, list], int]:
    """The columns with their texts cut off, so that all of them fit into a page, and at how many characters."""
    lengths = np.array([len(one) for values in columns.values() for one in values if isinstance(one, str)], np.int64)
    most = MAX_TEXT
    while np.minimum(lengths, most).sum() > MOST_CHARACTERS and most > 1:
        most //= 2
    cut = {name: [one[:most] if isinstance(one, str) else one for one in values] for name, values in columns.items()}
    return cut, most


def bucket_list(drawn: Drawn, every: Iterable[tuple[int, ...]], micro_batch_size_of: Any) -> list[dict[str, Any]]:
    """The buckets, those that nothing is drawn for included: draws of an epoch, and the samples of a micro-batch."""
    total = drawn.counts.total()
    found = []
    for size in sorted({*every, *drawn.counts}):
        draws, micro = drawn.counts[size], micro_batch_size_of(size)
        few = "empty" if not draws else None
        if draws and draws < micro:
            epochs = math.ceil(micro / draws)
            few = f"fewer draws than a micro-batch of {micro}: one is full after {epochs} epochs"
        elif draws and draws < FEW * total:
            few = f"under {FEW:.0%} of the draws"
        found.append({"name": bucket_name(size), "draws": draws, "micro_batch": micro, "few": few})
    return found


def histograms(listed: Listed, drawn: Drawn) -> Iterator[dict[str, Any]]:
    """Of every column the counts of its values, all rows beside those that are drawn."""
    is_drawn = np.array([state == DRAWN for state in listed.state], bool)
    ratio = [round(w / h, 3) if w and h else None for w, h in zip(listed.width, listed.height, strict=True)]
    measured = {"width": listed.width, "height": listed.height, "width / height": ratio}
    for name, values in (measured | listed.columns).items():
        present = np.array([value is not None for value in values], bool)
        if not present.any():
            continue
        held, chosen = [value for value in values if value is not None], is_drawn[present]
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in held):
            bars = _of_numbers(np.array(held, np.float64), chosen)
        else:
            bars = _of_values(held, chosen)
        yield {"name": clean(name), "absent": int((~present).sum()), "bars": bars}


def _of_numbers(values: np.ndarray, chosen: np.ndarray) -> list[tuple[str, int, int]]:
    """(label, rows, rows that are drawn) of ranges of equal width, or of the numbers themselves if these are few."""
    distinct = np.unique(values)
    if len(distinct) <= MOST_VALUES:
        return [(f"{one:.6g}", int((values == one).sum()), int((values[chosen] == one).sum())) for one in distinct]
    edges = np.linspace(distinct[0], distinct[-1], BINS + 1)
    if not np.all(np.diff(edges) > 0):  # of numbers that differ by less than their digits
        return [(f"{distinct[0]:.6g}", len(values), int(chosen.sum()))]
    counts, drawn = (np.histogram(some, edges)[0].tolist() for some in (values, values[chosen]))
    labels = [f"{low:.4g} .. {high:.4g}" for low, high in pairwise(edges)]
    return [*zip(labels, counts, drawn, strict=True)]


def _of_values(values: Sequence[Any], chosen: np.ndarray) -> list[tuple[str, int, int]]:
    """The same of the commonest texts."""
    told = [str(value).lower() if isinstance(value, bool) else str(value)[:80] for value in values]
    every, drawn = Counter(told), Counter(text for text, keep in zip(told, chosen, strict=True) if keep)
    bars = [(text, count, drawn[text]) for text, count in every.most_common(MOST_VALUES)]
    if (others := len(every) - len(bars)) > 0:
        count, kept_of_them = (sum(one.values()) - sum(bar[i] for bar in bars) for i, one in ((1, every), (2, drawn)))
        bars.append((f"({others} others)", count, kept_of_them))
    return bars
